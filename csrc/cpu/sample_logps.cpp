// sample_logps on the CPU. A row is read from memory once; what is read again is mostly in the L2 cache. Formulas:
// common/sample_logps.h.
//
// One pass over the row computes the softmax and, for each block of tokens, the greatest score and the sum of e. Without
// filters the token is drawn from these sums. With filters, the tokens that can pass them, of the few blocks whose greatest
// score is large enough, are copied to a list, and the thresholds are found by radix selection in the list.
#include "../common/sample_logps.h"

#include <algorithm>
#include <vector>

#include "softmax.h"

namespace vlmk::VLMK_ISA {
namespace {

using u8 = uint8_t __attribute__((vector_size(16)));

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLeastExponent = -126;  // a smaller e counts as 0

// Vector of sixteen bools, padded with false after n < 16.
i32 load_mask(const bool* p, int64_t n = kLanes) {
    u8 lanes{};
    std::memcpy(&lanes, p, n);
    return __builtin_convertvector(lanes, i32) != 0;
}

// The scores of a row.
template <class T>
struct Scores {
    const T* x;
    const bool* seen;
    const bool* banned;
    float penalty;

    f32 adjust(f32 logit, i32 is_seen, i32 is_banned) const {
        if (seen != nullptr) logit = is_seen ? (logit < 0.0f ? logit * penalty : logit / penalty) : logit;
        return is_banned ? splat(kMinusInfinity) : logit;
    }
    f32 operator()(int64_t v) const {
        return adjust(load(x + v), seen != nullptr ? load_mask(seen + v) : i32{},
                      banned != nullptr ? load_mask(banned + v) : i32{});
    }
    f32 tail(int64_t v, int64_t n, float fill) const {
        return adjust(load_tail(x + v, n, fill), seen != nullptr ? load_mask(seen + v, n) : i32{},
                      banned != nullptr ? load_mask(banned + v, n) : i32{});
    }
    f32 at_most(int64_t v, int64_t n) const { return n < kLanes ? tail(v, n, kMinusInfinity) : (*this)(v); }
};

// The logits of banned tokens; -infinity for all others.
template <class T>
struct Excluded {
    const T* x;
    const bool* banned;

    f32 operator()(int64_t v) const { return load_mask(banned + v) ? load(x + v) : splat(kMinusInfinity); }
    f32 tail(int64_t v, int64_t n, float) const {
        return load_mask(banned + v, n) ? load_tail(x + v, n, kMinusInfinity) : splat(kMinusInfinity);
    }
};

// The softmax of the tokens read so far, like Softmax, in fp64.
struct Total {
    float m = std::numeric_limits<float>::lowest();
    double s = 0, sy = 0;

