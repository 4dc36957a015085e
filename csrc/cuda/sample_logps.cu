// Launcher of sample_logps on a GPU. It does not allocate or synchronize, and works in a CUDA graph.
#include "sample_logps.cuh"

namespace vlmk::cuda {
namespace {

template <class T>
void run(const SampleLogps& p, uintptr_t stream) {
    // log2(e) / temperature, computed in fp64 and rounded once.
    float scale = static_cast<float>(1.4426950408889634 / p.temperature);
    int64_t warps = p.num_rows * blocks_of(p);
    launch("sample_sums_kernel", sample_sums_kernel<T>, (warps + kWarps - 1) / kWarps, kThreads, stream, p, scale);
    launch("sample_draw_kernel", sample_draw_kernel<T>, p.num_rows, kDrawThreads, stream, p, scale);
}

}  // namespace

void sample_logps(const SampleLogps& p, int device, uintptr_t stream) {
    if (p.vocab > std::numeric_limits<int32_t>::max() - 2 * kTokenBlock) {
        throw std::runtime_error("sample_logps: the vocabulary must be below 2^31, got " + std::to_string(p.vocab));
    }
    DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto x) { run<decltype(x)>(p, stream); });
}

}  // namespace vlmk::cuda
