// Launcher of pack_patches on a GPU: it neither allocates nor waits.
#include "pack_patches.cuh"

namespace vlmk::cuda {
namespace {

template <class T>
void pack(const PackPatches& p, int device, uintptr_t stream) {
    bool whole = p.patch_size % 2 == 0 && reinterpret_cast<uintptr_t>(p.rows) % (4 * sizeof(T)) == 0;
    auto kernel = pack_patches_kernel<T, 0, 1>;
    if (whole && p.patch_size == 14) kernel = pack_patches_kernel<T, 14, 4>;
    if (whole && p.patch_size == 16) kernel = pack_patches_kernel<T, 16, 4>;
    int64_t blocks = std::min<int64_t>((p.num_rows + kPackWarps - 1) / kPackWarps, kPackResident * multiprocessors(device));
    launch("pack_patches_kernel", kernel, blocks, kPackThreads, stream, p);
}

}  // namespace

void pack_patches(const PackPatches& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    switch (p.element_size) {
        case 1:
            return pack<uint8_t>(p, device, stream);
        case 2:
            return pack<uint16_t>(p, device, stream);
        case 4:
            return pack<uint32_t>(p, device, stream);
    }
}

}  // namespace vlmk::cuda
