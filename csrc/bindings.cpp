// The Python module vlmkernels._C. It receives addresses, sizes, strides and a stream, and does not depend on torch.
//
// For every op of ops.h it has the Params struct and NAME_cpu(params, threads); if it is built with CUDA, it also has
// NAME_cuda(params, device, stream).
#include <cstdlib>

#include "ops.h"
#include "params.h"

#ifdef VLMK_X86
#define VLMK_CPU(OP) (isa == "avx512" ? avx512::OP : isa == "avx2" ? avx2::OP : baseline::OP)
#else
#define VLMK_CPU(OP) baseline::OP
#endif

// tests/simt sets the device type to "cpu": it runs the CUDA kernels on the host, without those of csrc/cpu.
#ifndef VLMK_CUDA_DEVICE_TYPE
#define VLMK_CUDA_DEVICE_TYPE "cuda"
#define VLMK_HAS_CPU_OPS
#endif

namespace {

using namespace vlmk;

// The best instruction set that this processor supports, or the lesser one in VLMKERNELS_CPU_ISA.
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
    const char* variable = std::getenv("VLMKERNELS_CPU_ISA");
    if (variable == nullptr) return best;
    std::string isa = variable;
    if (isa == "baseline" || isa == best || (isa == "avx2" && best == "avx512")) return isa;
    throw std::invalid_argument("VLMKERNELS_CPU_ISA must be at most " + best + " (of baseline, avx2, avx512), got " + isa);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    std::string isa = choose_isa();
    m.attr("cpu_isa") = isa;
    m.attr("cuda_device_type") = VLMK_CUDA_DEVICE_TYPE;
    m.attr("surrogates") = name_tuple(names_of(GrpoSurrogate{}));
    m.attr("kl_estimators") = name_tuple(names_of(KlEstimator{}));
    m.attr("grpo_columns") = name_tuple(GrpoColumn::kNames);
    m.attr("grpo_stats") = name_tuple(GrpoStat::kNames);
    m.attr("decode_max_width") = kDecodeMaxWidth;
    m.attr("rotary_max_pairs") = kRotaryMaxPairs;
    m.attr("token_block") = kTokenBlock;

    def_struct<DecodeAttention>(m);
    def_struct<FewRowsLinear>(m);
    def_struct<GatherLogps>(m);
    def_struct<GroupAdvantages>(m);
    def_struct<GrpoVariant>(m);
    def_struct<GrpoLoss>(m);
    def_struct<LinearKlSide>(m);
    def_struct<LinearKl>(m);
    def_struct<LinearLogps>(m);
    def_struct<PackPatches>(m);
    def_struct<RotaryHeads>(m);
    def_struct<RotaryTable>(m);
    def_struct<Rotary>(m);
    def_struct<SampleLogps>(m);

    auto nogil = py::call_guard<py::gil_scoped_release>();
#ifdef VLMK_HAS_CPU_OPS
#define VLMK_DEF_CPU(NAME, PARAMS) m.def(#NAME "_cpu", VLMK_CPU(NAME), nogil);
    VLMK_OPS(VLMK_DEF_CPU)
    VLMK_CPU_OPS(VLMK_DEF_CPU)
#endif
#ifdef VLMK_CUDA_ARCHS
    m.attr("cuda_architectures") = VLMK_CUDA_ARCHS;
#define VLMK_DEF_CUDA(NAME, PARAMS) m.def(#NAME "_cuda", cuda::NAME, nogil);
    VLMK_OPS(VLMK_DEF_CUDA)
#else
    m.attr("cuda_architectures") = "";
#endif
}
