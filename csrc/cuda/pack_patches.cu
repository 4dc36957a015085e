// Launcher of pack_patches on a GPU. It does not allocate or synchronize.
#include <algorithm>

#include "pack_patches.cuh"

namespace vlmk::cuda {
namespace {

struct Target {
    int device;
    uintptr_t stream;
};

template <class Arguments>
void launch_rows(void (*kernel)(Arguments), int64_t num_rows, const Target& target, const Arguments& arguments) {
    int64_t blocks =
        std::min<int64_t>((num_rows + kPackWarps - 1) / kPackWarps, kPackResident * multiprocessors(target.device));
    launch("pack_patches_kernel", kernel, blocks, kPackThreads, target.stream, arguments);
}

template <class T, int kPatch, int kVec>
void pack_general(const PackPatches& p, const Target& target) {
    PackGeneral arguments{p, {}};
    std::copy_n(p.images, p.num_images, arguments.images);
    launch_rows(pack_patches_general_kernel<T, kPatch, kVec>, p.num_rows, target, arguments);
}

// Whether row numbers and offsets within a patch fit in 31 bits.
bool is_small(const PackPatches& p) {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    int64_t stride = 0;
    for (int64_t i = 0; i < p.num_images; ++i) {
        stride = std::max({stride, p.images[i].stride_channel, p.images[i].stride_y, p.images[i].stride_x});
    }
    return p.num_rows <= kMax && stride <= kMax / (2 + 2 * p.patch_size);
}

// Whether a line of every patch can be read in steps of `vec` bytes.
bool is_wide(const PackPatches& p, int64_t vec) {
    return std::all_of(p.images, p.images + p.num_images, [&](const PatchImage& image) {
        int64_t offsets =
            static_cast<int64_t>(reinterpret_cast<uintptr_t>(image.pixels)) | image.stride_channel | image.stride_y;
        if (image.frames > 1) offsets |= image.stride_frame;
        return image.stride_x == 1 && offsets % vec == 0;
    });
}

template <class T, int kPatch, int kSlots>
void pack_rows(const PackPatches& p, const Target& target) {
    PackRows arguments{
        p.table,
        p.rows,
        static_cast<uint32_t>(p.num_images),
        static_cast<uint32_t>(p.num_rows),
        divisor(p.merge_size * p.merge_size),
        divisor(p.merge_size),
        {},
    };
    std::transform(p.images, p.images + p.num_images, arguments.images, [&](const PatchImage& image) {
        return PackImage{
            image.pixels,
            image.stride_frame,
            static_cast<uint32_t>(image.stride_channel),
            static_cast<uint32_t>(image.stride_y),
            static_cast<uint32_t>(image.stride_x),
            static_cast<uint32_t>(image.frames - 1),
            divisor(image.grid_w / p.merge_size),
            divisor(image.grid_h / p.merge_size),
            static_cast<uint32_t>(image.first_row),
        };
    });
    bool wide = is_wide(p, PackSteps<kPatch>::kVec);
    auto kernel = wide ? pack_patches_kernel<T, kPatch, kSlots, true> : pack_patches_kernel<T, kPatch, kSlots, false>;
    launch_rows(kernel, p.num_rows, target, arguments);
}

template <class T, int kPatch>
void pack_size(const PackPatches& p, const Target& target) {
    uintptr_t rows = reinterpret_cast<uintptr_t>(p.rows);
    if (!p.channels_last && rows % (PackSteps<kPatch>::kVec * sizeof(T)) == 0 && is_small(p)) {
        if (p.temporal_patch_size == 1) return pack_rows<T, kPatch, 1>(p, target);
        if (p.temporal_patch_size == 2) return pack_rows<T, kPatch, 2>(p, target);
    }
    if (rows % (4 * sizeof(T)) == 0) return pack_general<T, kPatch, 4>(p, target);
    pack_general<T, 0, 1>(p, target);
}

// One launch per kPackImages images, with row numbers that start at 0.
template <class T>
void pack(const PackPatches& all, const Target& target) {
    for (int64_t begin = 0; begin < all.num_images; begin += kPackImages) {
        PackPatches p = all;
        p.num_images = std::min<int64_t>(all.num_images - begin, kPackImages);
        PatchImage images[kPackImages];
        std::copy_n(all.images + begin, p.num_images, images);
        int64_t first = images[0].first_row, last = begin + p.num_images;
        for (PatchImage& image : images) image.first_row -= first;
        p.images = images;
        p.num_rows = (last < all.num_images ? all.images[last].first_row : all.num_rows) - first;
        p.rows = static_cast<T*>(all.rows) + first * 3 * p.temporal_patch_size * p.patch_size * p.patch_size;
        switch (p.patch_size) {
            case 14:
                pack_size<T, 14>(p, target);
                break;
            case 16:
                pack_size<T, 16>(p, target);
                break;
            default:
                pack_general<T, 0, 1>(p, target);
        }
    }
}

}  // namespace

void pack_patches(const PackPatches& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    with_element(p.element_size, [&](auto x) { pack<decltype(x)>(p, {device, stream}); });
}

}  // namespace vlmk::cuda
