// Launcher of group_advantages on a GPU.
#include "group_advantages.cuh"

namespace vlmk::cuda {

void group_advantages(const GroupAdvantages& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    launch("group_advantages_kernel", group_advantages_kernel, 1, kGroupThreads, stream, p);
}

}  // namespace vlmk::cuda
