// Arguments of group_advantages on every device, filled in by vlmkernels/ops/group_advantages/native.py.
//
// Of the completions of a group that were scored: r = sum_k weight_k reward_k, NaN left out;
//   A = (r - baseline) / (standard deviation of the group or the batch + eps), 0 where the r that it is of do not differ.
// With normalize_first, r is the weighted sum of each function's normalised rewards and A is normalised in the batch.
#pragma once

#include <cstdint>

namespace vlmk {

enum GroupScale { kScaleNone, kScaleGroup, kScaleBatch };
enum GroupBaseline { kBaselineNone, kBaselineMean, kBaselineLeaveOneOut, kBaselinePassAtK };

struct GroupAdvantages {
    int64_t num;            // N
    int64_t functions;      // R
    int64_t num_groups;     // K
    const int32_t* starts;  // (K + 1,): group g is [starts[g], starts[g + 1]); null: groups of N / K
    const float* rewards;   // (N, R), NaN: not scored
    const float* weights;   // (R,), or null: 1
    int32_t scale;
    int32_t baseline;
    bool normalize_first;
    float eps;

    float* advantages;  // (N,)
    float* total;       // (N,): r; NaN where nothing was scored
    float* mean;        // (N,): of the group
    float* std;         // (N,)
    bool* degenerate;   // (N,): the group's r do not differ
};

}  // namespace vlmk
