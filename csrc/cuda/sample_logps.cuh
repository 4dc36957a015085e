// sample_logps on a GPU. One kernel reads each row once, with one warp per block of tokens, so that even a few rows fill the
// GPU. A second kernel, with one block of threads per row, finds the thresholds of the filters, chooses a block of tokens by
// its sum, and draws within it. Formulas: common/sample_logps.h.
#pragma once

#include "../common/sample_logps.h"
#include "softmax.cuh"

namespace vlmk::cuda {

constexpr int kDrawThreads = 256;
constexpr int kDrawWarps = kDrawThreads / 32;
constexpr int kPerLane = kTokenBlock / 32;
constexpr float kLeastExponent = -126;  // a smaller e counts as 0
constexpr float kLeastFloat = std::numeric_limits<float>::lowest();
constexpr int kNoToken = std::numeric_limits<int>::min();

// The sums of a block of tokens in `workspace`.
struct BlockSums {
    float top;  // the greatest score
    float s;    // sum of 2^((s_v - top) c); with filters, over scores above the threshold, relative to the row's maximum
    float m, full, full_y;  // the softmax of the logits
    float ties;             // with filters: the number of scores equal to the threshold
};
static_assert(sizeof(BlockSums) == 6 * sizeof(float));

VLMK_HD int64_t blocks_of(const SampleLogps& p) { return (p.vocab + kTokenBlock - 1) / kTokenBlock; }

VLMK_DEVICE BlockSums* sums_of_row(const SampleLogps& p, int64_t n) {
    return reinterpret_cast<BlockSums*>(p.workspace) + n * blocks_of(p);
}

// A row of logits and what turns them into scores.
template <class T>
struct ScoredRow {
    const T* x;
    const bool* seen;
    const bool* banned;
    float penalty;
    uint32_t vocab;
    bool valid;  // whether banned_rows is in range

    VLMK_DEVICE ScoredRow(const SampleLogps& p, int64_t n)
        : x(static_cast<const T*>(p.logits) + n * p.stride),
          seen(p.seen == nullptr ? nullptr : p.seen + n * p.seen_stride),
          banned(p.banned),
          penalty(p.repetition_penalty),
          vocab(static_cast<uint32_t>(p.vocab)),
          valid(true) {
        if (p.banned_rows == nullptr) return;
        int64_t table = p.banned_rows[n];
        valid = 0 <= table && table < p.num_banned;
        banned = valid ? banned + table * p.vocab : nullptr;
    }

    VLMK_DEVICE float score(float logit, bool is_seen, bool is_banned) const {
        if (is_seen) logit = logit < 0.0f ? logit * penalty : logit / penalty;
        return is_banned ? -kInfinity : logit;
    }
    VLMK_DEVICE float score_at(uint32_t v) const {
        if (v >= vocab) return -kInfinity;
        return score(load_one(x + v), seen != nullptr && seen[v], banned != nullptr && banned[v]);
    }
};

// The bools from v on, one per bit; 0 from `count` on.
template <int kCount>
VLMK_DEVICE uint32_t load_bits(const bool* mask, uint32_t v, uint32_t count) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(mask) + v;
    uint32_t bits = 0;
    if (count == kCount && reinterpret_cast<uintptr_t>(bytes) % kCount == 0) {
#pragma unroll
        for (int word = 0; word < kCount / 4; ++word) {
            uint32_t four = __ldg(reinterpret_cast<const uint32_t*>(bytes) + word);
#pragma unroll
            for (int i = 0; i < 4; ++i) bits |= (four >> (8 * i) & 1u) << (4 * word + i);
        }
        return bits;
    }
    for (uint32_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(__ldg(bytes + i) & 1u) << i;
    return bits;
}

// The tokens of a lane in a block of tokens. Vectors are interleaved: element i of a lane is not token i.
template <class T>
struct LaneTokens {
    float x[kPerLane];  // -infinity beyond the vocabulary
    uint32_t seen = 0, banned = 0;

