// The divergences of linear_kl: the terms of D and K, and G, of vlmkernels/ops/linear_kl/divergence.py for log p and log q.
//
// F is float, or a vector of cpu/simd.h. The file that includes this header defines VLMK_NS (see surrogate.h), and in it
// probability_of(F), which is e^x, and log_of(F).
#pragma once

#include "dtypes.h"

namespace vlmk::VLMK_NS {

// x log(x / y) for a probability x, given the logarithm: 0 for x = 0, where it may not be finite. A NaN stays NaN.
template <class F>
VLMK_HD F term(F x, F log_ratio) {
    return x > 0.0f ? x * log_ratio : x;
}

template <class F>
struct Terms {
    F total{}, mean{};
};

// KL(q || p)
struct Forward {
    template <class F>
    VLMK_HD static Terms<F> terms(F log_p, F log_q, float) {
        F q = probability_of(log_q);
        return {term(q, log_q - log_p) + (probability_of(log_p) - q), F{}};
    }
    template <class F>
    VLMK_HD static F gradient(F log_p, F log_q, float, float) {
        return probability_of(log_p) - probability_of(log_q);
    }
};

// KL(p || q)
struct Reverse {
    template <class F>
    VLMK_HD static Terms<F> terms(F log_p, F log_q, float) {
        F p = probability_of(log_p), value = term(p, log_p - log_q) + (probability_of(log_q) - p);
        return {value, value};
    }
    template <class F>
    VLMK_HD static F gradient(F log_p, F log_q, float, float mean) {
        return term(probability_of(log_p), log_p - log_q - mean);
    }
};

// beta KL(q || M) + (1 - beta) KL(p || M). The logarithms are those of m / p and m / q, not of m, so that the rounding of p and
// q has little effect.
struct Mixture {
    template <class F>
    VLMK_HD static Terms<F> terms(F log_p, F log_q, float beta) {
        F p = probability_of(log_p), q = probability_of(log_q), m = beta * q + (1.0f - beta) * p;
        F of_p = term(p, -log_of(m / p));
        return {beta * term(q, -log_of(m / q)) + (1.0f - beta) * of_p, of_p};
    }
    template <class F>
    VLMK_HD static F gradient(F log_p, F log_q, float beta, float mean) {
        F p = probability_of(log_p), m = beta * probability_of(log_q) + (1.0f - beta) * p;
        return (1.0f - beta) * term(p, -log_of(m / p) - mean);
    }
};

}  // namespace vlmk::VLMK_NS
