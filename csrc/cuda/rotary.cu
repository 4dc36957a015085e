// Launcher of rotary on a GPU. It does not allocate or synchronize, and can be captured in a CUDA graph.
#include "rotary.cuh"

namespace vlmk::cuda {
namespace {

template <class T>
bool is_aligned(const RotaryHeads& heads) {
    int64_t strides = heads.stride_batch | heads.stride_token | heads.stride_head;
    return (reinterpret_cast<uintptr_t>(heads.x) | reinterpret_cast<uintptr_t>(heads.out)) % 16 == 0 && strides % kVec<T> == 0;
}

template <class T>
void rotate(const Rotary& p, uintptr_t stream) {
    bool vectors = p.pairs % kVec<T> == 0 && p.width % kVec<T> == 0 && is_aligned<T>(p.query) && is_aligned<T>(p.key);
    auto kernel = vectors ? rotary_kernel<T, kVec<T>> : rotary_kernel<T, 1>;
    launch("rotary_kernel", kernel, p.batch * p.tokens, kRotaryThreads, stream, p);
}

}  // namespace

void rotary(const Rotary& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto x) { rotate<decltype(x)>(p, stream); });
}

}  // namespace vlmk::cuda
