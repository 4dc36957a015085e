// grpo_loss on the CPU. A sequence is read once if its tokens do not depend on each other, else twice, from the cache.
#include <algorithm>
#include <vector>

#include "grpo.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kBlock = 32 * kLanes;  // tokens that are summed in fp32; blocks are summed in fp64
constexpr int64_t kPerThread = 1 << 14;  // least number of tokens per thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The tensors of a sequence.
struct Rows {
    int64_t begin, size;  // its tokens in dlogp and dentropy
    const float *logp, *old_logp, *ref_logp, *rollout_logp, *masked_logp, *entropy, *advantages;
    const bool* loss_mask;
    float advantage;  // if there is one per sequence
};

Rows rows_of(const GrpoLoss& p, int64_t s) {
    int64_t length = p.cu_seqlens != nullptr ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : p.num_tokens / p.num_sequences;
    int64_t begin = p.cu_seqlens != nullptr ? p.cu_seqlens[s] : s * length;
    auto row = [&](auto* data, int64_t stride) {
        return data == nullptr ? data : data + (p.cu_seqlens != nullptr ? begin : s * stride);
    };
    Rows r{begin,
           length,
           row(p.logp, p.logp_stride),
           row(p.old_logp, p.old_logp_stride),
           row(p.ref_logp, p.ref_logp_stride),
           row(p.rollout_logp, p.rollout_logp_stride),
           row(p.masked_logp, p.masked_logp_stride),
           row(p.entropy, p.entropy_stride),
           nullptr,
           row(p.loss_mask, p.loss_mask_stride),
           0};
    if (p.advantage_per_token) {
        r.advantages = row(p.advantages, p.advantages_stride);
    } else {
        r.advantage = p.advantages[s * p.advantages_stride];
    }
    return r;
}

// The loss mask of sixteen tokens, of which the first `left` exist, as bytes 0 and 1. Without a mask all are 1.
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <bool kWhole>
Bytes load_bytes(const bool* mask, int64_t left) {
    Bytes bytes{};
    if (mask != nullptr) {
        std::memcpy(&bytes, mask, kWhole ? kLanes : left);
    } else {
        std::memset(&bytes, 1, kWhole ? kLanes : left);
    }
    return bytes;
}

bool none(Bytes bytes) {
    uint64_t halves[2];
    std::memcpy(halves, &bytes, sizeof(halves));
    return (halves[0] | halves[1]) == 0;
}

i32 widen(Bytes bytes) {
#if defined(__AVX512F__)
    return bit_cast<i32>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bytes))) != 0;
#else
    return __builtin_convertvector(bytes, i32) != 0;
#endif
}

template <bool kWhole>
i32 load_mask(const Rows& r, int64_t i) {
    return widen(load_bytes<kWhole>(r.loss_mask == nullptr ? nullptr : r.loss_mask + i, r.size - i));
}

template <bool kWhole>
__attribute__((always_inline)) inline Token<f32, i32> load_token(const Rows& r, int64_t i) {
    Token<f32, i32> t;
    t.loss_mask = load_mask<kWhole>(r, i);
    auto read = [&](const float* data) {
        f32 x = kWhole ? load(data + i) : load_tail(data + i, r.size - i, 0.0f);
        return t.loss_mask ? x : f32{};
    };
    auto read_logp = [&](const float* data) { return at_least(read(data), kMinLogp); };
    t.logp = read_logp(r.logp);
    t.old_logp = r.old_logp == nullptr ? t.logp : read_logp(r.old_logp);
    t.ref_logp = r.ref_logp == nullptr ? t.logp : read_logp(r.ref_logp);
    t.rollout_logp = r.rollout_logp == nullptr ? t.old_logp : read_logp(r.rollout_logp);
    t.masked_logp = r.masked_logp == nullptr ? t.logp : read_logp(r.masked_logp);
    t.entropy = r.entropy == nullptr ? f32{} : read(r.entropy);
    t.adv = r.advantages == nullptr ? (t.loss_mask ? splat(r.advantage) : f32{}) : read(r.advantages);
    return t;
}

// Calls body(i, whole) for every vector of sixteen tokens in [begin, end). `whole` is false_type for an incomplete last vector.
template <class Body>
void each(int64_t begin, int64_t end, Body body) {
    for (; begin + kLanes <= end; begin += kLanes) body(begin, std::true_type{});
    if (begin < end) body(begin, std::false_type{});
}