    VLMK_DEVICE LaneTokens(const ScoredRow<T>& row, uint32_t begin) {
        bool aligned = reinterpret_cast<uintptr_t>(row.x) % 16 == 0;  // the block begins at a multiple of 16 bytes
#pragma unroll
        for (int j = 0; j < kPerLane / kVec<T>; ++j) {
            uint32_t v = begin + (j * 32 + threadIdx.x % 32) * kVec<T>;
            uint32_t count = v < row.vocab ? min(row.vocab - v, static_cast<uint32_t>(kVec<T>)) : 0;
            float values[kVec<T>];
            if (aligned && count == kVec<T>) {
                unpack<T>(load_cached(row.x, v / kVec<T>), values);
            } else {
#pragma unroll
                for (int i = 0; i < kVec<T>; ++i)
                    values[i] = i < static_cast<int>(count) ? load_one(row.x + v + i) : -kInfinity;
            }
#pragma unroll
            for (int i = 0; i < kVec<T>; ++i) x[j * kVec<T> + i] = values[i];
            if (row.seen != nullptr) seen |= load_bits<kVec<T>>(row.seen, v, count) << (j * kVec<T>);
            if (row.banned != nullptr) banned |= load_bits<kVec<T>>(row.banned, v, count) << (j * kVec<T>);
        }
    }

    VLMK_DEVICE float score(const ScoredRow<T>& row, int i) const { return row.score(x[i], seen >> i & 1, banned >> i & 1); }
};

VLMK_DEVICE float max_warp(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lane));
    return x;
}
template <class V>
VLMK_DEVICE V sum_warp(V x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
    return x;
}

// 2^y, or 0 if it is too small.
VLMK_DEVICE float exp2_or_zero(float y) { return y < kLeastExponent ? 0.0f : exp2_approx(y); }

// Grid: (ceil(N * blocks_of(p) / kWarps),), one warp per block of tokens.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) sample_sums_kernel(const __grid_constant__ SampleLogps p, float scale) {
    int64_t blocks = blocks_of(p), index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (index >= p.num_rows * blocks) return;
    int64_t n = index / blocks;
    ScoredRow<T> row(p, n);
    LaneTokens<T> tokens(row, static_cast<uint32_t>(index - n * blocks) * kTokenBlock);
    bool plain = row.seen == nullptr && row.banned == nullptr;

    float m = kLeastFloat;  // finite, so that -infinity - m is -infinity
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) m = fmaxf(m, tokens.x[i]);
    m = max_warp(m);
    Softmax full;
    add<true>(full, tokens.x, m, scale);
    float top = m, s = full.s;
    if (!plain) {
        top = kLeastFloat;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, tokens.score(row, i));
        top = max_warp(top);
        s = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) s += exp2_approx((tokens.score(row, i) - top) * scale);
    }
    full.s = sum_warp(full.s);
    full.sy = sum_warp(full.sy);
    s = sum_warp(s);
    if (threadIdx.x % 32 != 0) return;
    // No score is possible in a block whose greatest is -infinity.
    bool possible = s > 0.0f || s != s;
    reinterpret_cast<BlockSums*>(p.workspace)[index] = {possible ? top : -kInfinity, s,       m,
                                                        row.valid ? full.s : kNaN,   full.sy, 0};
}

// The sum of x over the block of threads; every thread gets it.
template <class V>
VLMK_DEVICE V sum_all(V x) {
    VLMK_SHARED(V, of_warp, kDrawWarps);
    x = sum_warp(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    V total = 0;
#pragma unroll
    for (int warp = 0; warp < kDrawWarps; ++warp) total += of_warp[warp];
    __syncthreads();
    return total;
}

// The greatest x over the block of threads; every thread gets it.
template <class V>
VLMK_DEVICE V max_all(V x) {
    VLMK_SHARED(V, of_warp, kDrawWarps);
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        V other = __shfl_xor_sync(kFullWarp, x, lane);
        x = other > x ? other : x;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kDrawWarps; ++warp) x = of_warp[warp] > x ? of_warp[warp] : x;
    __syncthreads();
    return x;
}

