// pack_patches on a GPU: a warp per row, a row's values stored kVec elements at a time. Layouts: common/pack_patches.h.
#pragma once

#include "../common/pack_patches.h"
#include "vec.h"

namespace vlmk::cuda {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / 32;
constexpr int kPackResident = 4;  // blocks per multiprocessor: at most 64 registers per thread

// kCount elements, stored at once.
template <class T, int kCount>
VLMK_DEVICE void store_elements(T* address, const uint32_t (&x)[kCount]) {
    if constexpr (kCount == 1) {
        __stcs(address, static_cast<T>(x[0]));
    } else if constexpr (sizeof(T) == 4) {
        __stcs(reinterpret_cast<uint4*>(address), make_uint4(x[0], x[1], x[2], x[3]));
    } else if constexpr (sizeof(T) == 2) {
        __stcs(reinterpret_cast<uint2*>(address), make_uint2(x[0] | x[1] << 16, x[2] | x[3] << 16));
    } else {
        __stcs(reinterpret_cast<uint32_t*>(address), x[0] | x[1] << 8 | x[2] << 16 | x[3] << 24);
    }
}

// kPatch: the patch size where it is known, so that divisions by it are multiplications; else 0. kVec: 4, or 1 where P P is not
// a multiple of 4 or the rows are not aligned.
// Grid: any; its warps take the rows in turns, and each block reads the table into shared memory first.
template <class T, int kPatch, int kVec>
__global__ void __launch_bounds__(kPackThreads, kPackResident) pack_patches_kernel(const __grid_constant__ PackPatches p) {
    VLMK_SHARED(T, table, 3 * 256);
    if constexpr (sizeof(T) > 1) {
        for (int i = threadIdx.x; i < 3 * 256; i += kPackThreads) table[i] = __ldg(static_cast<const T*>(p.table) + i);
        __syncthreads();
    }
    const uint32_t size = kPatch > 0 ? kPatch : static_cast<uint32_t>(p.patch_size), area = size * size;
    const uint32_t slots = static_cast<uint32_t>(p.temporal_patch_size), block = p.channels_last ? 3 * area : area;
    for (int64_t row = blockIdx.x * int64_t{kPackWarps} + threadIdx.x / 32; row < p.num_rows;
         row += gridDim.x * int64_t{kPackWarps}) {
        const Patch patch = patch_of_row(p, row);
        const PatchImage& image = *patch.image;
        T* out = static_cast<T*>(p.rows) + row * (3 * area * slots);
        for (uint32_t i = threadIdx.x % 32 * kVec; i < 3 * area; i += 32 * kVec) {
            const uint32_t plane = i / block, first = i % block;
            uint32_t x[kVec] = {};
            for (uint32_t slot = 0; slot < slots; ++slot) {
                if (!patch.repeats(slot)) {
                    const uint8_t* pixels = patch.pixels(slot);
#pragma unroll
                    for (int k = 0; k < kVec; ++k) {
                        const uint32_t at = first + k, c = p.channels_last ? at % 3 : plane, xy = p.channels_last ? at / 3 : at;
                        const uint32_t pixel =
                            __ldg(pixels + c * image.stride_channel + xy / size * image.stride_y + xy % size * image.stride_x);
                        x[k] = sizeof(T) > 1 ? table[256 * c + pixel] : pixel;
                    }
                }
                store_elements(out + (plane * slots + slot) * block + first, x);
            }
        }
    }
}

}  // namespace vlmk::cuda
