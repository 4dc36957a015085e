// Arguments of linear_logps and linear_grpo_loss on every device, filled in by vlmkernels/ops/linear_logps/native.py: a chunk
// of logits between two GEMMs.
//
// With u = x, or softcap * tanh(x * logit_scale / softcap), z = u * inverse and m, L, p of gather_logps.h with z for x /
// temperature:
//   read       logp = (u_t - m) inverse - L,   entropy = L - sum_v p_v (u_v - m) inverse,   stats = (m, L)
//   objective  dlogp and dentropy of the token, from its logp and entropy
//   write      dx_v = (dlogp ([v == t] - p_v) - dentropy p_v (log p_v + entropy)) inverse du_v/dx_v
// Each row passes through the enabled stages in this order. The gradient may overwrite the logits: row k of dlogits then starts
// where row k of the logits does.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "grpo_loss.h"

namespace vlmk {

struct LinearLogps {
    void* logits;  // (n, V), contiguous
    DType dtype;
    int64_t num_rows;        // n
    int64_t vocab;           // V
    const int64_t* targets;  // (n,); below 0: in another part of the vocabulary, where logp is -infinity
    float inverse;
    float softcap;  // 0: none
    float logit_scale;

    // Where the logits are rounded to 16 bits the target's is computed anew, hidden . weight[target] + bias; null: it is not.
    const void* hidden;     // (n, H)
    const void* weight;     // (V, H)
    const void* bias;       // (V,) or null
    DType operand_dtype;    // of these, and of the gradient: as wide as the logits or narrower
    int64_t width;          // H
    int64_t hidden_stride;  // of a row; a column follows the other
    int64_t weight_stride;
    int64_t weight_step;  // of a column

    bool read;
    float* logp;     // (n,)
    float* entropy;  // (n,)
    float* stats;    // (n, 2): m, L

    bool objective;  // else dlogp and dentropy are given
    GrpoVariant variant;
    const float* old_logp;  // (n,) each, or null: as in grpo_loss.h
    const float* ref_logp;
    const float* rollout_logp;
    const float* advantages;
    const float* share;   // (n,): the weight of the token
    float entropy_scale;  // dentropy

    bool write;
    void* dlogits;           // (n, V), in operand_dtype; may share the memory of logits
    int64_t dlogits_stride;  // of a row, in elements
    const float* dlogp;      // (n,)
    const float* dentropy;   // (n,) or null: 0
};

}  // namespace vlmk
