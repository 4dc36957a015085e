// Every op: its function and its Params struct. On the CPU it is NAME(params, threads), compiled once per instruction set; on a
// GPU it is NAME(params, device, stream).
#pragma once

#include <cstdint>

#include "common/decode_attention.h"
#include "common/few_rows_linear.h"
#include "common/gather_logps.h"
#include "common/group_advantages.h"
#include "common/grpo_loss.h"
#include "common/linear_kl.h"
#include "common/linear_logps.h"
#include "common/pack_patches.h"
#include "common/rotary.h"
#include "common/sample_logps.h"

#define VLMK_OPS(OP)                      \
    OP(decode_attention, DecodeAttention) \
    OP(gather_logps_fwd, GatherLogps)     \
    OP(gather_logps_bwd, GatherLogps)     \
    OP(group_advantages, GroupAdvantages) \
    OP(grpo_loss, GrpoLoss)               \
    OP(linear_kl, LinearKl)               \
    OP(linear_logps, LinearLogps)         \
    OP(pack_patches, PackPatches)         \
    OP(rotary, Rotary)                    \
    OP(sample_logps, SampleLogps)

// Ops that only the CPU has.
#define VLMK_CPU_OPS(OP) OP(few_rows_linear, FewRowsLinear)

#define VLMK_DECLARE_CPU(NAME, PARAMS) void NAME(const PARAMS&, int threads);
#define VLMK_DECLARE_CUDA(NAME, PARAMS) void NAME(const PARAMS&, int device, uintptr_t stream);

namespace vlmk::baseline {
VLMK_OPS(VLMK_DECLARE_CPU)
VLMK_CPU_OPS(VLMK_DECLARE_CPU)
}  // namespace vlmk::baseline
namespace vlmk::avx2 {
VLMK_OPS(VLMK_DECLARE_CPU)
VLMK_CPU_OPS(VLMK_DECLARE_CPU)
}  // namespace vlmk::avx2
namespace vlmk::avx512 {
VLMK_OPS(VLMK_DECLARE_CPU)
VLMK_CPU_OPS(VLMK_DECLARE_CPU)
}  // namespace vlmk::avx512
namespace vlmk::cuda {
VLMK_OPS(VLMK_DECLARE_CUDA)
}
