// Arguments of gather_logps on every device. vlmkernels/ops/gather_logps/native.py fills them in.
//
// Let x be a row of logits, t the target, m the maximum of x or slightly less, L = log sum_v exp((x_v - m) / temperature) and
// p_v = exp((x_v - m) / temperature - L). Then
//   forward    logp = (x_t - m) / temperature - L,   entropy = L - sum_v p_v (x_v - m) / temperature,   stats = (m, L)
//   backward   dx_v = (dlogp ([v == t] - p_v) - dentropy p_v (log p_v + entropy)) / temperature
// Each of the K results belongs to a row of logits. A row without an unmasked result is not read and gets gradient 0.
#pragma once

#include "dtypes.h"

namespace vlmk {

struct GatherLogps {
    VLMK_STRUCT(GatherLogps);
    VLMK_FIELD(const void*, logits);  // row n at (n / inner) * stride_outer + (n % inner) * stride_inner elements
    VLMK_FIELD(DType, dtype);
    VLMK_FIELD(int64_t, num_rows);     // N
    VLMK_FIELD(int64_t, num_results);  // K
    VLMK_FIELD(int64_t, vocab);        // V
    VLMK_FIELD(int64_t, inner);
    VLMK_FIELD(int64_t, stride_outer);
    VLMK_FIELD(int64_t, stride_inner);
    VLMK_FIELD(const int64_t*, targets);  // (K,)
    VLMK_FIELD(const bool*, mask);        // (K,): which results to compute; null: all
    VLMK_FIELD(float, temperature);

    // Forward pass.
    VLMK_FIELD(const int64_t*, rows);  // (K,): the row of each result; null: result k is row k
    VLMK_FIELD(float*, logp);          // (K,)
    VLMK_FIELD(float*, entropy);       // (K,), input of the backward pass; null: not computed
    VLMK_FIELD(float*, stats);         // (K, 2): m, L
    VLMK_FIELD(float*, partial);       // CUDA, splits > 1: (K, splits, 3) workspace
    VLMK_FIELD(int64_t, splits);       // CUDA: number of blocks per row

    // Backward pass.
    VLMK_FIELD(const float*, dlogp);      // (K,)
    VLMK_FIELD(const float*, dentropy);   // (K,); null: 0
    VLMK_FIELD(const int64_t*, offsets);  // (N + 1,): row n has results [offsets[n], offsets[n + 1]); null: row k has result k
    VLMK_FIELD(void*, dlogits);           // like logits, every row is written; may be the memory of logits
    VLMK_FIELD(int64_t, grad_stride_outer);
    VLMK_FIELD(int64_t, grad_stride_inner);
};

}  // namespace vlmk
