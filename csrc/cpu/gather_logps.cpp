// gather_logps on the CPU: one read of a row forward; one read and one write backward. Formulas: common/gather_logps.h.
#include "../common/gather_logps.h"

#include <algorithm>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements between two looks at the maximum; they stay in the first-level cache
constexpr float kSlack = 4;       // bits
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Of y_v = (x_v - m) log2(e) / temperature: s = sum_v 2^y_v and sy = sum_v 2^y_v y_v, for the maximum m so far.
struct Softmax {
    float m = std::numeric_limits<float>::lowest();
    f32 s{};
    f32 sy{};

    void raise(float to, float scale) {
        float shift = (m - to) * scale;
        shift = shift < -126.0f ? -126.0f : shift;
        float alpha = std::exp2(shift);
        sy = (sy + s * shift) * alpha;
        s = s * alpha;
        m = to;
    }

    template <bool kEntropy>
    void add(f32 x, float scale) {
        f32 y = (x - m) * scale;
        f32 e = exp2_clamp(y);
        s += e;
        if constexpr (kEntropy) sy += e * y;
    }
};

// The row is read once, with a look at the maximum only after each block: y may exceed 0 by kSlack before m is raised and the
// block, which is still in the first-level cache, is done again. Few blocks are: the maximum of the first is a good guess.
template <bool kEntropy, class T>
Softmax read_row(const T* x, int64_t vocab, float scale) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    Softmax softmax;
    for (int64_t start = 0; start < vocab; start += kBlock) {
        int64_t end = std::min(start + kBlock, vocab);
        while (true) {
            Softmax next = softmax;
            f32 maximum[2] = {splat(kNone), splat(kNone)};
            int64_t v = start;
            for (; v + 2 * kLanes <= end; v += 2 * kLanes) {
                for (int i = 0; i < 2; ++i) {
                    f32 loaded = load(x + v + i * kLanes);
                    maximum[i] = max(loaded, maximum[i]);
                    next.template add<kEntropy>(loaded, scale);
                }
            }
            for (; v < end; v += kLanes) {
                f32 loaded = end - v < kLanes ? load_tail(x + v, end - v, kNone) : load(x + v);
                maximum[0] = max(loaded, maximum[0]);
                next.template add<kEntropy>(loaded, scale);
            }
            float top = hmax(max(maximum[0], maximum[1]));
            // Written so that a maximum of infinity ends the loop, as NaN.
            if (!((top - softmax.m) * scale > kSlack) || top == softmax.m) {
                softmax = next;
                break;
            }
            softmax.raise(top, scale);
        }
    }
    return softmax;
}

template <class T>
void forward(const GatherLogps& p, int threads) {
    float inverse = 1.0f / p.temperature;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < p.num_results; ++k) {
        bool asked = p.mask == nullptr || p.mask[k];
        float logp = 0, entropy = 0, m = 0, log_sum = 0;
        if (asked) {
            int64_t n = p.rows == nullptr ? k : p.rows[k];
            const T* x = static_cast<const T*>(p.logits) + n / p.inner * p.stride_outer + n % p.inner * p.stride_inner;
            Softmax softmax = p.entropy != nullptr ? read_row<true>(x, p.vocab, inverse * kLog2e)
                                                   : read_row<false>(x, p.vocab, inverse * kLog2e);
            float s = hsum(softmax.s);
            m = softmax.m;
            log_sum = std::log(s);
            logp = (load_one(x + p.targets[k]) - m) * inverse - log_sum;
            entropy = log_sum - hsum(softmax.sy) / s * kLn2;
        }
        p.logp[k] = logp;
        if (p.entropy != nullptr) p.entropy[k] = entropy;
        p.stats[2 * k] = m;
        p.stats[2 * k + 1] = log_sum;
    }
}

// What the results of one row ask of its gradient: dx_v = ([v == t] dlogp - p_v (dlogp + dentropy (log p_v + H))) /
// temperature.
struct RowGradient {
    float m, scale, log2_sum;  // log2 p_v = (x_v - m) scale - log2_sum
    float constant, slope;     // dx_v = -p_v (constant + slope log2 p_v), the one-hot term aside

    f32 operator()(f32 x) const {
        f32 y = (x - m) * scale - log2_sum;
        f32 e = exp2_clamp(y);
        return -e * (y * slope + constant);
    }
};

template <class T>
void write_row(const RowGradient& gradient, const T* x, T* dx, int64_t vocab) {
    int64_t v = 0;
    for (; v + kLanes <= vocab; v += kLanes) store(dx + v, gradient(load(x + v)));
    if (v < vocab) store_tail(dx + v, vocab - v, gradient(load_tail(x + v, vocab - v, 0)));
}

template <class T>
void backward_row(const GatherLogps& p, int64_t begin, int64_t end, const T* x, T* dx, std::vector<float>& at_target) {
    float inverse = 1.0f / p.temperature, dlogp = 0, dentropy = 0;
    for (int64_t k = begin; k < end; ++k) {
        dlogp += p.dlogp[k];
        dentropy += p.dentropy == nullptr ? 0 : p.dentropy[k];
    }
    RowGradient gradient{p.stats[2 * begin], inverse * kLog2e, p.stats[2 * begin + 1] * kLog2e, 0, dentropy * inverse * kLn2};
    gradient.constant = inverse * (dlogp + (p.dentropy == nullptr ? 0 : dentropy * p.entropy[begin]));

    // The targets' elements first, in fp32 and before the row is overwritten: several results may share one.
    at_target.clear();
    for (int64_t k = begin; k < end; ++k) {
        float one_hot = 0;
        for (int64_t other = begin; other < end; ++other) {
            one_hot += p.targets[other] == p.targets[k] ? p.dlogp[other] : 0;
        }
        at_target.push_back(inverse * one_hot + gradient(splat(load_one(x + p.targets[k])))[0]);
    }
    write_row(gradient, x, dx, p.vocab);
    for (int64_t k = begin; k < end; ++k) store_one(dx + p.targets[k], at_target[k - begin]);
}

template <class T>
void backward(const GatherLogps& p, int threads) {
    if (p.dlogits != p.logits) ask_for_huge_pages(p.dlogits, p.num_rows * p.vocab * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> at_target;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < p.num_rows; ++n) {
            int64_t begin = p.starts == nullptr ? n : p.starts[n];
            int64_t end = p.starts == nullptr ? n + (p.mask == nullptr || p.mask[n]) : p.starts[n + 1];
            T* dx = static_cast<T*>(p.dlogits) + n / p.inner * p.grad_stride_outer + n % p.inner * p.grad_stride_inner;
            if (begin == end) {
                std::memset(dx, 0, p.vocab * sizeof(T));
                continue;
            }
            const T* x = static_cast<const T*>(p.logits) + n / p.inner * p.stride_outer + n % p.inner * p.stride_inner;
            backward_row(p, begin, end, x, dx, at_target);
        }
    }
}

}  // namespace

void gather_logps_fwd(const GatherLogps& p, int threads) {
    switch (p.dtype) {
        case DType::float32:
            return forward<float>(p, threads);
        case DType::bfloat16:
            return forward<bf16>(p, threads);
        case DType::float16:
            return forward<f16>(p, threads);
    }
}

void gather_logps_bwd(const GatherLogps& p, int threads) {
    switch (p.dtype) {
        case DType::float32:
            return backward<float>(p, threads);
        case DType::bfloat16:
            return backward<bf16>(p, threads);
        case DType::float16:
            return backward<f16>(p, threads);
    }
}

}  // namespace vlmk::VLMK_ISA