int64_t count(const bool* mask, int64_t size) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t eight;
        std::memcpy(&eight, mask + i, 8);
        total += __builtin_popcountll(eight);
    }
    for (; i < size; ++i) total += mask[i];
    return total;
}

template <class Surrogate>
SequenceSums<float> sums_of(const Rows& r, const GrpoVariant& v) {
    SequenceSums<float> total;
    if (!needs_sums<Surrogate>(v)) {
        total.tokens = static_cast<float>(r.loss_mask == nullptr ? r.size : count(r.loss_mask, r.size));
        return total;
    }
    SequenceSums<double> sums;
    for (int64_t start = 0; start < r.size; start += kBlock) {
        SequenceSums<f32> block;
        each(start, std::min(start + kBlock, r.size),
             [&](int64_t i, auto whole) { add<Surrogate>(block, load_token<decltype(whole)::value>(r, i), v); });
        sums.tokens += hsum(block.tokens);
        sums.log_ratio += hsum(block.log_ratio);
        sums.log_weight += hsum(block.log_weight);
        sums.rollout_log_ratio += hsum(block.rollout_log_ratio);
        sums.drift += hsum(block.drift);
    }
    total.tokens = static_cast<float>(sums.tokens);
    total.log_ratio = static_cast<float>(sums.log_ratio);
    total.log_weight = static_cast<float>(sums.log_weight);
    total.rollout_log_ratio = static_cast<float>(sums.rollout_log_ratio);
    total.drift = static_cast<float>(sums.drift);
    return total;
}

template <class Surrogate, bool kPlain, bool kPerception>
void run_sequence(const GrpoLoss& p, int64_t s, double* column) {
    const GrpoVariant& v = p.variant;
    Rows r = rows_of(p, s);
    Sequence q = sequence_of(sums_of<Surrogate>(r, v), p);
    float threshold = p.entropy_threshold == nullptr ? -kInfinity : *p.entropy_threshold;
    float* dlogp = p.dlogp + r.begin;
    f32 least = splat(kInfinity), greatest = splat(-kInfinity);
    double through_ratio = 0;
    for (int64_t start = 0; start < r.size; start += kBlock) {
        f32 value{}, low{}, high{}, kl{}, entropy{}, kept{}, kept_entropy{}, ratio{}, rollout{}, effective{}, through{};
        f32 masked_kl{}, masked_entropy{}, masked_clipped{}, masked_tokens{};
        each(start, std::min(start + kBlock, r.size), [&](int64_t i, auto whole) {
            constexpr bool kWhole = decltype(whole)::value;
            auto write = [&](float* out, f32 x) { kWhole ? store(out + i, x) : store_tail(out + i, r.size - i, x); };
            if (r.loss_mask != nullptr && none(load_bytes<kWhole>(r.loss_mask + i, r.size - i))) {  // no token is in the loss
                write(dlogp, f32{});
                if (p.dentropy != nullptr) write(p.dentropy + r.begin, f32{});
                if constexpr (kPerception) write(p.dmasked + r.begin, f32{});
                return;
            }
            Token<f32, i32> t = load_token<kWhole>(r, i);
            TokenTerms<f32> terms = token_terms<Surrogate, kPlain, kPerception>(t, q, threshold, v);
            f32 gradient = terms.direct;
            if (!kPlain && v.sequence_level) {
                through += terms.through_ratio;
            } else {
                gradient += terms.through_ratio;
            }
            write(dlogp, gradient * q.share);
            if (p.dentropy != nullptr) write(p.dentropy + r.begin, terms.kept);
            value += terms.value;
            low += terms.low;
            high += terms.high;
            kl += terms.kl;
            entropy += t.entropy;
            ratio += terms.ratio;
            if constexpr (!kPlain) {
                kept += terms.kept;
                kept_entropy += terms.kept * t.entropy;
                rollout += terms.rollout;
                effective += terms.effective;
            }
            if constexpr (kPerception) {
                write(p.dmasked + r.begin, terms.perception.dmasked * q.share);
                masked_kl += terms.perception.kl;
                masked_entropy += terms.perception.entropy;
                masked_clipped += terms.perception.clipped;
                masked_tokens += terms.perception.seen;
            }
            f32 at_valid = t.loss_mask ? terms.ratio : splat(kInfinity);
            least = at_valid < least ? at_valid : least;
            greatest = max(terms.ratio, greatest);
        });
        column[GrpoColumn::loss] += static_cast<double>(hsum(value)) * q.share;
        column[GrpoColumn::low] += hsum(low);
        column[GrpoColumn::high] += hsum(high);
        column[GrpoColumn::kl] += hsum(kl);
        column[GrpoColumn::entropy] += hsum(entropy);
        column[GrpoColumn::ratio] += hsum(ratio);
        if constexpr (!kPlain) {
            through_ratio += hsum(through);
            column[GrpoColumn::kept] += hsum(kept);
            column[GrpoColumn::kept_entropy] += hsum(kept_entropy);
            column[GrpoColumn::rollout] += hsum(rollout);
            column[GrpoColumn::effective] += hsum(effective);
        }
        if constexpr (kPerception) {
            column[GrpoColumn::masked_kl] += hsum(masked_kl);
            column[GrpoColumn::masked_entropy] += hsum(masked_entropy);
            column[GrpoColumn::masked_clipped] += hsum(masked_clipped);
            column[GrpoColumn::masked_tokens] += hsum(masked_tokens);
        }
    }
    column[GrpoColumn::tokens] = column[GrpoColumn::units] = q.tokens;
    if constexpr (kPlain) {
        column[GrpoColumn::kept] = column[GrpoColumn::rollout] = column[GrpoColumn::effective] = q.tokens;
        column[GrpoColumn::kept_entropy] = column[GrpoColumn::entropy];
    }
    column[GrpoColumn::ratio_min] = -hmax(-least);
    column[GrpoColumn::ratio_max] = hmax(greatest);
    if ((v.sequence_level || Surrogate::kSequenceWeight) && !p.advantage_per_token) {
        Term<float> term = Surrogate::term(0.0f, q.ratio, q.log_weight, r.advantage, v);
        column[GrpoColumn::low] = term.low;
        column[GrpoColumn::high] = term.high;
        column[GrpoColumn::units] = 1;
    }
    if (kPlain || !v.sequence_level) return;
    f32 spread = splat(static_cast<float>(through_ratio / std::max(q.tokens, 1.0f)) * q.share);
    each(0, r.size, [&](int64_t i, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        f32 share = load_mask<kWhole>(r, i) ? spread : f32{};
        if constexpr (kWhole) {
            store(dlogp + i, load(dlogp + i) + share);
        } else {
            store_tail(dlogp + i, r.size - i, load_tail(dlogp + i, r.size - i, 0.0f) + share);
        }
    });
}

}  // namespace

