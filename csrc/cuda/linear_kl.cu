// Launcher of linear_kl on a GPU. It does not allocate or synchronize, and works in a CUDA graph.
#include "linear_kl.cuh"

namespace vlmk::cuda {
namespace {

template <class Divergence>
void run(const LinearKl& p, uintptr_t stream) {
    // log2(e) inverse, computed in fp64 and rounded once.
    auto scale = [](const LinearKlSide& side) { return static_cast<float>(1.4426950408889634 * side.inverse); };
    launch("linear_kl_kernel", linear_kl_kernel<Divergence>, p.num_rows, kThreads, stream, p, scale(p.student),
           scale(p.teacher));
}

}  // namespace

void linear_kl(const LinearKl& p, int device, uintptr_t stream) {
    if (p.vocab > std::numeric_limits<int32_t>::max() - 32 * kThreads) {
        throw std::runtime_error("linear_kl: the vocabulary must be below 2^31, got " + std::to_string(p.vocab));
    }
    DeviceGuard guard(device);
    auto kernel = p.beta == 0.0f ? run<Forward> : p.beta == 1.0f ? run<Reverse> : run<Mixture>;
    kernel(p, stream);
}

}  // namespace vlmk::cuda
