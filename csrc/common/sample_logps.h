// Arguments of sample_logps on every device. vlmkernels/ops/sample_logps/native.py fills them in.
//
// Let x be a row of logits, s its scores (x with the repetition penalty; -infinity for banned tokens), m and n the maxima of x
// and s, c = log2(e) / temperature, and e_v = 2^((s_v - n) c), or 0 below 2^-126. top_k, top_p and min_p keep the tokens with
// s_v > t, and the first `ties` of those with s_v = t. Over the kept tokens,
//   id      the last token with e_id > 0 and sum_{v < id} e_v <= u sum_v e_v
// This is the token with sum_{v < id} q_v <= u < sum_{v <= id} q_v for their probabilities q, also after rounding.
//   logp    log of p_id = exp((x_id - m) / temperature) / sum_v exp((x_v - m) / temperature), over all tokens
//
// The sum of e in each block of kTokenBlock tokens is rounded to fp32; sums of blocks are fp64. Within the block that has the
// token, e is computed again and summed in fp64, and u is scaled to this sum. So tokens keep their share of a block, whatever
// their probability.
#pragma once

#include "dtypes.h"

namespace vlmk {

constexpr int64_t kTokenBlock = 1024;

struct SampleLogps {
    VLMK_STRUCT(SampleLogps);
    VLMK_FIELD(const void*, logits);  // (N, V)
    VLMK_FIELD(DType, dtype);
    VLMK_FIELD(int64_t, num_rows);  // N
    VLMK_FIELD(int64_t, vocab);     // V
    VLMK_FIELD(int64_t, stride);    // between rows

    VLMK_FIELD(const double*, uniform);  // (N,); null: the greatest score
    VLMK_FIELD(const bool*, seen);       // (N, V); null: no repetition penalty
    VLMK_FIELD(int64_t, seen_stride);
    VLMK_FIELD(const bool*, banned);          // (A, V); null: none
    VLMK_FIELD(const int64_t*, banned_rows);  // (N,): the row of `banned` of each row; null: row 0
    VLMK_FIELD(int64_t, num_banned);          // A

    VLMK_FIELD(float, temperature);
    VLMK_FIELD(int64_t, top_k);         // 0: all
    VLMK_FIELD(float, removable);       // the share of the mass that top_p removes at most; 0: nothing
    VLMK_FIELD(float, min_p_distance);  // min_p keeps s_v >= n + min_p_distance; -infinity: all
    VLMK_FIELD(float, repetition_penalty);

    VLMK_FIELD(int64_t*, ids);  // (N,); -1: a logit is NaN or +infinity; -2: no token can be sampled
    VLMK_FIELD(float*, logps);  // (N,), like the next two
    VLMK_FIELD(float*, log_kept_mass);
    VLMK_FIELD(float*, entropy);

    VLMK_FIELD(float*, workspace);  // CUDA: (N, ceil(V / kTokenBlock), 6)
};

}  // namespace vlmk