    void raise(float to, float scale) {
        double shift = std::max((double{m} - to) * scale, -1000.0), alpha = std::exp2(shift);
        sy = (sy + s * shift) * alpha;
        s *= alpha;
        m = to;
    }
    void merge(Total other, float scale) {
        float top = std::max(m, other.m);
        raise(top, scale);
        other.raise(top, scale);
        s += other.s;
        sy += other.sy;
    }
};

struct Block {
    float top;        // the greatest score
    float s;          // sum of 2^((s_v - reference) c)
    float reference;  // a maximum of the scores so far
};

// Adds a block to `total`. Like read_row, it computes the block again if its maximum is far above that of `total`.
template <bool kEntropy, class Row>
Block add_block(const Row& row, int64_t start, int64_t end, float scale, Total& total) {
    while (true) {
        Softmax sums[2];
        f32 maximum[2] = {splat(kMinusInfinity), splat(kMinusInfinity)};
        sums[0].m = sums[1].m = total.m;
        int64_t v = start;
        for (; v + 2 * kLanes <= end; v += 2 * kLanes) {
            for (int i = 0; i < 2; ++i) {
                f32 loaded = row(v + i * kLanes);
                maximum[i] = max(loaded, maximum[i]);
                sums[i].template add<kEntropy>(loaded, scale);
            }
        }
        for (; v < end; v += kLanes) {
            f32 loaded = end - v < kLanes ? row.tail(v, end - v, kMinusInfinity) : row(v);
            maximum[0] = max(loaded, maximum[0]);
            sums[0].template add<kEntropy>(loaded, scale);
        }
        float top = hmax(max(maximum[0], maximum[1]));
        // The negated comparison ends the loop for a maximum of infinity; the result is NaN.
        if (!((top - total.m) * scale > kSlack) || top == total.m) {
            float s = hsum(sums[0].s + sums[1].s);
            total.s += s;
            if constexpr (kEntropy) total.sy += hsum(sums[0].sy + sums[1].sy);
            return {top, s, total.m};
        }
        total.raise(top, scale);
    }
}

// Unsigned integers in the order of the floats. -0 equals 0.
uint32_t ordered(float x) {
    uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float unordered(uint32_t key) { return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The tokens that can pass the filters, in the order of their ids. The arrays have room for whole vectors.
struct Candidates {
    int64_t count = 0;
    std::vector<float> scores;
    std::vector<int32_t> ids;
    std::vector<float> weights;  // e, 0 in the rest of the last vector

    void reserve(int64_t most) {
        if (static_cast<int64_t>(scores.size()) >= most + kLanes) return;
        scores.resize(most + kLanes);
        ids.resize(most + kLanes);
        weights.resize(most + kLanes);
    }

    // Appends the tokens from v on whose scores are at least `bound`.
    void append(f32 s, int64_t v, float bound) {
#if defined(__AVX512F__)
        __mmask16 chosen = _mm512_cmp_ps_mask(bit_cast<__m512>(s), _mm512_set1_ps(bound), _CMP_GE_OQ);
        __m512i lanes = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(v)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        _mm512_storeu_ps(&scores[count], _mm512_maskz_compress_ps(chosen, bit_cast<__m512>(s)));
        _mm512_storeu_si512(&ids[count], _mm512_maskz_compress_epi32(chosen, lanes));
        count += __builtin_popcount(chosen);
#else
        for (int i = 0; i < kLanes; ++i) {
            scores[count] = s[i];
            ids[count] = static_cast<int32_t>(v + i);
            count += s[i] >= bound;
        }
#endif
    }

    template <class Condition>
    void keep(Condition condition) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            float score = scores[i];
            ids[kept] = ids[i];
            scores[kept] = score;
            kept += condition(score);
        }
        count = kept;
    }
};

// What a thread keeps from row to row.
struct Workspace {
    std::vector<Block> blocks;
    std::vector<float> tops;
    Candidates candidates;
    std::vector<uint32_t> keys;
    std::vector<float> key_weights;
    std::vector<double> sums;
};

// The sum of n weights, a whole number of vectors, and in `sums` the sum of each vector.
double sum_weights(const float* weights, int64_t n, std::vector<double>& sums) {
    using f64 = double __attribute__((vector_size(128)));
    sums.resize((n + kLanes - 1) / kLanes);
    double total = 0;
    for (size_t i = 0; i < sums.size(); ++i) {
        f64 x = __builtin_convertvector(load(weights + i * kLanes), f64);
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
        }
        sums[i] = x[0];
        total += x[0];
    }
    return total;
}

// The last of the weights > 0 for which the sum of those before it is at most `below`. `sums` as from sum_weights.
int64_t find_sum(const float* weights, const std::vector<double>& sums, double below) {
    size_t vector = 0;
    double sum = 0, before = 0;
    for (size_t i = 0; i < sums.size() && sum <= below; ++i) {
        if (sums[i] > 0) {
            vector = i;
            before = sum;
        }
        sum += sums[i];
    }
    int64_t found = 0;
    for (size_t i = vector * kLanes; i < (vector + 1) * kLanes; ++i) {
        if (weights[i] > 0 && before <= below) found = i;
        before += weights[i];
    }
    return found;
}

struct Selected {
    float score;
    double below;  // the weight of smaller scores
};

// The smallest score for which `start`, at most `limit`, and the weights of scores up to it add up to more than `limit`; the
// greatest score if they do not. Radix selection: each pass fixes eleven bits of the scores. There is at least one candidate.
template <bool kMass>
Selected select(Workspace& work, double start, double limit) {
    constexpr int kShifts[] = {21, 10, 0}, kBits[] = {11, 11, 10};
    const Candidates& from = work.candidates;
    int64_t count = from.count;
    work.keys.resize(std::max<size_t>(work.keys.size(), count));
    work.key_weights.resize(work.keys.size());
    uint32_t greatest = 0, prefix = 0;
    double below = start;
    for (int64_t i = 0; i < count; ++i) {
        work.keys[i] = ordered(from.scores[i]);
        work.key_weights[i] = kMass ? from.weights[i] : 1.0f;
        greatest = std::max(greatest, work.keys[i]);
    }
    for (int pass = 0; pass < 3; ++pass) {
        uint32_t mask = (1u << kBits[pass]) - 1;
        auto digit_of = [&](uint32_t key) { return key >> kShifts[pass] & mask; };
        double histogram[2048] = {};
        for (int64_t i = 0; i < count; ++i) histogram[digit_of(work.keys[i])] += work.key_weights[i];
        uint32_t digit = 0, last = mask;
        while (digit < last && !(below + histogram[digit] > limit)) below += histogram[digit++];
        if (!(below + histogram[digit] > limit)) {
            float top = unordered(greatest);
            below = start;
            for (int64_t i = 0; i < from.count; ++i) below += from.scores[i] < top ? (kMass ? from.weights[i] : 1.0f) : 0.0f;
            return {top, below};
        }
        prefix |= digit << kShifts[pass];
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t key = work.keys[i];
            work.keys[kept] = key;
            work.key_weights[kept] = work.key_weights[i];
            kept += digit_of(key) == digit;
        }
        count = kept;
    }
    return {unordered(prefix), below};
}

