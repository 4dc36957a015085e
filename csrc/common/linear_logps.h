// Arguments of linear_logps and linear_grpo_loss on every device: one chunk of logits, between the matmul that computes it and
// the matmuls that consume its gradient. vlmkernels/ops/linear_logps/native.py fills them in.
//
// Let u = x, or u = softcap * tanh(x * logit_scale / softcap), and define m, L and p as in gather_logps.h with u * inverse
// instead of x / temperature. Each row passes through the enabled stages in this order:
//   read       logp = (u_t - m) inverse - L,   entropy = L - sum_v p_v (u_v - m) inverse,   stats = (m, L)
//   objective  dlogp and dentropy of the GRPO loss, from logp and entropy
//   write      dx_v = (dlogp ([v == t] - p_v) - dentropy p_v (log p_v + entropy)) inverse du_v/dx_v
// The gradient may overwrite the logits. Row k of dlogits then starts at the address of row k of the logits.
#pragma once

#include "dtypes.h"
#include "grpo_loss.h"

namespace vlmk {

struct LinearLogps {
    VLMK_STRUCT(LinearLogps);
    VLMK_FIELD(void*, logits);  // (n, V), contiguous
    VLMK_FIELD(DType, dtype);
    VLMK_FIELD(int64_t, num_rows);        // n
    VLMK_FIELD(int64_t, vocab);           // V
    VLMK_FIELD(const int64_t*, targets);  // (n,); negative: in another shard of the vocabulary, logp is -infinity
    VLMK_FIELD(float, inverse);           // 1 / temperature; logit_scale / temperature without a softcap
    VLMK_FIELD(float, softcap);           // 0: none
    VLMK_FIELD(float, logit_scale);

    // 16-bit logits are rounded, so the target's logit is computed again as hidden . weight[target] + bias. Null: it is not.
    VLMK_FIELD(const void*, hidden);   // (n, H)
    VLMK_FIELD(const void*, weight);   // (V, H)
    VLMK_FIELD(const void*, bias);     // (V,) or null
    VLMK_FIELD(DType, operand_dtype);  // of hidden, weight, bias and dlogits; as wide as dtype or narrower
    VLMK_FIELD(int64_t, width);        // H
    VLMK_FIELD(int64_t, hidden_stride);
    VLMK_FIELD(int64_t, weight_stride);  // between rows of weight
    VLMK_FIELD(int64_t, weight_step);    // between columns of weight

    VLMK_FIELD(bool, read);
    VLMK_FIELD(float*, logp);     // (n,)
    VLMK_FIELD(float*, entropy);  // (n,)
    VLMK_FIELD(float*, stats);    // (n, 2): m, L

    VLMK_FIELD(bool, objective);  // false: dlogp and dentropy are inputs
    VLMK_FIELD(GrpoVariant, variant);
    VLMK_FIELD(const float*, old_logp);  // (n,) or null, as in grpo_loss.h
    VLMK_FIELD(const float*, ref_logp);
    VLMK_FIELD(const float*, rollout_logp);
    VLMK_FIELD(const float*, masked_logp);
    VLMK_FIELD(const float*, advantages);
    VLMK_FIELD(const float*, share);   // (n,): weight of the token
    VLMK_FIELD(float, entropy_scale);  // dentropy of every token

    VLMK_FIELD(bool, write);
    VLMK_FIELD(void*, dlogits);           // (n, V) of operand_dtype; may be the memory of logits
    VLMK_FIELD(int64_t, dlogits_stride);  // between rows, in elements
    VLMK_FIELD(const float*, dlogp);      // (n,)
    VLMK_FIELD(const float*, dentropy);   // (n,); null: 0
};

// Calls f(T{}, Out{}) with the types of the logits and of their gradient.
template <class Function>
void with_dtypes(const LinearLogps& p, Function f) {
    with_dtype(p.dtype, [&](auto x) {
        if constexpr (sizeof(x) == sizeof(float)) {
            with_dtype(p.operand_dtype, [&](auto out) { f(x, out); });
        } else {
            f(x, x);
        }
    });
}

}  // namespace vlmk
