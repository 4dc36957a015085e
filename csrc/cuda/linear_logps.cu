// Launcher of linear_logps and linear_grpo_loss on a GPU. It does not allocate or synchronize, and works in a CUDA graph.
#include "linear_logps.cuh"

namespace vlmk::cuda {
namespace {

template <class T, class Out>
void run(const LinearLogps& p, uintptr_t stream) {
    // log2(e) inverse, computed in fp64 and rounded once.
    float scale = static_cast<float>(1.4426950408889634 * p.inverse);
    auto kernel = p.softcap > 0.0f ? linear_logps_kernel<T, Out, true> : linear_logps_kernel<T, Out, false>;
    launch("linear_logps_kernel", kernel, p.num_rows, kThreads, stream, p, scale);
}

}  // namespace

void linear_logps(const LinearLogps& p, int device, uintptr_t stream) {
    if (p.vocab > std::numeric_limits<int32_t>::max() - 32 * kThreads) {
        throw std::runtime_error("linear_logps: the vocabulary must be below 2^31, got " + std::to_string(p.vocab));
    }
    DeviceGuard guard(device);
    with_dtypes(p, [&](auto x, auto out) { run<decltype(x), decltype(out)>(p, stream); });
}

}  // namespace vlmk::cuda