// A row and what the first pass found in it.
template <class T>
struct Row {
    const SampleLogps& p;
    Scores<T> scores;
    float scale;
    Workspace& work;
    Total allowed;    // over the tokens that are not banned; its m can be less than top
    float top;        // the greatest score
    double kept = 0;  // sum of e over the kept tokens

    int64_t block_end(int64_t block) const { return std::min((block + 1) * kTokenBlock, p.vocab); }

    f32 exponents(f32 s) const {
        f32 y = (s - top) * scale;
        f32 e = exp2_clamp(y);
        return y < kLeastExponent ? f32{} : e;
    }

    int64_t greedy() const {
        for (int64_t b = 0;; ++b) {
            if (work.blocks[b].top != top) continue;
            for (int64_t v = b * kTokenBlock; v < block_end(b); v += kLanes) {
                f32 s = scores.at_most(v, block_end(b) - v);
                for (int i = 0; i < kLanes; ++i) {
                    if (s[i] == top) return v + i;
                }
            }
        }
    }

    // Draws from all tokens.
    int64_t draw(double u) {
        double total = 0, before = 0;
        auto mass = [&](const Block& block) {
            if ((block.top - top) * scale < kLeastExponent) return 0.0;
            return block.s * std::exp2((double{block.reference} - top) * scale);
        };
        for (const Block& block : work.blocks) total += mass(block);
        kept = total;
        int64_t chosen = 0;
        double below = u * total, sum = 0, chosen_mass = 1;
        for (size_t b = 0; b < work.blocks.size() && sum <= below; ++b) {
            double m = mass(work.blocks[b]);
            if (m > 0) {
                chosen = b;
                chosen_mass = m;
                before = sum;
            }
            sum += m;
        }
        return draw_within(chosen, (below - before) / chosen_mass);
    }

    int64_t draw_within(int64_t block, double u) const {
        float e[kTokenBlock];
        int64_t begin = block * kTokenBlock, count = block_end(block) - begin;
        for (int64_t i = 0; i < count; i += kLanes) store(e + i, exponents(scores.at_most(begin + i, count - i)));
        double total = sum_weights(e, count, work.sums);
        return begin + find_sum(e, work.sums, u * total);
    }

    // Draws from the tokens that pass the filters.
    int64_t draw_filtered(double u) {
        Candidates& list = work.candidates;
        collect();
        if (p.top_k > 0 && p.top_k < list.count) {
            float kth = select<false>(work, 0, static_cast<double>(list.count - p.top_k)).score;
            list.keep([&](float score) { return score >= kth; });
        }
        double total = weigh();
        float least = top + p.min_p_distance;
        int64_t ties = p.vocab;
        if (p.removable > 0) {
            // Without top_k, the list lacks tokens that top_p or min_p removes.
            double all = p.top_k > 0 ? total : allowed.s * std::exp2((double{allowed.m} - top) * scale);
            double limit = p.removable * all, start = std::max(all - total, 0.0);
            Selected found = start <= limit ? select<true>(work, start, limit) : Selected{kMinusInfinity, 0};
            if (found.score >= least) {
                least = found.score;
                ties = std::count(list.scores.begin(), list.scores.begin() + list.count, least);
                double removed = (limit - found.below) / exponents(splat(least))[0];  // infinite if e is 0
                ties -= static_cast<int64_t>(std::min(std::max(removed, 0.0), ties - 1.0));
            }
        }
        list.keep([&](float score) { return score > least || (score == least && ties-- > 0); });
        kept = weigh();
        return list.ids[find_sum(list.weights.data(), work.sums, u * kept)];
    }

