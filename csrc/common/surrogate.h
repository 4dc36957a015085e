// The GRPO loss of one token, or of a vector of tokens: the same rows as vlmkernels/ops/grpo_loss/reference.py.
//
// F is float, or a vector of cpu/simd.h. M is the type of a comparison of two F. Include this header through cpu/grpo.h or
// cuda/grpo.cuh: they define exp(F), and VLMK_NS, a namespace per instruction set and one for CUDA, so that the linker does not
// mix their code.
#pragma once

#include "grpo_loss.h"

#ifndef VLMK_NS
#error "include cpu/grpo.h or cuda/grpo.cuh"
#endif

namespace vlmk::VLMK_NS {

constexpr float kMaxLogRatio = 20.0f;
constexpr float kMinLogp = -1e4f;
constexpr float kMaxPerceptionKl = 10.0f;
constexpr float kVespoMinLogWeight = -18.420680743952367f;  // log 1e-8

template <class F>
VLMK_HD F splat_as(float x) {
    return x - F{};
}
template <class F, class M>
VLMK_HD F one_where(M condition) {
    return condition ? splat_as<F>(1.0f) : F{};
}

// min(x, high) and max(x, low) that keep a NaN. simd.h has the same for vectors.
VLMK_HD float at_most(float x, float high) { return x > high ? high : x; }
VLMK_HD float at_least(float x, float low) { return x < low ? low : x; }
template <class F>
VLMK_HD F bounded(F log_ratio) {
    return at_least(at_most(log_ratio, kMaxLogRatio), -kMaxLogRatio);
}

// ---- surrogates ----

// The loss, its derivative with respect to logp, and two statistics.
template <class F>
struct Term {
    F loss, dlogp, low, high;
};

// -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A)
struct PpoClip {
    static constexpr bool kThroughRatio = true;  // dlogp is the derivative through the ratio
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

// -sigmoid(tau (r - 1)) 4 / tau A, where tau depends on the sign of A
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

// -sg(phi(w)) A logp, where phi(w) = e^lambda w^k e^(-lambda w) and w = e^log_weight is the weight of the sequence
struct Vespo {
    static constexpr bool kThroughRatio = false;
    static constexpr bool kSequenceWeight = true;  // reads log_weight

    template <class F>
    VLMK_HD static Term<F> term(F logp, F, F log_weight, F adv, const GrpoVariant& p) {
        F k = adv >= 0.0f ? splat_as<F>(p.vespo_k_pos) : splat_as<F>(p.vespo_k_neg);
        F lambda = adv >= 0.0f ? splat_as<F>(p.vespo_lambda_pos) : splat_as<F>(p.vespo_lambda_neg);
        F phi = exp(at_most(lambda + k * log_weight - lambda * exp(log_weight), kMaxLogRatio));
        return {-phi * adv * logp, -phi * adv, F{}, phi};
    }
};

// ---- estimators of KL(policy || reference), where x = ref_logp - logp ----

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
VLMK_HD KlTerm<F> kl_term(KlEstimator kl, F x) {
    return kl == KlEstimator::k1 ? K1::term(x) : kl == KlEstimator::k2 ? K2::term(x) : K3::term(x);
}

// ---- PAPO: -gamma min(k3, 10) - eta1 logp - eta2 masked, where k3 is of x = masked - logp; 0 if masked is NaN ----

template <class F>
struct PerceptionTerm {
    F loss, dlogp, dmasked;
    F kl, entropy, clipped, seen;
};

template <class F, class M>
VLMK_HD PerceptionTerm<F> perception_term(M loss_mask, F logp, F masked, const GrpoVariant& v) {
    auto seen = loss_mask & (masked == masked);
    KlTerm<F> k3 = K3::term(bounded(masked - logp));
    auto clipped = seen & (k3.kl > kMaxPerceptionKl);
    F kl = at_most(k3.kl, kMaxPerceptionKl), dkl = v.perception_loss_weight * (clipped ? F{} : k3.dlogp);
    F loss = -v.perception_loss_weight * kl - v.der_loss_weight1 * logp - v.der_loss_weight2 * masked;
    auto where_seen = [&](F x) { return seen ? x : F{}; };
    return {where_seen(loss),
            where_seen(-dkl - v.der_loss_weight1),
            where_seen(dkl - v.der_loss_weight2),
            where_seen(kl),
            where_seen(-masked),
            one_where<F>(clipped),
            one_where<F>(seen)};
}

// Calls f with the struct of the surrogate.
template <class Function>
void with_surrogate(const GrpoVariant& v, Function f) {
    switch (v.surrogate) {
        case GrpoSurrogate::ppo_clip:
            return f(PpoClip{});
        case GrpoSurrogate::cispo:
            return f(Cispo{});
        case GrpoSurrogate::sapo:
            return f(Sapo{});
        case GrpoSurrogate::vespo:
            return f(Vespo{});
    }
}

// ---- a token ----

// The inputs of a token. Where a tensor is not given, old_logp, ref_logp and masked_logp equal logp, rollout_logp equals
// old_logp, and entropy is 0.
template <class F, class M>
struct Token {
    M loss_mask;
    F logp, old_logp, ref_logp, rollout_logp, masked_logp, entropy, adv;

