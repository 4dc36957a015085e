// The Python module vlmkernels._C: addresses, sizes, strides and a stream. It knows nothing of torch.
//
// An op has a Params struct (common/<op>.h) and functions <name>_cpu(params, threads) and, where the module is built with
// CUDA, <name>_cuda(params, device, stream).
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "common/gather_logps.h"
#include "common/group_advantages.h"
#include "common/grpo_loss.h"
#include "common/linear_logps.h"
#include "common/pack_patches.h"
#include "common/params.h"
#include "common/rotary.h"

// The functions of every op: on the CPU once per instruction set.
#define VLMK_CPU_OPS(ISA)                               \
    namespace vlmk::ISA {                               \
    void gather_logps_fwd(const GatherLogps&, int);     \
    void gather_logps_bwd(const GatherLogps&, int);     \
    void group_advantages(const GroupAdvantages&, int); \
    void grpo_loss(const GrpoLoss&, int);               \
    void linear_logps(const LinearLogps&, int);         \
    void pack_patches(const PackPatches&, int);         \
    void rotary(const Rotary&, int);                    \
    }
VLMK_CPU_OPS(baseline)
#ifdef VLMK_X86
VLMK_CPU_OPS(avx2)
VLMK_CPU_OPS(avx512)
#define VLMK_CPU(OP) (isa == "avx512" ? avx512::OP : isa == "avx2" ? avx2::OP : baseline::OP)
#else
#define VLMK_CPU(OP) baseline::OP
#endif

#ifdef VLMK_CUDA_ARCHS
namespace vlmk::cuda {
void gather_logps_fwd(const GatherLogps&, int, uintptr_t);
void gather_logps_bwd(const GatherLogps&, int, uintptr_t);
void group_advantages(const GroupAdvantages&, int, uintptr_t);
void grpo_loss(const GrpoLoss&, int, uintptr_t);
void linear_logps(const LinearLogps&, int, uintptr_t);
void pack_patches(const PackPatches&, int, uintptr_t);
void rotary(const Rotary&, int, uintptr_t);
}  // namespace vlmk::cuda
#define VLMK_CUDA(OP) cuda::OP
#else
#define VLMK_CUDA_ARCHS ""
#define VLMK_CUDA(OP) nullptr
#endif

// "cpu" in the build that runs the CUDA kernels on the host (tests/simt).
#ifndef VLMK_CUDA_DEVICE_TYPE
#define VLMK_CUDA_DEVICE_TYPE "cuda"
#endif

