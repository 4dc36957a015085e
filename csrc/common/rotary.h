// Arguments of rotary on every device, filled in by vlmkernels/ops/rotary/native.py.
//
// With P pairs, of each head x of a token:
//   y_j = x_j cos_j - x_{j+P} sin_j,   y_{j+P} = x_{j+P} cos_j + x_j sin_j,   y_k = x_k from k = 2 P on
// The inverse has -sin: it is the backward pass.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace vlmk {

// Strides in elements; the last axis is contiguous.
struct RotaryHeads {
    const void* x;  // (batch, tokens, num, width)
    void* out;      // contiguous
    int64_t num;
    int64_t stride_batch;
    int64_t stride_token;
    int64_t stride_head;
};

struct RotaryTable {
    const void* values;  // (batch, tokens, pairs)
    int64_t stride_batch;
    int64_t stride_token;
};

struct Rotary {
    RotaryHeads query;
    RotaryHeads key;
    RotaryTable cos;
    RotaryTable sin;
    DType dtype;        // of query, key and the results
    DType table_dtype;  // of cos and sin
    int64_t batch;
    int64_t tokens;
    int64_t width;
    int64_t pairs;  // 2 pairs <= width
    bool inverse;
};

constexpr int64_t kRotaryMaxPairs = 256;  // CUDA: what a block has shared memory for

}  // namespace vlmk
