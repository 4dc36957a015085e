// Launcher of group_advantages on a GPU.
#include <algorithm>

#include "group_advantages.cuh"

namespace vlmk::cuda {

void group_advantages(const GroupAdvantages& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    bool batch = needs_batch(p);
    int threads = batch ? kBatchThreads : kGroupThreads;
    int64_t warps = threads / 32, blocks = batch ? 1 : std::min<int64_t>((p.num_groups + warps - 1) / warps, kGroupBlocks);
    launch("group_advantages_kernel", group_advantages_kernel, blocks, threads, stream, p);
}

}  // namespace vlmk::cuda