// The sum of x over the threads before this one, and over all threads.
template <class V>
VLMK_DEVICE V sum_before(V x, V& total) {
    VLMK_SHARED(V, of_warp, kDrawWarps);
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        V other = __shfl_up_sync(kFullWarp, x, step);
        if (lane >= step) x += other;
    }
    if (lane == 31) of_warp[warp] = x;
    V before = __shfl_up_sync(kFullWarp, x, 1);
    if (lane == 0) before = 0;
    __syncthreads();
    V sum = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < kDrawWarps; ++w) {
        if (w == static_cast<int>(warp)) sum = total;
        total += of_warp[w];
    }
    __syncthreads();
    return sum + before;
}

// Unsigned integers in the order of the floats, and back. -0 equals 0.
VLMK_DEVICE uint32_t ordered(float x) {
    uint32_t bits = float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
VLMK_DEVICE float unordered(uint32_t key) { return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The greatest x in [low, high] with weight(x) >= need, where weight(x) is a sum over scores >= x; `low` if there is none. The
// search fixes one bit per step. Scores differ only in the bits from `last_bit` on.
template <class Weight>
VLMK_DEVICE float greatest_with(double need, float low, float high, int last_bit, Weight weight) {
    uint32_t lowest = ordered(low), key = ordered(high), unknown = lowest ^ key;
    int bits = 0;
    while (unknown >> bits != 0 && bits < 31) ++bits;
    if (unknown >> 31 != 0) bits = 32;
    key = bits == 32 ? 0 : key >> bits << bits;
    for (int bit = bits - 1; bit >= last_bit; --bit) {
        uint32_t raised = key | 1u << bit;
        if (weight(unordered(raised)) >= need) key = raised;
    }
    // The lower bits of a negative score are ones in its key.
    if (last_bit > 0 && !(key & 0x80000000u)) key |= (1u << last_bit) - 1;
    return unordered(min(max(key, lowest), ordered(high)));
}

// The filters' threshold.
struct Threshold {
    float score;
    double ties;  // how many of the scores equal to it are kept
};

// A row in the second kernel.
template <class T>
struct Draw {
    const SampleLogps& p;
    ScoredRow<T> row;
    BlockSums* sums;
    uint32_t blocks;
    float scale;
    float top;  // the greatest score

    VLMK_DEVICE float e(float score) const { return exp2_or_zero((score - top) * scale); }

    // The number of scores >= pivot, or the sum of their e.
    template <bool kMass>
    VLMK_DEVICE double weight_from(float pivot) const {
        double total = 0;
        for (uint32_t b = threadIdx.x / 32; b < blocks; b += kDrawWarps) {
            if (!(sums[b].top >= pivot)) continue;
            LaneTokens<T> tokens(row, b * kTokenBlock);
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                float score = tokens.score(row, i);
                if (score >= pivot) sum += kMass ? e(score) : 1.0f;
            }
            total += sum;
        }
        return sum_all(total);
    }

    // The mass of the tokens of a block if there are no filters, relative to the row's maximum.
    VLMK_DEVICE double mass(uint32_t b) const { return static_cast<double>(sums[b].s) * e(sums[b].top); }

    VLMK_DEVICE Threshold filter() const {
        int last_bit = sizeof(T) == 4 || row.seen != nullptr ? 0 : std::is_same_v<T, bf16> ? 16 : 13;
        float threshold = kLeastFloat;
        double all = 0;
        if (p.top_k > 0) {
            double need = static_cast<double>(p.top_k);
            if (p.top_k <= blocks) {
                // At least top_k scores are at least as great as the top_k-th greatest of the blocks' maxima.
                threshold = greatest_with(need, kLeastFloat, top, last_bit, [&](float pivot) {
                    double count = 0;
                    for (uint32_t b = threadIdx.x; b < blocks; b += kDrawThreads) count += sums[b].top >= pivot;
                    return sum_all(count);
                });
            }
            threshold = greatest_with(need, threshold, top, last_bit, [&](float pivot) { return weight_from<false>(pivot); });
            if (p.removable > 0.0f) all = weight_from<true>(threshold);
        } else if (p.removable > 0.0f) {
            for (uint32_t b = threadIdx.x; b < blocks; b += kDrawThreads) all += mass(b);
            all = sum_all(all);
            // All tokens below this score together have less than the share that top_p removes.
            float least = top + (log2f(static_cast<float>(all) * p.removable / p.vocab) - 0.01f) / scale;
            threshold = fmaxf(threshold, least);
        }
        double limit = all * p.removable;
        bool by_top_p = p.removable > 0.0f;
        if (by_top_p) {
            threshold =
                greatest_with(all - limit, threshold, top, last_bit, [&](float pivot) { return weight_from<true>(pivot); });
        }
        float least = top + p.min_p_distance;
        if (least > threshold) {
            threshold = least;
            by_top_p = false;
        }
        double ties = sum_kept(threshold, by_top_p, all, limit);
        return {threshold, ties};
    }

    // Writes the sums and the ties of the blocks to `sums`, and returns how many ties are kept.
    VLMK_DEVICE double sum_kept(float threshold, bool by_top_p, double all, double limit) const {
        double above = 0, ties = 0;
        for (uint32_t b = threadIdx.x / 32; b < blocks; b += kDrawWarps) {
            float s = 0, equal = 0;
            if (sums[b].top >= threshold) {
                LaneTokens<T> tokens(row, b * kTokenBlock);
#pragma unroll
                for (int i = 0; i < kPerLane; ++i) {
                    float score = tokens.score(row, i);
                    if (score > threshold) s += e(score);
                    if (score == threshold) equal += 1.0f;
                }
                s = sum_warp(s);
                equal = sum_warp(equal);
            }
            if (threadIdx.x % 32 == 0) {
                sums[b].s = s;
                sums[b].ties = equal;
                above += s;
                ties += equal;
            }
        }
        above = sum_all(above);
        ties = sum_all(ties);
        if (!by_top_p || ties == 0) return ties;
        double each = e(threshold), below = all - above - ties * each;
        double removed = each > 0 ? floor(fmax((limit - below) / each, 0.0)) : ties;
        return ties - fmin(removed, ties - 1);
    }

    // Draws a token; `kept` becomes the sum of e over the tokens that can be sampled.
    VLMK_DEVICE uint32_t draw(double u, bool filtered, double& kept) const {
        Threshold threshold{-kInfinity, 0};
        if (filtered) threshold = filter();
        float e_tie = filtered ? e(threshold.score) : 0.0f;

        // Each thread has consecutive blocks.
        uint32_t each = (blocks + kDrawThreads - 1) / kDrawThreads, begin = threadIdx.x * each, end = min(begin + each, blocks);
        double ties = 0, all_ties = 0, own = 0;
        if (filtered) {
            for (uint32_t b = begin; b < end; ++b) ties += sums[b].ties;
            ties = sum_before(ties, all_ties);
        }
        auto mass_of = [&](uint32_t b, double ties_before) {
            if (!filtered) return mass(b);
            double count = fmin(fmax(threshold.ties - ties_before, 0.0), static_cast<double>(sums[b].ties));
            return sums[b].s + count * e_tie;
        };
        double before = ties;
        for (uint32_t b = begin; b < end; ++b) {
            own += mass_of(b, before);
            if (filtered) before += sums[b].ties;
        }
        double sum = sum_before(own, kept), below = u * kept;
        int chosen = -1;
        double chosen_sum = 0, chosen_mass = 0, chosen_ties = 0;
        before = ties;
        for (uint32_t b = begin; b < end; ++b) {
            double m = mass_of(b, before);
            if (m > 0.0 && sum <= below) {
                chosen = static_cast<int>(b);
                chosen_sum = sum;
                chosen_mass = m;
                chosen_ties = before;
            }
            sum += m;
            if (filtered) before += sums[b].ties;
        }
        VLMK_SHARED(double, shared, 2);
        int block = max_all(chosen);
        if (chosen == block && chosen >= 0) {
            shared[0] = (below - chosen_sum) / chosen_mass;
            shared[1] = chosen_ties;
        }
        __syncthreads();
        return draw_within(static_cast<uint32_t>(block), shared[0], threshold, shared[1]);
    }

    // Each thread has kTokenBlock / kDrawThreads consecutive tokens.
    VLMK_DEVICE uint32_t draw_within(uint32_t block, double u, Threshold threshold, double ties) const {
        constexpr int kCount = kTokenBlock / kDrawThreads;
        uint32_t first = block * kTokenBlock + threadIdx.x * kCount;
        float score[kCount];
        double equal = 0, total = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            score[i] = row.score_at(first + i);
            equal += score[i] == threshold.score;
        }
        ties += sum_before(equal, total);
        double own = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            bool kept = score[i] > threshold.score;
            if (score[i] == threshold.score) {
                kept = ties < threshold.ties;
                ties += 1;
            }
            score[i] = kept ? e(score[i]) : 0.0f;
            own += score[i];
        }
        double sum = sum_before(own, total), below = u * total;
        int chosen = -1;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (score[i] > 0.0f && sum <= below) chosen = static_cast<int>(first + i);
            sum += score[i];
        }
        return static_cast<uint32_t>(max_all(chosen));
    }

    // The first token with the greatest score.
    VLMK_DEVICE uint32_t greedy() const {
        int first = kNoToken;
        for (uint32_t b = threadIdx.x; b < blocks; b += kDrawThreads) {
            if (sums[b].top == top) first = max(first, -static_cast<int>(b));
        }
        uint32_t begin = static_cast<uint32_t>(-max_all(first)) * kTokenBlock;
        first = kNoToken;
        for (uint32_t v = begin + threadIdx.x; v < begin + kTokenBlock; v += kDrawThreads) {
            if (row.score_at(v) == top) first = max(first, -static_cast<int>(v));
        }
        return static_cast<uint32_t>(-max_all(first));
    }
};

