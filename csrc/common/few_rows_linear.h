// Arguments of few_rows_linear. vlmkernels/ops/few_rows_linear/native.py fills them in.
//
//   out_mn = sum_k x_mk weight_nk + bias_n
#pragma once

#include "dtypes.h"

namespace vlmk {

struct FewRowsLinear {
    VLMK_STRUCT(FewRowsLinear);
    VLMK_FIELD(const float*, x);  // (rows, width); strides are in elements
    VLMK_FIELD(int64_t, stride_x);
    VLMK_FIELD(const float*, weight);  // (outputs, width)
    VLMK_FIELD(int64_t, stride_weight);
    VLMK_FIELD(const float*, bias);  // (outputs), or null
    VLMK_FIELD(float*, out);         // (rows, outputs), contiguous
    VLMK_FIELD(int64_t, rows);
    VLMK_FIELD(int64_t, outputs);
    VLMK_FIELD(int64_t, width);
};

}  // namespace vlmk
