// Arguments of linear_kl on every device: one chunk of the logits of student and teacher, between the matmuls that compute them
// and the matmuls that consume the gradient of the student's. vlmkernels/ops/linear_kl/native.py fills them in.
//
// Of each side let u = x, or u = softcap * tanh(x * logit_scale / softcap), m the maximum of u or slightly less,
// L = log sum_v exp((u_v - m) inverse), and p_v (of the student) or q_v (of the teacher) = exp((u_v - m) inverse - L). Each row
// passes through the enabled stages in this order:
//   read   D and K of divergence.py;  stats = (m, L of the student, m, L of the teacher, K)
//   write  dx_v = upstream G_v inverse du_v/dx_v, with G of divergence.py
// The gradient may overwrite the student's logits. Row k of dlogits then starts at the address of row k of the logits.
#pragma once

#include "dtypes.h"

namespace vlmk {

struct LinearKlSide {
    VLMK_STRUCT(LinearKlSide);
    VLMK_FIELD(const void*, logits);  // (n, V), contiguous
    VLMK_FIELD(DType, dtype);
    VLMK_FIELD(float, inverse);  // 1 / temperature; logit_scale / temperature without a softcap
    VLMK_FIELD(float, softcap);  // 0: none
    VLMK_FIELD(float, logit_scale);
};

struct LinearKl {
    VLMK_STRUCT(LinearKl);
    VLMK_FIELD(LinearKlSide, student);
    VLMK_FIELD(LinearKlSide, teacher);
    VLMK_FIELD(int64_t, num_rows);  // n
    VLMK_FIELD(int64_t, vocab);     // V
    VLMK_FIELD(float, beta);        // 0: KL(q || p); 1: KL(p || q); between: generalized Jensen-Shannon divergence

    VLMK_FIELD(bool, read);
    VLMK_FIELD(float*, divergence);  // (n,)
    VLMK_FIELD(float*, stats);       // (n, 5)

    VLMK_FIELD(bool, write);
    VLMK_FIELD(void*, dlogits);           // (n, V); may be the memory of the student's logits
    VLMK_FIELD(DType, gradient_dtype);    // as wide as the student's dtype or narrower
    VLMK_FIELD(int64_t, dlogits_stride);  // between rows, in elements
    VLMK_FIELD(const float*, upstream);   // (n,)
};

}  // namespace vlmk
