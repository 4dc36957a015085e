// The GRPO objective of one token, and of sixteen: the same rows as vlmkernels/ops/grpo_loss/reference.py.
//
// F is float, or a vector of the CPU's simd.h, and M what a comparison of two F gives. Whoever includes this defines VLMK_NS,
// the namespace to put it in (one per instruction set, and one for CUDA: code compiled for one must not be linked into
// another), and declares there `exp` of every F that it uses.
#pragma once

#include "grpo_loss.h"
#include "linear_logps.h"

#ifndef VLMK_NS
#error "define VLMK_NS"
#endif

namespace vlmk::VLMK_NS {

constexpr float kMaxLogRatio = 20.0f;
constexpr float kMinLogp = -1e4f;
constexpr float kVespoMinLogWeight = -18.420680743952367f;  // log 1e-8

template <class F>
VLMK_HD F splat_as(float x) {
    return x - F{};
}
template <class F, class M>
VLMK_HD F one_where(M condition) {
    return condition ? splat_as<F>(1.0f) : F{};
}

// The bound where x is beyond it; a NaN stays one. Of a vector: simd.h.
VLMK_HD float at_most(float x, float high) { return x > high ? high : x; }
VLMK_HD float at_least(float x, float low) { return x < low ? low : x; }
template <class F>
VLMK_HD F bounded(F log_ratio) {
    return at_least(at_most(log_ratio, kMaxLogRatio), -kMaxLogRatio);
}
// ---- surrogates ----

// The loss, its derivative by logp, and two statistics.
template <class F>
struct Term {
    F loss, dlogp, low, high;
};

// -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A)
struct PpoClip {
    static constexpr bool kThroughRatio = true;  // dlogp reaches logp through the ratio
    static constexpr bool kSequenceWeight = false;

    template <class F>
    VLMK_HD static Term<F> term(F, F ratio, F, F adv, const GrpoVariant& p) {
        float least = 1.0f - p.epsilon_low, greatest = 1.0f + p.epsilon_high;
        F capped = at_most(ratio, p.delta), clipped = at_least(at_most(ratio, greatest), least);
        F chosen = capped * adv <= clipped * adv ? capped : clipped;
        auto constant = (chosen < ratio) | (chosen > ratio);
        F low = one_where<F>((capped < least) & (adv < 0.0f)), high = one_where<F>((capped > greatest) & (adv > 0.0f));
        return {-chosen * adv, constant ? F{} : -ratio * adv, low, high};
    }
};

// -sg(min(r, eps_high)) A logp
struct Cispo {
    static constexpr bool kThroughRatio = false;
    static constexpr bool kSequenceWeight = false;

    template <class F>
    VLMK_HD static Term<F> term(F logp, F ratio, F, F adv, const GrpoVariant& p) {
        F dlogp = -at_most(ratio, p.epsilon_high) * adv;
        return {dlogp * logp, dlogp, F{}, one_where<F>((ratio > p.epsilon_high) & (adv > 0.0f))};
    }
};

// -sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A
struct Sapo {
    static constexpr bool kThroughRatio = true;
    static constexpr bool kSequenceWeight = false;

    template <class F>
    VLMK_HD static Term<F> term(F, F ratio, F, F adv, const GrpoVariant& p) {
        F tau = adv > 0.0f ? splat_as<F>(p.sapo_temperature_pos) : splat_as<F>(p.sapo_temperature_neg);
        F gate = 1.0f / (1.0f + exp(tau * (1.0f - ratio)));
        return {-4.0f * gate / tau * adv, -4.0f * gate * (1.0f - gate) * ratio * adv, F{}, F{}};
    }
};

// -sg(phi(w)) A logp, phi(w) = e^lambda w^k e^(-lambda w), of w = e^log_weight
struct Vespo {
    static constexpr bool kThroughRatio = false;
    static constexpr bool kSequenceWeight = true;  // log_weight is used

    template <class F>
    VLMK_HD static Term<F> term(F logp, F, F log_weight, F adv, const GrpoVariant& p) {
        F k = adv >= 0.0f ? splat_as<F>(p.vespo_k_pos) : splat_as<F>(p.vespo_k_neg);
        F lambda = adv >= 0.0f ? splat_as<F>(p.vespo_lambda_pos) : splat_as<F>(p.vespo_lambda_neg);
        F phi = exp(at_most(lambda + k * log_weight - lambda * exp(log_weight), kMaxLogRatio));
        return {-phi * adv * logp, -phi * adv, F{}, phi};
    }
};

// ---- estimators of KL(policy || reference), of x = ref_logp - logp ----

template <class F>
struct KlTerm {
    F kl, dlogp;
};

struct K1 {
    template <class F>
    VLMK_HD static KlTerm<F> term(F x) {
        return {-x, splat_as<F>(1.0f)};
    }
};

struct K2 {
    template <class F>
    VLMK_HD static KlTerm<F> term(F x) {
        return {0.5f * x * x, -x};
    }
};

struct K3 {
    template <class F>
    VLMK_HD static KlTerm<F> term(F x) {
        F e = exp(x);
        return {e - x - 1.0f, 1.0f - e};
    }
};

template <class F>
VLMK_HD KlTerm<F> kl_term(int32_t row, F x) {
    return row == 1 ? K1::term(x) : row == 2 ? K2::term(x) : K3::term(x);
}

// Calls f(row of surrogates).
template <class Function>
void with_surrogate(const GrpoVariant& v, Function f) {
    switch (v.surrogate) {
        case 0:
            return f(PpoClip{});
        case 1:
            return f(Cispo{});
        case 2:
            return f(Sapo{});
        default:
            return f(Vespo{});
    }
}

// ---- a token ----

// Its values; what was not given is what was given instead of it, or 0.
template <class F, class M>
struct Token {
    M mask;
    F logp, old_logp, ref_logp, rollout_logp, entropy, adv;

