// grpo_loss on a GPU: one block per sequence, then one block for the batch. Formulas: common/surrogate.h.
#pragma once

#include "grpo.cuh"

namespace vlmk::cuda {

constexpr int kGrpoThreads = 512;
constexpr int kGrpoWarps = kGrpoThreads / 32;

// Merges the values of a column of two parts, and the value of an empty part.
VLMK_DEVICE float merge_column(int column, float a, float b) {
    if (column == GrpoColumn::ratio_min || column == GrpoColumn::low_min) return fminf(a, b);
    if (column == GrpoColumn::ratio_max || column == GrpoColumn::high_max) return fmaxf(a, b);
    return a + b;
}
VLMK_DEVICE float empty_column(int column) {
    return column == GrpoColumn::ratio_min || column == GrpoColumn::low_min    ? kInfinity
           : column == GrpoColumn::ratio_max || column == GrpoColumn::high_max ? -kInfinity
                                                                               : 0.0f;
}
VLMK_DEVICE float merge_warp(int column, float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = merge_column(column, x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Merges columns[c] over the threads of the block; every thread gets the results.
template <int kCount>
VLMK_DEVICE void merge_block(const int (&names)[kCount], float (&columns)[kCount]) {
    VLMK_SHARED(float, of_warp, kGrpoWarps* kCount);
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // wait for the last reader of this memory
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        float x = merge_warp(names[c], columns[c]);
        if (lane == 0) of_warp[c * kGrpoWarps + warp] = x;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        columns[c] = merge_warp(names[c], lane < kGrpoWarps ? of_warp[c * kGrpoWarps + lane] : empty_column(names[c]));
    }
}

// The tensors of a sequence.
struct Rows {
    int64_t begin, size;  // its tokens in dlogp and dentropy
    const float *logp, *old_logp, *ref_logp, *rollout_logp, *masked_logp, *entropy, *advantages;
    const bool* loss_mask;
    float advantage;  // if there is one per sequence
};

template <class T>
VLMK_DEVICE const T* row_of(const T* data, int64_t offset) {
    return data == nullptr ? data : data + offset;
}

VLMK_DEVICE Rows rows_of(const GrpoLoss& p, int64_t s) {
    bool packed = p.cu_seqlens != nullptr;
    int64_t length = p.num_tokens / p.num_sequences, begin = s * length;
    if (packed) {
        // Clamped, so that invalid offsets do not read or write outside of the tensors.
        begin = max(int64_t{0}, min(static_cast<int64_t>(p.cu_seqlens[s]), p.num_tokens));
        length = max(begin, min(static_cast<int64_t>(p.cu_seqlens[s + 1]), p.num_tokens)) - begin;
    }
    auto offset = [&](int64_t stride) { return packed ? begin : s * stride; };
    Rows r;
    r.begin = begin;
    r.size = length;
    r.logp = row_of(p.logp, offset(p.logp_stride));
    r.old_logp = row_of(p.old_logp, offset(p.old_logp_stride));
    r.ref_logp = row_of(p.ref_logp, offset(p.ref_logp_stride));
    r.rollout_logp = row_of(p.rollout_logp, offset(p.rollout_logp_stride));
    r.masked_logp = row_of(p.masked_logp, offset(p.masked_logp_stride));
    r.entropy = row_of(p.entropy, offset(p.entropy_stride));
    r.loss_mask = row_of(p.loss_mask, offset(p.loss_mask_stride));
    r.advantages = p.advantage_per_token ? p.advantages + offset(p.advantages_stride) : nullptr;
    r.advantage = p.advantage_per_token ? 0.0f : p.advantages[s * p.advantages_stride];
    return r;
}

VLMK_DEVICE Token<float, bool> load_token(const Rows& r, int64_t i) {
    Token<float, bool> t{};
    t.loss_mask = r.loss_mask == nullptr || r.loss_mask[i];
    if (!t.loss_mask) return t;
    auto read = [&](const float* data, float otherwise) { return data == nullptr ? otherwise : at_least(data[i], kMinLogp); };
    t.logp = at_least(r.logp[i], kMinLogp);
    t.old_logp = read(r.old_logp, t.logp);
    t.ref_logp = read(r.ref_logp, t.logp);
    t.rollout_logp = read(r.rollout_logp, t.old_logp);
    t.masked_logp = read(r.masked_logp, t.logp);
    t.entropy = r.entropy == nullptr ? 0.0f : r.entropy[i];
    t.adv = r.advantages == nullptr ? r.advantage : r.advantages[i];
    return t;
}

template <class Surrogate>
VLMK_DEVICE Sequence read_sequence(const Rows& r, const GrpoLoss& p) {
    const GrpoVariant& v = p.variant;
    SequenceSums<float> sums;
    if (needs_sums<Surrogate>(v)) {
        for (int64_t i = threadIdx.x; i < r.size; i += kGrpoThreads) add<Surrogate>(sums, load_token(r, i), v);
    } else {
        for (int64_t i = threadIdx.x; i < r.size; i += kGrpoThreads)
            sums.tokens += r.loss_mask == nullptr || r.loss_mask[i] ? 1.0f : 0.0f;
    }
    const int names[5] = {GrpoColumn::loss, GrpoColumn::loss, GrpoColumn::loss, GrpoColumn::loss, GrpoColumn::loss};
    float columns[5] = {sums.tokens, sums.log_ratio, sums.log_weight, sums.rollout_log_ratio, sums.drift};
    merge_block(names, columns);
    return sequence_of({columns[0], columns[1], columns[2], columns[3], columns[4]}, p);
}

// Writes the gradient, not yet multiplied by policy_scale, and the columns of the sequence.
// Grid: (S,), one block per sequence.
template <class Surrogate>
__global__ void __launch_bounds__(kGrpoThreads) grpo_loss_kernel(const __grid_constant__ GrpoLoss p) {
    const GrpoVariant& v = p.variant;
    Rows r = rows_of(p, blockIdx.x);
    Sequence q = read_sequence<Surrogate>(r, p);
    float threshold = p.entropy_threshold == nullptr ? -kInfinity : *p.entropy_threshold;
    float* dlogp = p.dlogp + r.begin;

    const int names[12] = {GrpoColumn::loss,    GrpoColumn::low,       GrpoColumn::high,         GrpoColumn::kl,
                           GrpoColumn::entropy, GrpoColumn::kept,      GrpoColumn::kept_entropy, GrpoColumn::ratio,
                           GrpoColumn::rollout, GrpoColumn::effective, GrpoColumn::ratio_min,    GrpoColumn::ratio_max};
    float columns[12];
#pragma unroll
    for (int c = 0; c < 12; ++c) columns[c] = empty_column(names[c]);
    const int masked_names[4] = {GrpoColumn::masked_kl, GrpoColumn::masked_entropy, GrpoColumn::masked_clipped,
                                 GrpoColumn::masked_tokens};
    float masked[4] = {};
    float through_ratio[1] = {0.0f};
    for (int64_t i = threadIdx.x; i < r.size; i += kGrpoThreads) {
        Token<float, bool> t = load_token(r, i);
        TokenTerms<float> terms = token_terms<Surrogate, false, true>(t, q, threshold, v);
        float gradient = terms.direct;
        if (v.sequence_level) {
            through_ratio[0] += terms.through_ratio;
        } else {
            gradient += terms.through_ratio;
        }
        dlogp[i] = gradient * q.share;
        if (p.dentropy != nullptr) p.dentropy[r.begin + i] = terms.kept;
        if (p.dmasked != nullptr) {
            const PerceptionTerm<float>& term = terms.perception;
            p.dmasked[r.begin + i] = term.dmasked * q.share;
            masked[0] += term.kl;
            masked[1] += term.entropy;
            masked[2] += term.clipped;
            masked[3] += term.seen;
        }
        const float added[12] = {terms.value * q.share,
                                 terms.low,
                                 terms.high,
                                 terms.kl,
                                 t.entropy,
                                 terms.kept,
                                 terms.kept * t.entropy,
                                 terms.ratio,
                                 terms.rollout,
                                 terms.effective,
                                 t.loss_mask ? terms.ratio : kInfinity,
                                 terms.ratio};
#pragma unroll
        for (int c = 0; c < 12; ++c) columns[c] = merge_column(names[c], columns[c], added[c]);
    }
    merge_block(names, columns);
    if (p.dmasked != nullptr) merge_block(masked_names, masked);
    if (threadIdx.x == 0) {
        float* out = p.partial + static_cast<int64_t>(blockIdx.x) * GrpoColumn::count;
#pragma unroll
        for (int c = 0; c < 12; ++c) out[names[c]] = columns[c];
#pragma unroll
        for (int c = 0; c < 4; ++c) out[masked_names[c]] = masked[c];
        float units = q.tokens;
        if ((v.sequence_level || Surrogate::kSequenceWeight) && !p.advantage_per_token) {
            Term<float> term = Surrogate::term(0.0f, q.ratio, q.log_weight, r.advantage, v);
            out[GrpoColumn::low] = term.low;
            out[GrpoColumn::high] = term.high;
            units = 1.0f;
        }
        out[GrpoColumn::tokens] = q.tokens;
        out[GrpoColumn::units] = units;
        out[GrpoColumn::low_min] = units > 0.0f ? out[GrpoColumn::low] / units : kInfinity;
        out[GrpoColumn::high_max] = units > 0.0f ? out[GrpoColumn::high] / units : -kInfinity;
    }
    if (!v.sequence_level) return;
    const int sum[1] = {GrpoColumn::loss};
    merge_block(sum, through_ratio);
    float spread = ratio_of(through_ratio[0], q.tokens) * q.share;
    for (int64_t i = threadIdx.x; i < r.size; i += kGrpoThreads) {
        if (r.loss_mask == nullptr || r.loss_mask[i]) dlogp[i] += spread;
    }
}

// Writes the loss and the statistics.
// Grid: (1,). A warp reduces a column.
__global__ void __launch_bounds__(kGrpoThreads) grpo_loss_finish_kernel(const __grid_constant__ GrpoLoss p) {
    VLMK_SHARED(float, totals, GrpoColumn::count);
    for (int column = threadIdx.x / 32; column < GrpoColumn::count; column += kGrpoWarps) {
        float x = empty_column(column);
        for (int64_t s = threadIdx.x % 32; s < p.num_sequences; s += 32) {
            x = merge_column(column, x, p.partial[s * GrpoColumn::count + column]);
        }
        x = merge_warp(column, x);
        if (threadIdx.x % 32 == 0) totals[column] = x;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total[GrpoColumn::count];
#pragma unroll
    for (int c = 0; c < GrpoColumn::count; ++c) total[c] = totals[c];
    finish(p, total, p.loss, p.stats);
}

}  // namespace vlmk::cuda