void grpo_loss(const GrpoLoss& p, int threads) {
    std::vector<double> columns(p.num_sequences * GrpoColumn::count);
    bool plain = is_plain(p.variant, p.entropy_threshold);
    threads = static_cast<int>(std::clamp<int64_t>(p.num_tokens / kPerThread, 1, threads));
    with_surrogate(p.variant, [&](auto surrogate) {
        using Surrogate = decltype(surrogate);
        auto run = plain                  ? run_sequence<Surrogate, true, false>
                   : p.variant.perception ? run_sequence<Surrogate, false, true>
                                          : run_sequence<Surrogate, false, false>;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t s = 0; s < p.num_sequences; ++s) run(p, s, &columns[s * GrpoColumn::count]);
    });
    double sums[GrpoColumn::count] = {};
    float ratio_min = kInfinity, ratio_max = -kInfinity, low_min = kInfinity, high_max = 0;
    for (int64_t s = 0; s < p.num_sequences; ++s) {
        const double* column = &columns[s * GrpoColumn::count];
        for (int c = 0; c < GrpoColumn::ratio_min; ++c) sums[c] += column[c];
        ratio_min = std::min(ratio_min, static_cast<float>(column[GrpoColumn::ratio_min]));
        ratio_max = std::max(ratio_max, static_cast<float>(column[GrpoColumn::ratio_max]));
        if (column[GrpoColumn::units] == 0) continue;
        low_min = std::min(low_min, static_cast<float>(column[GrpoColumn::low] / column[GrpoColumn::units]));
        high_max = std::max(high_max, static_cast<float>(column[GrpoColumn::high] / column[GrpoColumn::units]));
    }
    float total[GrpoColumn::count];
    std::copy(sums, sums + GrpoColumn::count, total);
    total[GrpoColumn::ratio_min] = ratio_min;
    total[GrpoColumn::ratio_max] = ratio_max;
    total[GrpoColumn::low_min] = low_min;
    total[GrpoColumn::high_max] = high_max;
    finish(p, total, p.loss, p.stats);
}

}  // namespace vlmk::VLMK_ISA