    VLMK_HD F log_ratio() const { return logp - old_logp; }
    // A token that has no log-probability of its sampler counts as sampled by the policy before this step.
    VLMK_HD F rollout_log_ratio() const { return rollout_logp == rollout_logp ? old_logp - rollout_logp : F{}; }
    VLMK_HD F drift() const { return rollout_logp == rollout_logp ? rollout_logp - logp : F{}; }
};

// The logarithm of the weight that corrects for the policy that sampled.
template <class F>
VLMK_HD F rollout_log_weight(F log_ratio, const GrpoVariant& v) {
    F log_weight = bounded(at_least(at_most(log_ratio, v.rollout_log_max), v.rollout_log_min));
    if (!v.rollout_mask) return log_weight;
    auto outside = (log_ratio > v.rollout_log_max) | (log_ratio < v.rollout_log_min);
    return outside ? splat_as<F>(-1e30f) : log_weight;  // e^-1e30 is 0
}

// Sums over the tokens of a sequence that its tokens' terms need.
template <class F>
struct SequenceSums {
    F tokens{}, log_ratio{}, log_weight{}, rollout_log_ratio{}, drift{};
};

template <class Surrogate, class F, class M>
VLMK_HD void add(SequenceSums<F>& sums, const Token<F, M>& t, const GrpoVariant& v) {
    sums.tokens += one_where<F>(t.mask);
    sums.log_ratio += t.log_ratio();
    if constexpr (Surrogate::kSequenceWeight) {
        sums.log_weight += bounded(t.log_ratio());
        if (v.rollout) {
            F correction = at_least(rollout_log_weight(t.rollout_log_ratio(), v), kVespoMinLogWeight);
            sums.log_weight += t.mask ? correction : F{};
        }
    }
    if (v.rollout_sequence) sums.rollout_log_ratio += t.rollout_log_ratio();
    if (v.off_policy_mask) sums.drift += t.drift();
}

// Whether a sequence's tokens need more of it than their number.
template <class Surrogate>
VLMK_HD bool needs_sums(const GrpoVariant& v) {
    return Surrogate::kSequenceWeight || v.sequence_level || v.rollout_sequence || v.off_policy_mask;
}

// What its tokens need to know of a sequence.
struct Sequence {
    float tokens;
    float share;  // the weight of a token
    float ratio;  // at the sequence level
    float log_weight;
    float rollout_log_weight;
    bool drifted;
};

// What all tokens' weights are divided by as far as it is known before the batch is read; finish() has the rest.
VLMK_HD float known_scale(const GrpoLoss& p) {
    float scale = 1.0f / p.divisor;
    return p.num_items == nullptr || *p.num_items == 0.0f ? scale : scale / *p.num_items;
}

VLMK_HD Sequence sequence_of(const SequenceSums<float>& sums, const GrpoLoss& p) {
    const GrpoVariant& v = p.variant;
    float length = sums.tokens > 1.0f ? sums.tokens : 1.0f;
    Sequence q;
    q.tokens = sums.tokens;
    q.share = v.per_length ? known_scale(p) / length : known_scale(p);
    q.ratio = v.sequence_level ? exp(bounded(sums.log_ratio / length)) : 1.0f;
    q.log_weight = at_least(at_most(sums.log_weight, kMaxLogRatio), kVespoMinLogWeight);
    q.rollout_log_weight = rollout_log_weight(v.rollout_mean ? sums.rollout_log_ratio / length : sums.rollout_log_ratio, v);
    q.drifted = v.off_policy_mask && !(sums.drift / length <= v.off_policy_threshold);
    return q;
}

// What a token adds to the loss and the statistics. At the sequence level the part of its gradient that reaches logp through
// the ratio is to be spread evenly over the sequence.
template <class F>
struct TokenTerms {
    F value, direct, through_ratio;
    F low, high, kl, ratio;
    F kept, rollout, effective;  // plain: all three are the mask
};

// Whether each token is for itself and none has a weight of its own: what most calls ask, and the fast path of token_terms.
VLMK_HD bool is_plain(const GrpoVariant& v, const float* entropy_threshold) {
    return !v.sequence_level && !v.rollout && !v.off_policy_mask && entropy_threshold == nullptr;
}

template <class Surrogate, bool kPlain, class F, class M>
VLMK_HD TokenTerms<F> token_terms(const Token<F, M>& t, const Sequence& q, float entropy_threshold, const GrpoVariant& v) {
    TokenTerms<F> r;
    F valid = one_where<F>(t.mask);
    bool sequence_level = !kPlain && v.sequence_level;
    r.ratio = valid * (sequence_level ? splat_as<F>(q.ratio) : exp(bounded(t.log_ratio())));
    r.kept = r.rollout = r.effective = valid;
    F weight = valid;
    if constexpr (!kPlain) {
        r.kept = t.entropy < entropy_threshold ? F{} : valid;
        if (v.rollout) {
            F log_weight =
                v.rollout_sequence ? splat_as<F>(q.rollout_log_weight) : rollout_log_weight(t.rollout_log_ratio(), v);
            r.rollout = valid * exp(log_weight);
        }
        weight = Surrogate::kSequenceWeight ? r.kept : r.kept * r.rollout;
        if (q.drifted) weight = t.adv >= 0.0f ? weight : F{};
        r.effective = one_where<F>(weight > 0.0f);
    }

    Term<F> term = Surrogate::term(t.logp, r.ratio, splat_as<F>(q.log_weight), t.adv, v);
    r.low = valid * term.low;
    r.high = valid * term.high;
    r.value = weight * term.loss;
    r.direct = r.through_ratio = r.kl = F{};
    if (v.kl != 0) {
        KlTerm<F> kl = kl_term(v.kl, bounded(t.ref_logp - t.logp));
        r.kl = valid * kl.kl;
        r.direct = valid * v.beta * kl.dlogp;
        if (v.kl_bias_corrected) {
            r.kl *= r.ratio;
            r.direct *= r.ratio;
            r.through_ratio = v.beta * r.kl;
        }
        r.value += v.beta * r.kl;
    }
    (Surrogate::kThroughRatio ? r.through_ratio : r.direct) += weight * term.dlogp;
    return r;
}

// ---- a token for itself, in the sweep of linear_grpo_loss ----

// The derivative of the loss by a token's log-probability and entropy.
struct TokenGradient {
    float dlogp, dentropy;
};

template <class Surrogate>
VLMK_HD TokenGradient token_gradient_of(const LinearLogps& p, int64_t k, float logp) {
    auto read = [&](const float* data, float otherwise) { return data == nullptr ? otherwise : at_least(data[k], kMinLogp); };
    Token<float, bool> t{};
    t.mask = true;
    t.logp = at_least(logp, kMinLogp);
    t.old_logp = read(p.old_logp, t.logp);
    t.ref_logp = read(p.ref_logp, t.logp);
    t.rollout_logp = read(p.rollout_logp, t.old_logp);
    t.adv = p.advantages[k];
    TokenTerms<float> terms = token_terms<Surrogate, false>(t, Sequence{}, -kMaxLogRatio, p.variant);
    return {(terms.direct + terms.through_ratio) * p.share[k], p.entropy_scale};
}

VLMK_HD TokenGradient token_gradient(const LinearLogps& p, int64_t k, float logp) {
    switch (p.variant.surrogate) {
        case 0:
            return token_gradient_of<PpoClip>(p, k, logp);
        case 1:
            return token_gradient_of<Cispo>(p, k, logp);
        default:
            return token_gradient_of<Sapo>(p, k, logp);  // vespo needs its sequence
    }
}

// ---- the batch ----

VLMK_HD float ratio_of(float a, float b) { return a / (b > 1.0f ? b : 1.0f); }

// The loss and the statistics from the columns of all sequences.
VLMK_HD void finish(const GrpoLoss& p, const float (&total)[kColumns], float* loss, float* stats) {
    bool any = total[kTokens] > 0.0f;
    float policy_scale = p.divide_by_tokens ? ratio_of(1.0f, total[kTokens]) : 1.0f;
    float entropy_scale = -ratio_of(p.entropy_coef, total[kKept]) / p.accumulation_steps;
    float policy_loss = total[kLoss] * policy_scale;
    // Without a coefficient the entropy is a metric, and may be anything.
    *loss = p.entropy_coef == 0.0f ? policy_loss : policy_loss + entropy_scale * total[kKeptEntropy];
    stats[0] = policy_scale;
    stats[1] = entropy_scale;
    stats[2] = policy_loss;
    stats[3] = ratio_of(total[kKl], total[kTokens]);
    stats[4] = ratio_of(total[kEntropy], total[kTokens]);
    stats[5] = ratio_of(total[kLow], total[kUnits]);
    stats[6] = total[kUnits] > 0.0f ? total[kLowMin] : 0.0f;
    stats[7] = ratio_of(total[kHigh], total[kUnits]);
    stats[8] = total[kUnits] > 0.0f ? total[kHighMax] : 0.0f;
    stats[9] = ratio_of(total[kRatio], total[kTokens]);
    stats[10] = any ? total[kRatioMin] : 0.0f;
    stats[11] = any ? total[kRatioMax] : 0.0f;
    stats[12] = total[kTokens];
    stats[13] = total[kEffective];
    stats[14] = ratio_of(total[kRollout], total[kTokens]);
    stats[15] = stats[5] + stats[7];  // a token is clipped at one bound at most
}

}  // namespace vlmk::VLMK_NS