// Grid: (N,).
template <class T>
__global__ void __launch_bounds__(kDrawThreads, 2) sample_draw_kernel(const __grid_constant__ SampleLogps p, float scale) {
    int64_t n = blockIdx.x;
    uint32_t blocks = static_cast<uint32_t>(blocks_of(p));
    BlockSums* sums = sums_of_row(p, n);
    float m = kLeastFloat, top = -kInfinity;
    for (uint32_t b = threadIdx.x; b < blocks; b += kDrawThreads) {
        m = fmaxf(m, sums[b].m);
        top = fmaxf(top, sums[b].top);
    }
    m = max_all(m);
    top = max_all(top);
    double full = 0, full_y = 0, finite = 0;
    for (uint32_t b = threadIdx.x; b < blocks; b += kDrawThreads) {
        float shift = max_nan((sums[b].m - m) * scale, kLowest), alpha = exp2_approx(shift);
        full += static_cast<double>(sums[b].full) * alpha;
        full_y += static_cast<double>(fmaf(sums[b].full, shift, sums[b].full_y)) * alpha;
        finite += sums[b].s;
    }
    full = sum_all(full);
    full_y = sum_all(full_y);
    finite = sum_all(finite);

    int64_t id = -1;
    double kept = 1;
    Draw<T> draw{p, ScoredRow<T>(p, n), sums, blocks, scale, top};
    bool valid = full < kInfinity && finite < kInfinity;  // false for NaN
    if (valid && top == -kInfinity) id = -2;
    if (valid && top > -kInfinity) {
        if (p.uniform == nullptr) {
            id = draw.greedy();
        } else {
            double u = fmin(fmax(p.uniform[n], 0.0), 1.0 - 0x1p-53);  // 0 for NaN
            bool filtered = p.top_k > 0 || p.removable > 0.0f || p.min_p_distance > -kInfinity;
            id = draw.draw(u, filtered, kept);
        }
    }
    if (threadIdx.x != 0) return;
    p.ids[n] = id;
    if (id < 0) {
        p.logps[n] = p.log_kept_mass[n] = p.entropy[n] = kNaN;
        return;
    }
    uint32_t token = static_cast<uint32_t>(id);
    double log_sum = log(full), logp = (static_cast<double>(load_one(draw.row.x + token)) - m) / p.temperature - log_sum;
    double q = (static_cast<double>(draw.row.score_at(token)) - top) / p.temperature - log(kept);
    p.logps[n] = static_cast<float>(logp);
    p.log_kept_mass[n] = static_cast<float>(p.uniform == nullptr ? logp : logp - q);
    p.entropy[n] = static_cast<float>(log_sum - full_y / full * 0.6931471805599453);
}

}  // namespace vlmk::cuda
