// The gradient of the GRPO loss with respect to one token's logp and entropy: the "objective" stage of linear_logps.h.
// Include it as surrogate.h.
#pragma once

#include "linear_logps.h"
#include "surrogate.h"

namespace vlmk::VLMK_NS {

struct TokenGradient {
    float dlogp, dentropy;
};

template <class Surrogate>
VLMK_HD TokenGradient token_gradient_of(const LinearLogps& p, int64_t k, float logp) {
    auto read = [&](const float* data, float otherwise) { return data == nullptr ? otherwise : at_least(data[k], kMinLogp); };
    Token<float, bool> t{};
    t.loss_mask = true;
    t.logp = at_least(logp, kMinLogp);
    t.old_logp = read(p.old_logp, t.logp);
    t.ref_logp = read(p.ref_logp, t.logp);
    t.rollout_logp = read(p.rollout_logp, t.old_logp);
    t.masked_logp = read(p.masked_logp, t.logp);
    t.adv = p.advantages[k];
    TokenTerms<float> terms = token_terms<Surrogate, false, true>(t, Sequence{}, -kMaxLogRatio, p.variant);
    return {(terms.direct + terms.through_ratio) * p.share[k], p.entropy_scale};
}

// The surrogates whose tokens do not depend on each other: all but vespo.
VLMK_HD TokenGradient token_gradient(const LinearLogps& p, int64_t k, float logp) {
    switch (p.variant.surrogate) {
        case GrpoSurrogate::ppo_clip:
            return token_gradient_of<PpoClip>(p, k, logp);
        case GrpoSurrogate::cispo:
            return token_gradient_of<Cispo>(p, k, logp);
        default:
            return token_gradient_of<Sapo>(p, k, logp);
    }
}

}  // namespace vlmk::VLMK_NS
