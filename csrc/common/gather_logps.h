// Arguments of gather_logps on every device, filled in by vlmkernels/ops/gather_logps/native.py.
//
// With z = x / temperature, m the maximum of x or a little less, L = log sum_v exp((x_v - m) / temperature), p_v = exp((x_v -
// m) / temperature - L):
//   forward    logp = (x_t - m) / temperature - L,   entropy = L - sum_v p_v (x_v - m) / temperature,   stats = (m, L)
//   backward   dx_v = (dlogp ([v == t] - p_v) - dentropy p_v (log p_v + entropy)) / temperature
// Result k (of K) belongs to one row of logits (of N); a row without an unmasked result is not read, and has gradient 0.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace vlmk {

struct GatherLogps {
    const void* logits;  // row n at (n / inner) * stride_outer + (n % inner) * stride_inner elements
    DType dtype;
    int64_t num_rows;     // N
    int64_t num_results;  // K
    int64_t vocab;        // V
    int64_t inner;
    int64_t stride_outer;
    int64_t stride_inner;
    const int64_t* targets;  // (K,)
    const bool* mask;        // (K,) or null: all
    float temperature;

    // Forward.
    const int64_t* rows;  // (K,) the row of each result, or null: result k is row k
    float* logp;          // (K,)
    float* entropy;       // (K,), read by the backward pass; null: not wanted
    float* stats;         // (K, 2): m, L
    float* partial;       // CUDA with splits > 1: (K, splits, 3) workspace
    int64_t splits;       // CUDA: blocks that share a row

    // Backward.
    const float* dlogp;     // (K,)
    const float* dentropy;  // (K,) or null: 0
    const int64_t* starts;  // (N + 1,): row n owns results [starts[n], starts[n + 1]); null: row k owns result k
    void* dlogits;          // like logits, every row written; may be logits itself
    int64_t grad_stride_outer;
    int64_t grad_stride_inner;
};

}  // namespace vlmk
