// group_advantages on a GPU: one group per warp. Statistics of the batch are computed by a single block, in the same launch.
#pragma once

#include "../common/dtypes.h"
#include "../common/group_advantages.h"
#include "launch.h"
#include "vec.h"

namespace vlmk::cuda {

// The threads of a block if groups are independent, and if one block serves the whole batch.
constexpr int kGroupThreads = 128;
constexpr int kBatchThreads = 1024;
constexpr int64_t kGroupBlocks = 4096;  // at most

VLMK_DEVICE bool is_nan(float x) { return x != x; }

VLMK_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

struct Moments {
    float count, mean, std;
    float best, second, least;  // second: the greatest without one occurrence of best

    VLMK_DEVICE bool equal() const { return best <= least || count == 0.0f; }
    // x - mean; exactly 0 if all values are equal.
    VLMK_DEVICE float center(float x) const { return equal() ? 0.0f : x - mean; }
    // Infinite if all values are equal, so that eps = 0 does not give 0 / 0.
    VLMK_DEVICE float divisor(float eps) const { return std == 0.0f ? kInfinity : std + eps; }
};

// The moments of value(i) for i in [begin, end), in every lane of the warp. NaN is left out.
template <class Value>
VLMK_DEVICE Moments moments_of(int64_t begin, int64_t end, Value value) {
    Moments m{0.0f, 0.0f, 0.0f, -kInfinity, -kInfinity, kInfinity};
    float sum = 0.0f, squares = 0.0f;
    for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
        float x = value(i);
        if (is_nan(x)) continue;
        m.count += 1.0f;
        sum += x;
        m.second = fmaxf(m.second, fminf(x, m.best));
        m.best = fmaxf(m.best, x);
        m.least = fminf(m.least, x);
    }
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        float best = __shfl_xor_sync(0xffffffffu, m.best, lane), second = __shfl_xor_sync(0xffffffffu, m.second, lane);
        m.second = fmaxf(fminf(m.best, best), fmaxf(m.second, second));
        m.best = fmaxf(m.best, best);
        m.least = fminf(m.least, __shfl_xor_sync(0xffffffffu, m.least, lane));
    }
    m.count = warp_sum(m.count);
    sum = warp_sum(sum);
    m.mean = m.count > 0.0f ? sum / m.count : 0.0f;
    for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
        float x = value(i);
        if (!is_nan(x)) squares += (x - m.mean) * (x - m.mean);
    }
    squares = warp_sum(squares);
    m.std = m.equal() ? 0.0f : sqrtf(squares / (m.count - 1.0f));
    return m;
}

VLMK_DEVICE float advantage_of(float r, const Moments& group, GroupBaseline baseline) {
    if (baseline == GroupBaseline::mean) return group.center(r);
    if (baseline == GroupBaseline::leave_one_out) return group.center(r) * group.count / fmaxf(group.count - 1.0f, 1.0f);
    if (baseline == GroupBaseline::pass_at_k) return group.count > 1.0f && r == group.best ? group.best - group.second : 0.0f;
    return r;
}

// a + b, where NaN stands for an empty sum.
VLMK_DEVICE float sum_of(float a, float b) { return is_nan(a) ? b : is_nan(b) ? a : a + b; }

VLMK_HD bool needs_batch(const GroupAdvantages& p) { return p.normalize_first || p.scale == GroupScale::batch; }

// Grid: (1,) if needs_batch(p), else any.
__global__ void __launch_bounds__(kBatchThreads) group_advantages_kernel(const __grid_constant__ GroupAdvantages p) {
    auto start = [&](int64_t g) {
        return p.offsets != nullptr ? static_cast<int64_t>(p.offsets[g]) : g * (p.num / p.num_groups);
    };
    auto weight = [&](int64_t k) { return p.weights != nullptr ? p.weights[k] : 1.0f; };
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    // The sums to normalize over the batch: `total`, or with normalize_first the intermediate sums in `advantages`.
    float* sums = p.normalize_first ? p.advantages : p.total;

    for (int64_t g = blockIdx.x * warps + threadIdx.x / 32; g < p.num_groups; g += gridDim.x * warps) {
        for (int64_t i = start(g) + lane; i < start(g + 1); i += 32) {  // each lane reads only its own elements again
            float r = kNaN;
            for (int64_t k = 0; k < p.functions; ++k) r = sum_of(r, weight(k) * p.rewards[i * p.functions + k]);
            p.total[i] = r;
            if (p.normalize_first) p.advantages[i] = kNaN;
        }
        Moments group = moments_of(start(g), start(g + 1), [&](int64_t i) { return p.total[i]; });
        for (int64_t i = start(g) + lane; i < start(g + 1); i += 32) {
            p.mean[i] = group.mean;
            p.std[i] = group.std;
            p.degenerate[i] = group.equal();
            if (p.normalize_first) continue;
            float r = p.total[i], divisor = p.scale == GroupScale::group ? group.divisor(p.eps) : 1.0f;
            p.advantages[i] = is_nan(r) ? 0.0f : advantage_of(r, group, p.baseline) / divisor;
        }
        if (!p.normalize_first) continue;
        for (int64_t k = 0; k < p.functions; ++k) {
            auto reward = [&](int64_t i) { return p.rewards[i * p.functions + k]; };
            Moments of_function = moments_of(start(g), start(g + 1), reward);
            for (int64_t i = start(g) + lane; i < start(g + 1); i += 32) {
                float x = reward(i), z = weight(k) * of_function.center(x) / of_function.divisor(p.eps);
                if (!is_nan(x)) p.advantages[i] = sum_of(p.advantages[i], z);
            }
        }
    }
    if (!needs_batch(p)) return;
    __syncthreads();
    // Every warp computes the moments of the batch, with the same result.
    Moments batch = moments_of(0, p.num, [&](int64_t i) { return sums[i]; });
    __syncthreads();
    for (int64_t i = threadIdx.x; i < p.num; i += blockDim.x) {
        float divisor = batch.divisor(p.eps);
        if (p.normalize_first) {
            p.advantages[i] = is_nan(sums[i]) ? 0.0f : batch.center(sums[i]) / divisor;
        } else {
            p.advantages[i] /= divisor;
        }
    }
}

}  // namespace vlmk::cuda
