// Launcher of grpo_loss on a GPU: two kernels. It does not allocate or synchronize.
#include "grpo_loss.cuh"

namespace vlmk::cuda {

void grpo_loss(const GrpoLoss& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    with_surrogate(p.variant, [&](auto surrogate) {
        launch("grpo_loss_kernel", grpo_loss_kernel<decltype(surrogate)>, p.num_sequences, kGrpoThreads, stream, p);
    });
    launch("grpo_loss_finish_kernel", grpo_loss_finish_kernel, 1, kGrpoThreads, stream, p);
}

}  // namespace vlmk::cuda