namespace {

using namespace vlmk;

// The best instruction set that this processor runs, or the lesser one that VLMKERNELS_CPU_ISA names.
std::string choose_isa() {
    std::string best = "baseline";
#ifdef VLMK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = "avx2";
    if (best == "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        best = "avx512";
    }
#endif
    const char* wanted = std::getenv("VLMKERNELS_CPU_ISA");
    if (wanted == nullptr || wanted == best || std::string(wanted) == "baseline") return wanted == nullptr ? best : wanted;
    if (std::string(wanted) == "avx2" && best == "avx512") return wanted;
    throw std::invalid_argument("VLMKERNELS_CPU_ISA must be at most " + best + " (of baseline, avx2, avx512), got " + wanted);
}

template <class Params>
using CpuFunction = void (*)(const Params&, int threads);
template <class T>
struct Identity {
    using type = T;
};
template <class Params>
using CudaFunction = typename Identity<void (*)(const Params&, int device, uintptr_t stream)>::type;

template <class Params>
void def(py::module_& m, const std::string& name, CpuFunction<Params> cpu, CudaFunction<Params> cuda) {
    auto nogil = py::call_guard<py::gil_scoped_release>();
    m.def((name + "_cpu").c_str(), cpu, nogil);
    if (cuda != nullptr) m.def((name + "_cuda").c_str(), cuda, nogil);
}

template <size_t kCount>
py::tuple names(const char* const (&table)[kCount]) {
    py::tuple result(kCount);
    for (size_t i = 0; i < kCount; ++i) result[i] = table[i];
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    std::string isa = choose_isa();
    m.attr("cpu_isa") = isa;
    m.attr("cuda_architectures") = VLMK_CUDA_ARCHS;
    m.attr("cuda_device_type") = VLMK_CUDA_DEVICE_TYPE;

#define VLMK_DEF(OP) def(m, #OP, VLMK_CPU(OP), VLMK_CUDA(OP))

    ParamsClass<GatherLogps>(m, "GatherLogps")
#define VLMK_FIELD(F) .field(#F, &GatherLogps::F)
        VLMK_FIELD(logits) VLMK_FIELD(dtype) VLMK_FIELD(num_rows) VLMK_FIELD(num_results) VLMK_FIELD(vocab) VLMK_FIELD(inner)
            VLMK_FIELD(stride_outer) VLMK_FIELD(stride_inner) VLMK_FIELD(targets) VLMK_FIELD(mask) VLMK_FIELD(temperature)
                VLMK_FIELD(rows) VLMK_FIELD(logp) VLMK_FIELD(entropy) VLMK_FIELD(stats) VLMK_FIELD(partial) VLMK_FIELD(splits)
                    VLMK_FIELD(dlogp) VLMK_FIELD(dentropy) VLMK_FIELD(starts) VLMK_FIELD(dlogits) VLMK_FIELD(grad_stride_outer)
                        VLMK_FIELD(grad_stride_inner);
#undef VLMK_FIELD
    VLMK_DEF(gather_logps_fwd);
    VLMK_DEF(gather_logps_bwd);

#define VLMK_FIELD(F) .field(#F, &GroupAdvantages::F)
    ParamsClass<GroupAdvantages>(m, "GroupAdvantages") VLMK_FIELD(num) VLMK_FIELD(functions) VLMK_FIELD(num_groups)
        VLMK_FIELD(starts) VLMK_FIELD(rewards) VLMK_FIELD(weights) VLMK_FIELD(scale) VLMK_FIELD(baseline)
            VLMK_FIELD(normalize_first) VLMK_FIELD(eps) VLMK_FIELD(advantages) VLMK_FIELD(total) VLMK_FIELD(mean)
                VLMK_FIELD(std) VLMK_FIELD(degenerate);
#undef VLMK_FIELD
    VLMK_DEF(group_advantages);

    m.attr("surrogates") = names(kSurrogates);
    m.attr("kl_estimators") = names(kKlEstimators);
    m.attr("grpo_columns") = static_cast<int>(kColumns);
#define VLMK_FIELD(F) .field(#F, &GrpoVariant::F)
    ParamsClass<GrpoVariant>(m, "GrpoVariant") VLMK_FIELD(surrogate) VLMK_FIELD(kl) VLMK_FIELD(sequence_level)
        VLMK_FIELD(kl_bias_corrected) VLMK_FIELD(per_length) VLMK_FIELD(rollout) VLMK_FIELD(rollout_sequence)
            VLMK_FIELD(rollout_mean) VLMK_FIELD(rollout_mask) VLMK_FIELD(off_policy_mask) VLMK_FIELD(epsilon_low)
                VLMK_FIELD(epsilon_high) VLMK_FIELD(delta) VLMK_FIELD(sapo_temperature_pos) VLMK_FIELD(sapo_temperature_neg)
                    VLMK_FIELD(vespo_k_pos) VLMK_FIELD(vespo_lambda_pos) VLMK_FIELD(vespo_k_neg) VLMK_FIELD(vespo_lambda_neg)
                        VLMK_FIELD(beta) VLMK_FIELD(rollout_log_min) VLMK_FIELD(rollout_log_max)
                            VLMK_FIELD(off_policy_threshold);
#undef VLMK_FIELD
#define VLMK_FIELD(F) .field(#F, &GrpoLoss::F)
    ParamsClass<GrpoLoss>(m, "GrpoLoss") VLMK_FIELD(variant) VLMK_FIELD(num_sequences) VLMK_FIELD(num_tokens)
        VLMK_FIELD(cu_seqlens) VLMK_FIELD(logp) VLMK_FIELD(old_logp) VLMK_FIELD(ref_logp) VLMK_FIELD(rollout_logp)
            VLMK_FIELD(entropy) VLMK_FIELD(advantages) VLMK_FIELD(mask) VLMK_FIELD(logp_stride) VLMK_FIELD(old_logp_stride)
                VLMK_FIELD(ref_logp_stride) VLMK_FIELD(rollout_logp_stride) VLMK_FIELD(entropy_stride)
                    VLMK_FIELD(advantages_stride) VLMK_FIELD(mask_stride) VLMK_FIELD(advantage_per_token)
                        VLMK_FIELD(entropy_threshold) VLMK_FIELD(num_items) VLMK_FIELD(divisor) VLMK_FIELD(divide_by_tokens)
                            VLMK_FIELD(entropy_coef) VLMK_FIELD(accumulation_steps) VLMK_FIELD(partial) VLMK_FIELD(dlogp)
                                VLMK_FIELD(dentropy) VLMK_FIELD(loss) VLMK_FIELD(stats);
#undef VLMK_FIELD
    VLMK_DEF(grpo_loss);

#define VLMK_FIELD(F) .field(#F, &LinearLogps::F)
    ParamsClass<LinearLogps>(m, "LinearLogps") VLMK_FIELD(logits) VLMK_FIELD(dtype) VLMK_FIELD(num_rows) VLMK_FIELD(vocab)
        VLMK_FIELD(targets) VLMK_FIELD(inverse) VLMK_FIELD(softcap) VLMK_FIELD(logit_scale) VLMK_FIELD(hidden)
            VLMK_FIELD(weight) VLMK_FIELD(bias) VLMK_FIELD(operand_dtype) VLMK_FIELD(width) VLMK_FIELD(hidden_stride)
                VLMK_FIELD(weight_stride) VLMK_FIELD(weight_step) VLMK_FIELD(read) VLMK_FIELD(logp) VLMK_FIELD(entropy)
                    VLMK_FIELD(stats) VLMK_FIELD(objective) VLMK_FIELD(variant) VLMK_FIELD(old_logp) VLMK_FIELD(ref_logp)
                        VLMK_FIELD(rollout_logp) VLMK_FIELD(advantages) VLMK_FIELD(share) VLMK_FIELD(entropy_scale)
                            VLMK_FIELD(write) VLMK_FIELD(dlogits) VLMK_FIELD(dlogits_stride) VLMK_FIELD(dlogp)
                                VLMK_FIELD(dentropy);
#undef VLMK_FIELD
    VLMK_DEF(linear_logps);

#define VLMK_FIELD(F) .field(#F, &PackPatches::F)
    ParamsClass<PackPatches>(m, "PackPatches") VLMK_FIELD(images) VLMK_FIELD(num_images) VLMK_FIELD(num_rows)
        VLMK_FIELD(patch_size) VLMK_FIELD(merge_size) VLMK_FIELD(temporal_patch_size) VLMK_FIELD(channels_last)
            VLMK_FIELD(element_size) VLMK_FIELD(table) VLMK_FIELD(rows) VLMK_FIELD(fresh);
#undef VLMK_FIELD
    VLMK_DEF(pack_patches);

    m.attr("rotary_max_pairs") = kRotaryMaxPairs;
#define VLMK_FIELD(F) .field(#F, &RotaryHeads::F)
    ParamsClass<RotaryHeads>(m, "RotaryHeads") VLMK_FIELD(x) VLMK_FIELD(out) VLMK_FIELD(num) VLMK_FIELD(stride_batch)
        VLMK_FIELD(stride_token) VLMK_FIELD(stride_head);
#undef VLMK_FIELD
#define VLMK_FIELD(F) .field(#F, &RotaryTable::F)
    ParamsClass<RotaryTable>(m, "RotaryTable") VLMK_FIELD(values) VLMK_FIELD(stride_batch) VLMK_FIELD(stride_token);
#undef VLMK_FIELD
#define VLMK_FIELD(F) .field(#F, &Rotary::F)
    ParamsClass<Rotary>(m, "Rotary") VLMK_FIELD(query) VLMK_FIELD(key) VLMK_FIELD(cos) VLMK_FIELD(sin) VLMK_FIELD(dtype)
        VLMK_FIELD(table_dtype) VLMK_FIELD(batch) VLMK_FIELD(tokens) VLMK_FIELD(width) VLMK_FIELD(pairs) VLMK_FIELD(inverse);
#undef VLMK_FIELD
    VLMK_DEF(rotary);
}