    VLMK_HD F log_ratio() const { return logp - old_logp; }
    // Without a log-probability from the engine (NaN), the token counts as sampled from the policy before this step.
    VLMK_HD F rollout_log_ratio() const { return rollout_logp == rollout_logp ? old_logp - rollout_logp : F{}; }
    VLMK_HD F drift() const { return rollout_logp == rollout_logp ? rollout_logp - logp : F{}; }
};

// The logarithm of the importance-sampling weight, truncated or masked.
template <class F>
VLMK_HD F rollout_log_weight(F log_ratio, const GrpoVariant& v) {
    F log_weight = bounded(at_least(at_most(log_ratio, v.rollout_log_max), v.rollout_log_min));
    if (!v.rollout_mask) return log_weight;
    auto outside = (log_ratio > v.rollout_log_max) | (log_ratio < v.rollout_log_min);
    return outside ? splat_as<F>(-1e30f) : log_weight;  // e^-1e30 is 0
}

// Sums over the tokens of a sequence, which the terms of its tokens depend on.
template <class F>
struct SequenceSums {
    F tokens{}, log_ratio{}, log_weight{}, rollout_log_ratio{}, drift{};
};

template <class Surrogate, class F, class M>
VLMK_HD void add(SequenceSums<F>& sums, const Token<F, M>& t, const GrpoVariant& v) {
    sums.tokens += one_where<F>(t.loss_mask);
    sums.log_ratio += t.log_ratio();
    if constexpr (Surrogate::kSequenceWeight) {
        sums.log_weight += bounded(t.log_ratio());
        if (v.rollout) {
            F correction = at_least(rollout_log_weight(t.rollout_log_ratio(), v), kVespoMinLogWeight);
            sums.log_weight += t.loss_mask ? correction : F{};
        }
    }
    if (v.rollout_sequence) sums.rollout_log_ratio += t.rollout_log_ratio();
    if (v.off_policy_mask) sums.drift += t.drift();
}

// Whether the terms of the tokens depend on any sum besides the number of tokens.
template <class Surrogate>
VLMK_HD bool needs_sums(const GrpoVariant& v) {
    return Surrogate::kSequenceWeight || v.sequence_level || v.rollout_sequence || v.off_policy_mask;
}

// The values of a sequence that the terms of its tokens depend on.
struct Sequence {
    float tokens;
    float share;  // weight of each token
    float ratio;  // if the ratio is per sequence
    float log_weight;
    float rollout_log_weight;
    bool drifted;
};

// The factor of all token weights that is known before the batch is read. finish() computes the rest.
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

// What a token adds to the loss, the gradient (direct + through_ratio) and the statistics. With a ratio per sequence, the sum
// of through_ratio is spread evenly over the tokens of the sequence.
template <class F>
struct TokenTerms {
    F value, direct, through_ratio;
    F low, high, kl, ratio;
    F kept, rollout, effective;  // all three equal the loss mask if the variant is plain
    PerceptionTerm<F> perception{};
};

// Whether tokens do not depend on each other and have no weights of their own: the common case, with a fast path.
VLMK_HD bool is_plain(const GrpoVariant& v, const float* entropy_threshold) {
    return !v.sequence_level && !v.rollout && !v.off_policy_mask && !v.perception && entropy_threshold == nullptr;
}

// kPerception: the variant may have the terms of PAPO.
template <class Surrogate, bool kPlain, bool kPerception, class F, class M>
VLMK_HD TokenTerms<F> token_terms(const Token<F, M>& t, const Sequence& q, float entropy_threshold, const GrpoVariant& v) {
    TokenTerms<F> r;
    F valid = one_where<F>(t.loss_mask);
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
    if (v.kl != KlEstimator::none) {
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
    if (kPerception && v.perception) {
        r.perception = perception_term(t.loss_mask, t.logp, t.masked_logp, v);
        r.value += r.perception.loss;
        r.direct += r.perception.dlogp;
    }
    return r;
}

// ---- the batch ----

// a / max(b, 1)
VLMK_HD float ratio_of(float a, float b) { return a / (b > 1.0f ? b : 1.0f); }

// The loss and the statistics from the columns of all sequences.
VLMK_HD void finish(const GrpoLoss& p, const float (&total)[GrpoColumn::count], float* loss, float* stats) {
    float tokens = total[GrpoColumn::tokens], units = total[GrpoColumn::units];
    float policy_scale = p.divide_by_tokens ? ratio_of(1.0f, tokens) : 1.0f;
    float entropy_scale = -ratio_of(p.entropy_coef, total[GrpoColumn::kept]) / p.accumulation_steps;
    float policy_loss = total[GrpoColumn::loss] * policy_scale;
    float low_mean = ratio_of(total[GrpoColumn::low], units), high_mean = ratio_of(total[GrpoColumn::high], units);
    // Without a coefficient the entropy is only a metric, and may be NaN.
    *loss = p.entropy_coef == 0.0f ? policy_loss : policy_loss + entropy_scale * total[GrpoColumn::kept_entropy];
    stats[GrpoStat::policy_scale] = policy_scale;
    stats[GrpoStat::entropy_scale] = entropy_scale;
    stats[GrpoStat::policy_loss] = policy_loss;
    stats[GrpoStat::kl] = ratio_of(total[GrpoColumn::kl], tokens);
    stats[GrpoStat::entropy] = ratio_of(total[GrpoColumn::entropy], tokens);
    stats[GrpoStat::low_mean] = low_mean;
    stats[GrpoStat::low_min] = units > 0.0f ? total[GrpoColumn::low_min] : 0.0f;
    stats[GrpoStat::high_mean] = high_mean;
    stats[GrpoStat::high_max] = units > 0.0f ? total[GrpoColumn::high_max] : 0.0f;
    stats[GrpoStat::ratio_mean] = ratio_of(total[GrpoColumn::ratio], tokens);
    stats[GrpoStat::ratio_min] = tokens > 0.0f ? total[GrpoColumn::ratio_min] : 0.0f;
    stats[GrpoStat::ratio_max] = tokens > 0.0f ? total[GrpoColumn::ratio_max] : 0.0f;
    stats[GrpoStat::tokens] = tokens;
    stats[GrpoStat::effective_tokens] = total[GrpoColumn::effective];
    stats[GrpoStat::rollout_mean] = ratio_of(total[GrpoColumn::rollout], tokens);
    stats[GrpoStat::region_mean] = low_mean + high_mean;  // a token is clipped at one bound at most
    if (!p.variant.perception) return;
    float seen = total[GrpoColumn::masked_tokens];
    stats[GrpoStat::masked_kl] = ratio_of(total[GrpoColumn::masked_kl], seen);
    stats[GrpoStat::masked_entropy] = ratio_of(total[GrpoColumn::masked_entropy], seen);
    stats[GrpoStat::masked_clipped] = ratio_of(total[GrpoColumn::masked_clipped], seen);
    stats[GrpoStat::masked_tokens] = seen;
}

}  // namespace vlmk::VLMK_NS
