// Arguments of grpo_loss on every device, filled in by vlmkernels/ops/grpo_loss/native.py. The formulas: surrogate.h.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace vlmk {

// The rows of the tables in surrogate.h, in the order of GrpoVariant::surrogate and ::kl.
constexpr const char* kSurrogates[] = {"ppo_clip", "cispo", "sapo", "vespo"};
constexpr const char* kKlEstimators[] = {"none", "k1", "k2", "k3"};

// What a configuration decides: vlmkernels/ops/grpo_loss/config.py.
struct GrpoVariant {
    int32_t surrogate;
    int32_t kl;
    bool sequence_level;     // the ratio is that of the sequence
    bool kl_bias_corrected;  // the KL term is multiplied by the ratio
    bool per_length;         // the weight of a token is divided by |y|
    bool rollout;            // the policy term is corrected for the policy that sampled
    bool rollout_sequence;   // by the ratio of the sequence, of the sum or
    bool rollout_mean;       // the mean of its log-ratios
    bool rollout_mask;       // a ratio out of bounds counts as 0, not as the bound
    bool off_policy_mask;

    float epsilon_low;
    float epsilon_high;
    float delta;
    float sapo_temperature_pos;
    float sapo_temperature_neg;
    float vespo_k_pos;
    float vespo_lambda_pos;
    float vespo_k_neg;
    float vespo_lambda_neg;
    float beta;
    float rollout_log_min;
    float rollout_log_max;
    float off_policy_threshold;
};

// What a sequence adds to the batch, as floats side by side; those from kRatioMin on are not sums.
enum GrpoColumn {
    kLoss,    // sum of share * value
    kTokens,  // that the mask holds
    kUnits,   // what kLow and kHigh are to be divided by: tokens, or one sequence
    kLow,
    kHigh,
    kKl,
    kEntropy,
    kKept,  // tokens that the entropy threshold leaves
    kKeptEntropy,
    kRatio,
    kRollout,
    kEffective,  // tokens whose policy term counts
    kRatioMin,
    kRatioMax,
    kLowMin,  // kLow / kUnits of the sequence
    kHighMax,
    kColumns
};

struct GrpoLoss {
    GrpoVariant variant;
    int64_t num_sequences;
    int64_t num_tokens;         // of all sequences, padding included
    const int32_t* cu_seqlens;  // (S + 1,), or null: sequence s is row s of (S, T)

    // Sequence s of a tensor starts at s * stride, or at cu_seqlens[s]. Null: not given.
    const float* logp;
    const float* old_logp;
    const float* ref_logp;
    const float* rollout_logp;  // NaN: not scored
    const float* entropy;
    const float* advantages;
    const bool* mask;
    int64_t logp_stride;
    int64_t old_logp_stride;
    int64_t ref_logp_stride;
    int64_t rollout_logp_stride;
    int64_t entropy_stride;
    int64_t advantages_stride;
    int64_t mask_stride;
    bool advantage_per_token;

    const float* entropy_threshold;  // () or null
    const float* num_items;          // () on the device of logp, or null
    float divisor;                   // of the policy loss
    bool divide_by_tokens;           // ... and by the number of tokens: in policy_scale
    float entropy_coef;
    float accumulation_steps;

    float* partial;   // CUDA: (S, kColumns) workspace
    float* dlogp;     // (S, T) or (N,), contiguous, without policy_scale
    float* dentropy;  // likewise, without entropy_scale; null: not wanted
    float* loss;      // ()
    float* stats;     // (16,), the order of STATS in vlmkernels/ops/grpo_loss/batch.py
};

}  // namespace vlmk
