// Arguments of grpo_loss on every device. vlmkernels/ops/grpo_loss/native.py fills them in. Formulas: surrogate.h.
#pragma once

#include "dtypes.h"

namespace vlmk {

// The rows of the tables in surrogate.h. vlmkernels/ops/grpo_loss/reference.py has the same rows under the same names.
VLMK_ENUM(GrpoSurrogate, ppo_clip, cispo, sapo, vespo)
VLMK_ENUM(KlEstimator, none, k1, k2, k3)

// The settings of vlmkernels/ops/grpo_loss/config.py that the kernels read.
struct GrpoVariant {
    VLMK_STRUCT(GrpoVariant);
    VLMK_FIELD(GrpoSurrogate, surrogate);
    VLMK_FIELD(KlEstimator, kl);
    VLMK_FIELD(bool, sequence_level);     // one ratio per sequence instead of one per token
    VLMK_FIELD(bool, kl_bias_corrected);  // the KL term is multiplied by the ratio
    VLMK_FIELD(bool, per_length);         // the weight of a token is divided by the number of tokens of its sequence
    VLMK_FIELD(bool, rollout);            // importance sampling: correct the policy term for the policy that sampled
    VLMK_FIELD(bool, rollout_sequence);   // with one weight per sequence
    VLMK_FIELD(bool, rollout_mean);       // from the mean of the log-ratios instead of their sum
    VLMK_FIELD(bool, rollout_mask);       // a ratio outside of the bounds gives weight 0 instead of the bound
    VLMK_FIELD(bool, off_policy_mask);
    VLMK_FIELD(bool, perception);  // with the terms of PAPO

    VLMK_FIELD(float, epsilon_low);
    VLMK_FIELD(float, epsilon_high);
    VLMK_FIELD(float, delta);
    VLMK_FIELD(float, sapo_temperature_pos);
    VLMK_FIELD(float, sapo_temperature_neg);
    VLMK_FIELD(float, vespo_k_pos);
    VLMK_FIELD(float, vespo_lambda_pos);
    VLMK_FIELD(float, vespo_k_neg);
    VLMK_FIELD(float, vespo_lambda_neg);
    VLMK_FIELD(float, beta);
    VLMK_FIELD(float, perception_loss_weight);
    VLMK_FIELD(float, der_loss_weight1);
    VLMK_FIELD(float, der_loss_weight2);
    VLMK_FIELD(float, rollout_log_min);
    VLMK_FIELD(float, rollout_log_max);
    VLMK_FIELD(float, off_policy_threshold);
};

// Partial results of a sequence: sums over its tokens, then minima and maxima from ratio_min on. The columns masked_* are used
// with perception.
VLMK_INDEX(GrpoColumn,
           loss,            // sum of share * value
           tokens,          // number of tokens in the loss
           units,           // divisor of low and high: number of tokens, or 1 for statistics of the sequence
           low,             //
           high,            //
           kl,              //
           entropy,         //
           kept,            // number of tokens at or above the entropy threshold
           kept_entropy,    // their entropy
           ratio,           //
           rollout,         //
           effective,       // number of tokens whose policy term is not 0
           masked_kl,       //
           masked_entropy,  //
           masked_clipped,  // number of tokens whose perception KL has reached its bound
           masked_tokens,   // number of tokens that have masked images
           ratio_min,       //
           ratio_max,       //
           low_min,         // low / units
           high_max)        // high / units

// The results of the batch in GrpoLoss::stats. vlmkernels/ops/grpo_loss has the same names in its STATS. The last four are
// written with perception.
VLMK_INDEX(GrpoStat, policy_scale, entropy_scale, policy_loss, kl, entropy, low_mean, low_min, high_mean, high_max, ratio_mean,
           ratio_min, ratio_max, tokens, effective_tokens, rollout_mean, region_mean, masked_kl, masked_entropy, masked_clipped,
           masked_tokens)

struct GrpoLoss {
    VLMK_STRUCT(GrpoLoss);
    VLMK_FIELD(GrpoVariant, variant);
    VLMK_FIELD(int64_t, num_sequences);      // S
    VLMK_FIELD(int64_t, num_tokens);         // of all sequences, padding included
    VLMK_FIELD(const int32_t*, cu_seqlens);  // (S + 1,): offsets of packed sequences; null: sequence s is row s of (S, T)

    // A sequence starts at s * stride, or at cu_seqlens[s]. Null: the tensor is not given.
    VLMK_FIELD(const float*, logp);
    VLMK_FIELD(const float*, old_logp);
    VLMK_FIELD(const float*, ref_logp);
    VLMK_FIELD(const float*, rollout_logp);  // NaN: the engine returned none for this token
    VLMK_FIELD(const float*, masked_logp);   // NaN: the token has no masked images
    VLMK_FIELD(const float*, entropy);
    VLMK_FIELD(const float*, advantages);
    VLMK_FIELD(const bool*, loss_mask);
    VLMK_FIELD(int64_t, logp_stride);
    VLMK_FIELD(int64_t, old_logp_stride);
    VLMK_FIELD(int64_t, ref_logp_stride);
    VLMK_FIELD(int64_t, rollout_logp_stride);
    VLMK_FIELD(int64_t, masked_logp_stride);
    VLMK_FIELD(int64_t, entropy_stride);
    VLMK_FIELD(int64_t, advantages_stride);
    VLMK_FIELD(int64_t, loss_mask_stride);
    VLMK_FIELD(bool, advantage_per_token);

    VLMK_FIELD(const float*, entropy_threshold);  // () or null
    VLMK_FIELD(const float*, num_items);          // () on the device of logp, or null
    VLMK_FIELD(float, divisor);                   // of the policy loss
    VLMK_FIELD(bool, divide_by_tokens);           // policy_scale is 1 / the number of tokens in the loss
    VLMK_FIELD(float, entropy_coef);
    VLMK_FIELD(float, accumulation_steps);

    VLMK_FIELD(float*, partial);   // CUDA: (S, GrpoColumn::count) workspace
    VLMK_FIELD(float*, dlogp);     // (S, T) or (N,), contiguous, not yet multiplied by policy_scale
    VLMK_FIELD(float*, dentropy);  // like dlogp, not yet multiplied by entropy_scale; null: not computed
    VLMK_FIELD(float*, dmasked);   // like dlogp; null without perception
    VLMK_FIELD(float*, loss);      // ()
    VLMK_FIELD(float*, stats);     // (GrpoStat::count,)
};

}  // namespace vlmk
