// gather_logps on the CPU. The forward pass reads each row once; the backward pass reads and writes it once. Formulas:
// common/gather_logps.h.
#include "../common/gather_logps.h"

#include <vector>

#include "memory.h"
#include "softmax.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class T>
void forward(const GatherLogps& p, int threads) {
    float inverse = 1.0f / p.temperature;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < p.num_results; ++k) {
        bool selected = p.mask == nullptr || p.mask[k];
        float logp = 0, entropy = 0, m = 0, log_sum = 0;
        if (selected) {
            int64_t n = p.rows == nullptr ? k : p.rows[k];
            const T* x = static_cast<const T*>(p.logits) + n / p.inner * p.stride_outer + n % p.inner * p.stride_inner;
            Softmax softmax = p.entropy != nullptr ? read_row<true>(PlainRow<T>{x}, p.vocab, inverse * kLog2e)
                                                   : read_row<false>(PlainRow<T>{x}, p.vocab, inverse * kLog2e);
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

template <class T>
void backward_row(const GatherLogps& p, int64_t begin, int64_t end, const T* x, T* dx, std::vector<float>& at_target) {
    float inverse = 1.0f / p.temperature, dlogp = 0, dentropy = 0;
    for (int64_t k = begin; k < end; ++k) {
        dlogp += p.dlogp[k];
        dentropy += p.dentropy == nullptr ? 0 : p.dentropy[k];
    }
    RowGradient gradient{p.stats[2 * begin], inverse * kLog2e, p.stats[2 * begin + 1] * kLog2e, 0, dentropy * inverse * kLn2};
    gradient.constant = inverse * (dlogp + (p.dentropy == nullptr ? 0 : dentropy * p.entropy[begin]));

    // The elements of the targets are computed first, in fp32, before the row is overwritten. Results may share a target.
    at_target.clear();
    for (int64_t k = begin; k < end; ++k) {
        float one_hot = 0;
        for (int64_t other = begin; other < end; ++other) {
            one_hot += p.targets[other] == p.targets[k] ? p.dlogp[other] : 0;
        }
        at_target.push_back(inverse * one_hot + gradient(splat(load_one(x + p.targets[k])))[0]);
    }
    write_row(gradient, PlainRow<T>{x}, dx, p.vocab);
    for (int64_t k = begin; k < end; ++k) store_one(dx + p.targets[k], at_target[k - begin]);
}

template <class T>
void backward(const GatherLogps& p, int threads) {
    if (p.dlogits != p.logits) advise_huge_pages(p.dlogits, p.num_rows * p.vocab * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> at_target;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < p.num_rows; ++n) {
            int64_t begin = p.offsets == nullptr ? n : p.offsets[n];
            int64_t end = p.offsets == nullptr ? n + (p.mask == nullptr || p.mask[n]) : p.offsets[n + 1];
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
    with_dtype(p.dtype, [&](auto x) { forward<decltype(x)>(p, threads); });
}

void gather_logps_bwd(const GatherLogps& p, int threads) {
    with_dtype(p.dtype, [&](auto x) { backward<decltype(x)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