    // Copies the tokens that can pass the filters to the list.
    void collect() {
        int64_t blocks = work.blocks.size();
        float bound = std::numeric_limits<float>::lowest();
        if (p.top_k > 0 && p.top_k <= blocks) {
            // At least top_k scores are at least as great as the top_k-th greatest of the blocks' maxima.
            work.tops.clear();
            for (const Block& block : work.blocks) work.tops.push_back(block.top);
            std::nth_element(work.tops.begin(), work.tops.begin() + p.top_k - 1, work.tops.end(), std::greater<float>());
            bound = std::max(bound, work.tops[p.top_k - 1]);
        } else if (p.top_k == 0) {
            bound = std::max(bound, top + p.min_p_distance);
            if (p.removable > 0) {
                // All tokens below this score together have less than the share that top_p removes.
                double all = std::log2(allowed.s * p.removable / p.vocab) + (double{allowed.m} - top) * scale;
                bound = std::max(bound, static_cast<float>(top + (all - 0.01) / scale));
            }
        }
        work.candidates.count = 0;
        work.candidates.reserve(p.vocab);
        for (int64_t b = 0; b < blocks; ++b) {
            if (work.blocks[b].top < bound) continue;
            int64_t end = block_end(b);
            for (int64_t v = b * kTokenBlock; v < end; v += kLanes)
                work.candidates.append(scores.at_most(v, end - v), v, bound);
        }
    }

    // Computes e of the candidates and returns their sum.
    double weigh() const {
        Candidates& list = work.candidates;
        std::fill(&list.scores[list.count], &list.scores[list.count] + kLanes, kMinusInfinity);
        for (int64_t i = 0; i < list.count; i += kLanes) store(&list.weights[i], exponents(load(&list.scores[i])));
        return sum_weights(list.weights.data(), list.count, work.sums);
    }
};

void write(const SampleLogps& p, int64_t n, int64_t id, float logp, float log_kept_mass, float entropy) {
    p.ids[n] = id;
    p.logps[n] = logp;
    p.log_kept_mass[n] = log_kept_mass;
    p.entropy[n] = entropy;
}

template <class T>
void sample_row(const SampleLogps& p, int64_t n, Workspace& work) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    float scale = 1.4426950408889634 / p.temperature;
    const T* x = static_cast<const T*>(p.logits) + n * p.stride;
    const bool* seen = p.seen == nullptr ? nullptr : p.seen + n * p.seen_stride;
    const bool* banned = p.banned;
    if (p.banned_rows != nullptr) banned += p.banned_rows[n] * p.vocab;

    Total allowed, excluded;
    work.blocks.clear();
    float top = kMinusInfinity;
    for (int64_t start = 0; start < p.vocab; start += kTokenBlock) {
        int64_t end = std::min(start + kTokenBlock, p.vocab);
        bool bans = banned != nullptr && std::memchr(banned + start, 1, end - start) != nullptr;
        if (bans && seen == nullptr) add_block<true>(Excluded<T>{x, banned}, start, end, scale, excluded);
        Block block =
            bans || seen != nullptr
                ? add_block<true>(Scores<T>{x, seen, bans ? banned : nullptr, p.repetition_penalty}, start, end, scale, allowed)
                : add_block<true>(PlainRow<T>{x}, start, end, scale, allowed);
        top = std::max(top, block.top);
        work.blocks.push_back(block);
    }
    Total full = allowed;
    if (seen == nullptr) {
        full.merge(excluded, scale);
    } else {
        full = Total{};
        for (int64_t start = 0; start < p.vocab; start += kTokenBlock) {
            add_block<true>(PlainRow<T>{x}, start, std::min(start + kTokenBlock, p.vocab), scale, full);
        }
    }
    if (!(full.s <= std::numeric_limits<double>::max()) || !(allowed.s <= std::numeric_limits<double>::max())) {
        return write(p, n, -1, kNaN, kNaN, kNaN);
    }
    if (top == kMinusInfinity) return write(p, n, -2, kNaN, kNaN, kNaN);

    Row<T> row{p, {x, seen, banned, p.repetition_penalty}, scale, work, allowed, top};
    int64_t id;
    if (p.uniform == nullptr) {
        id = row.greedy();
    } else if (p.top_k > 0 || p.removable > 0 || p.min_p_distance > kMinusInfinity) {
        id = row.draw_filtered(p.uniform[n]);
    } else {
        id = row.draw(p.uniform[n]);
    }
    double log_sum = std::log(full.s), logp = (double{load_one(x + id)} - full.m) / p.temperature - log_sum;
    double log_kept_mass = logp;
    if (p.uniform != nullptr) {
        double score = row.scores.at_most(id, 1)[0];
        log_kept_mass = logp - ((score - top) / p.temperature - std::log(row.kept));
    }
    write(p, n, id, logp, log_kept_mass, log_sum - full.sy / full.s * 0.6931471805599453);
}

}  // namespace

void sample_logps(const SampleLogps& p, int threads) {
    with_dtype(p.dtype, [&](auto x) {
#pragma omp parallel num_threads(threads)
        {
            Workspace work;
#pragma omp for schedule(dynamic, 1)
            for (int64_t n = 0; n < p.num_rows; ++n) sample_row<decltype(x)>(p, n, work);
        }
    });
}

}  // namespace vlmk::VLMK_ISA
