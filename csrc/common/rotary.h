// Arguments of rotary on every device. vlmkernels/ops/rotary/native.py fills them in.
//
// Let P be the number of pairs, and x one head of a token:
//   y_j = x_j cos_j - x_{j+P} sin_j,   y_{j+P} = x_{j+P} cos_j + x_j sin_j,   y_k = x_k from k = 2 P on
// The backward pass is the inverse, which uses -sin.
#pragma once

#include "dtypes.h"

namespace vlmk {

// Strides are in elements. The last axis is contiguous.
struct RotaryHeads {
    VLMK_STRUCT(RotaryHeads);
    VLMK_FIELD(const void*, x);  // (batch, tokens, num, width)
    VLMK_FIELD(void*, out);      // like x, contiguous
    VLMK_FIELD(int64_t, num);
    VLMK_FIELD(int64_t, stride_batch);
    VLMK_FIELD(int64_t, stride_token);
    VLMK_FIELD(int64_t, stride_head);
};

struct RotaryTable {
    VLMK_STRUCT(RotaryTable);
    VLMK_FIELD(const void*, values);  // (batch, tokens, pairs)
    VLMK_FIELD(int64_t, stride_batch);
    VLMK_FIELD(int64_t, stride_token);
};

struct Rotary {
    VLMK_STRUCT(Rotary);
    VLMK_FIELD(RotaryHeads, query);
    VLMK_FIELD(RotaryHeads, key);
    VLMK_FIELD(RotaryTable, cos);
    VLMK_FIELD(RotaryTable, sin);
    VLMK_FIELD(DType, dtype);        // of query, key and their results
    VLMK_FIELD(DType, table_dtype);  // of cos and sin
    VLMK_FIELD(int64_t, batch);
    VLMK_FIELD(int64_t, tokens);
    VLMK_FIELD(int64_t, width);
    VLMK_FIELD(int64_t, pairs);  // 2 pairs <= width
    VLMK_FIELD(bool, inverse);
};

constexpr int64_t kRotaryMaxPairs = 256;  // CUDA: limited by the shared memory of a block

}  // namespace vlmk
