// Arguments of group_advantages on every device. vlmkernels/ops/group_advantages/native.py fills them in.
//
// With r = sum_k weight_k reward_k over the rewards that are not NaN,
//   A = (r - baseline) / (std + eps),   where std is the standard deviation over the group or the batch.
// A is 0 for a completion without a reward, and where all r of the group or batch are equal. With normalize_first, r is the
// weighted sum of rewards that are normalized over the group per reward function, and A is r normalized over the batch.
#pragma once

#include "fields.h"

namespace vlmk {

VLMK_ENUM(GroupScale, none, group, batch)
VLMK_ENUM(GroupBaseline, none, mean, leave_one_out, pass_at_k)

struct GroupAdvantages {
    VLMK_STRUCT(GroupAdvantages);
    VLMK_FIELD(int64_t, num);             // N
    VLMK_FIELD(int64_t, functions);       // R
    VLMK_FIELD(int64_t, num_groups);      // K
    VLMK_FIELD(const int32_t*, offsets);  // (K + 1,): group g is [offsets[g], offsets[g + 1]); null: every group has N / K
    VLMK_FIELD(const float*, rewards);    // (N, R); NaN: no reward
    VLMK_FIELD(const float*, weights);    // (R,); null: 1
    VLMK_FIELD(GroupScale, scale);
    VLMK_FIELD(GroupBaseline, baseline);
    VLMK_FIELD(bool, normalize_first);
    VLMK_FIELD(float, eps);

    VLMK_FIELD(float*, advantages);  // (N,)
    VLMK_FIELD(float*, total);       // (N,): r; NaN: no reward
    VLMK_FIELD(float*, mean);        // (N,): mean of r over the group
    VLMK_FIELD(float*, std);         // (N,): standard deviation of r over the group
    VLMK_FIELD(bool*, degenerate);   // (N,): whether all r of the group are equal
};

}  // namespace vlmk
