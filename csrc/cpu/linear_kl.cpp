// The rows of linear_kl on the CPU. A block of both rows is converted to fp32 in the L1 cache, so that the formulas do not
// depend on the types of the logits; the second and third read are mostly from the L2 cache. Formulas: common/linear_kl.h.
#include "../common/linear_kl.h"

#include "softcap.h"

namespace vlmk::VLMK_ISA {
inline f32 probability_of(f32 log) {
    f32 y = log * kLog2e;
    return exp2_clamp(y);
}
inline f32 log_of(f32 x) { return log(x); }
}  // namespace vlmk::VLMK_ISA

#define VLMK_NS VLMK_ISA
#include "../common/divergence.h"

namespace vlmk::VLMK_ISA {
namespace {

// Calls f(row) with row k of the logits.
template <class Function>
void with_row(const LinearKlSide& side, int64_t k, int64_t vocab, Function f) {
    with_dtype(side.dtype, [&](auto element) {
        using T = decltype(element);
        const T* x = static_cast<const T*>(side.logits) + k * vocab;
        if (side.softcap > 0.0f) {
            f(Capped<T>(side.softcap, side.logit_scale, x));
        } else {
            f(Uncapped<T>(side.softcap, side.logit_scale, x));
        }
    });
}

// A block of a row, padded to whole vectors: u, and the logarithm of the probability, -infinity in the padding.
struct Block {
    f32 u[kBlock / kLanes], log[kBlock / kLanes];
};

void read_block(const LinearKlSide& side, int64_t k, int64_t vocab, int64_t start, const float* stats, Block& block) {
    int64_t size = std::min(kBlock, vocab - start);
    with_row(side, k, vocab, [&](const auto& row) {
        int64_t i = 0;
        for (; (i + 1) * kLanes <= size; ++i) block.u[i] = row(start + i * kLanes);
        if (i * kLanes < size) {
            block.u[i] = row.tail(start + i * kLanes, size - i * kLanes, -std::numeric_limits<float>::infinity());
        }
    });
    for (int64_t i = 0; i * kLanes < size; ++i) block.log[i] = (block.u[i] - stats[0]) * side.inverse - stats[1];
}

// Calls f(start, size, student, teacher) for each block of row k.
template <class Function>
void for_blocks(const LinearKl& p, int64_t k, Function f) {
    const float* stats = p.stats + 5 * k;
    Block own, other;
    for (int64_t start = 0; start < p.vocab; start += kBlock) {
        read_block(p.student, k, p.vocab, start, stats, own);
        read_block(p.teacher, k, p.vocab, start, stats + 2, other);
        f(start, std::min(kBlock, p.vocab - start), own, other);
    }
}

void read_softmax(const LinearKlSide& side, int64_t k, int64_t vocab, float* stats) {
    with_row(side, k, vocab, [&](const auto& row) {
        Softmax softmax = read_row<false>(row, vocab, side.inverse * kLog2e);
        stats[0] = softmax.m;
        stats[1] = std::log(hsum(softmax.s));
    });
}

template <class Divergence>
void read(const LinearKl& p, int64_t k) {
    read_softmax(p.student, k, p.vocab, p.stats + 5 * k);
    read_softmax(p.teacher, k, p.vocab, p.stats + 5 * k + 2);
    double total = 0, mean = 0;
    for_blocks(p, k, [&](int64_t, int64_t size, const Block& own, const Block& other) {
        f32 of_block{}, mean_of_block{};
        for (int64_t i = 0; i * kLanes < size; ++i) {
            Terms<f32> terms = Divergence::terms(own.log[i], other.log[i], p.beta);
            of_block += terms.total;
            mean_of_block += terms.mean;
        }
        total += hsum(of_block);
        mean += hsum(mean_of_block);
    });
    p.divergence[k] = static_cast<float>(total);
    p.stats[5 * k + 4] = static_cast<float>(mean);
}

// Every block is read before its gradient, whose elements are not wider, is written.
template <class Divergence>
void write(const LinearKl& p, int64_t k) {
    float mean = p.stats[5 * k + 4], factor = p.upstream[k] * p.student.inverse;
    for_blocks(p, k, [&](int64_t start, int64_t size, const Block& own, const Block& other) {
        with_row(p.student, k, p.vocab, [&](const auto& row) {
            with_dtype(p.gradient_dtype, [&](auto element) {
                using Out = decltype(element);
                Out* dx = static_cast<Out*>(p.dlogits) + k * p.dlogits_stride + start;
                for (int64_t i = 0; i * kLanes < size; ++i) {
                    f32 value = Divergence::gradient(own.log[i], other.log[i], p.beta, mean) * row.slope(own.u[i]) * factor;
                    if ((i + 1) * kLanes <= size) {
                        store(dx + i * kLanes, value);
                    } else {
                        store_tail(dx + i * kLanes, size - i * kLanes, value);
                    }
                }
            });
        });
    });
}

template <class Divergence>
void run(const LinearKl& p, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < p.num_rows; ++k) {
        if (p.read) read<Divergence>(p, k);
        if (p.write) write<Divergence>(p, k);
    }
}

}  // namespace

void linear_kl(const LinearKl& p, int threads) {
    if (p.beta == 0.0f) {
        run<Forward>(p, threads);
    } else if (p.beta == 1.0f) {
        run<Reverse>(p, threads);
    } else {
        run<Mixture>(p, threads);
    }
}

}  // namespace vlmk::VLMK_ISA
