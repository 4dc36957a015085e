// pack_patches on a GPU: one warp per row. Layouts: common/pack_patches.h.
//
// pack_patches_kernel supports the usual sizes. It loads all pixels of a frame's patch before it stores one, and keeps
// kPackCopies copies of the table in shared memory to avoid bank conflicts. pack_patches_general_kernel supports every size.
#pragma once

#include "../common/pack_patches.h"
#include "vec.h"

namespace vlmk::cuda {

constexpr int kPackThreads = 512;
constexpr int kPackWarps = kPackThreads / 32;
constexpr int kPackResident = 2;  // blocks per multiprocessor: at most 64 registers per thread
constexpr int kPackCopies = 16;   // 48 KB of tables per block, the most without opting in
constexpr int kPackImages = 32;   // per launch: they are kernel arguments, which saves a copy to the device

// Division of numbers below 2^31 by a constant: n / by = floor(n * inverse / 2^(31 + shift)).
struct Divisor {
    uint32_t by;
    uint32_t inverse;
    uint32_t shift;
};
inline Divisor divisor(int64_t by) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < by) ++shift;
    return {static_cast<uint32_t>(by), static_cast<uint32_t>(((int64_t{1} << (31 + shift)) + by - 1) / by), shift};
}
VLMK_DEVICE uint32_t divide(uint32_t n, const Divisor& divisor, uint32_t& rest) {
    const uint32_t quotient = static_cast<uint32_t>(uint64_t{2 * n} * divisor.inverse >> 32) >> divisor.shift;
    rest = n - quotient * divisor.by;
    return quotient;
}

// Arguments of the general kernel.
struct PackGeneral {
    PackPatches p;
    PatchImage images[kPackImages];
};

// An image, and the arguments, of pack_patches_kernel.
struct PackImage {
    const uint8_t* pixels;
    int64_t stride_frame;
    uint32_t stride_channel;
    uint32_t stride_y;
    uint32_t stride_x;
    uint32_t last_frame;
    Divisor blocks_w;  // blocks of M x M patches
    Divisor blocks_h;
    uint32_t first_row;
};

struct PackRows {
    const void* table;
    void* rows;
    uint32_t num_images;
    uint32_t num_rows;
    Divisor block;  // M M
    Divisor merge;
    PackImage images[kPackImages];
};

// Stores kCount elements of T at once. A word of x holds one, two or four elements.
template <class T, int kCount, int kWords>
VLMK_DEVICE void store_words(T* address, const uint32_t (&x)[kWords]) {
    constexpr int kBytes = kCount * sizeof(T);
    static_assert(kWords == (kBytes + 3) / 4);
    if constexpr (kBytes == 2) {
        __stcs(reinterpret_cast<uint16_t*>(address), static_cast<uint16_t>(x[0]));
    } else if constexpr (kBytes == 4) {
        __stcs(reinterpret_cast<uint32_t*>(address), x[0]);
    } else if constexpr (kBytes == 8) {
        __stcs(reinterpret_cast<uint2*>(address), make_uint2(x[0], x[1]));
    } else {
        static_assert(kBytes == 16);
        __stcs(reinterpret_cast<uint4*>(address), make_uint4(x[0], x[1], x[2], x[3]));
    }
}

// How the lanes of a warp share the 3 P P pixels of a frame's patch: kVec consecutive pixels of a line per lane and step.
template <int kPatch>
struct PackSteps {
    static constexpr int kVec = kPatch % 4 == 0 ? 4 : 2;
    static constexpr int kArea = kPatch * kPatch;
    static constexpr int kValues = 3 * kArea;
    static constexpr int kStep = 32 * kVec;
    static constexpr int kCount = (kValues + kStep - 1) / kStep;
    static_assert(kPatch % kVec == 0 && kArea >= kStep);

    static VLMK_DEVICE bool has(int step, int lane) {
        return (step + 1) * kStep <= kValues || step * kStep + lane * kVec < kValues;
    }
    // The channel of a lane's pixels. The pixels of a step are from at most two channels.
    static VLMK_DEVICE uint32_t plane(int step, int lane) {
        const int low = step * kStep / kArea, high = min(((step + 1) * kStep - 1) / kArea, 2);
        return low == high || step * kStep + lane * kVec < high * kArea ? low : high;
    }
};

// The lane, read again in every call. This keeps the compiler from moving computations out of a loop, where the results would
// occupy registers.
VLMK_DEVICE int lane_again() {
#ifdef __CUDA_ARCH__
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
#else
    return threadIdx.x % 32;
#endif
}

// Requires channels first, kPatch 14 or 16, kSlots = temporal patch size, rows aligned to kVec elements, and byte offsets
// within a patch below 2^31. kWide: consecutive pixels are consecutive in memory, aligned to kVec bytes.
//
// Grid: any. Warps loop over the rows with a stride. Each block first copies the table into shared memory.
template <class T, int kPatch, int kSlots, bool kWide>
__global__ void __launch_bounds__(kPackThreads, kPackResident) pack_patches_kernel(const __grid_constant__ PackRows p) {
    using Steps = PackSteps<kPatch>;
    constexpr int kVec = Steps::kVec, kArea = Steps::kArea, kCount = Steps::kCount;
    constexpr int kWords = (kVec * sizeof(T) + 3) / 4, kLoads = kWide ? 1 : kVec;
    constexpr int kHeld = sizeof(T) == 4 ? 10 : 12;  // words of values that fit in registers
    constexpr int kChunk = kCount * kWords <= kHeld ? kCount : kHeld / kWords;
    static_assert(kSlots == 1 || kSlots == 2);

    // kPackCopies words per value. A 16-bit value fills both halves of its word.
    VLMK_SHARED(uint32_t, table, sizeof(T) > 1 ? 3 * 256 * kPackCopies : 1);
    if constexpr (sizeof(T) > 1) {
#pragma unroll
        for (int first = 0; first < 3 * 256 * kPackCopies / 4; first += kPackThreads) {
            static_assert(3 * 256 * kPackCopies / 4 % kPackThreads == 0);
            const int i = first + threadIdx.x;
            const uint32_t value = __ldg(static_cast<const T*>(p.table) + i / (kPackCopies / 4));
            const uint32_t word = sizeof(T) == 2 ? value * 0x10001u : value;
            reinterpret_cast<uint4*>(table)[i] = make_uint4(word, word, word, word);
        }
        __syncthreads();
    }
    const int lane = threadIdx.x % 32;

    uint32_t index = 0, end = 0;   // the image of the row, and the end of the image's rows
    uint32_t offset[kCount] = {};  // byte offsets of this lane's pixels in a patch
    for (uint32_t row = blockIdx.x * kPackWarps + threadIdx.x / 32; row < p.num_rows; row += gridDim.x * kPackWarps) {
        if (row >= end) {
            index = image_of_row(p.images, p.num_images, row);
            end = index + 1 < p.num_images ? p.images[index + 1].first_row : p.num_rows;
            const PackImage& image = p.images[index];
            const int own = lane_again();
#pragma unroll
            for (int step = 0; step < kCount; ++step) {
                const uint32_t plane = Steps::plane(step, own), at = step * Steps::kStep + own * kVec - plane * kArea;
                offset[step] = plane * image.stride_channel + at / kPatch * image.stride_y + at % kPatch * image.stride_x;
            }
        }
        const PackImage& image = p.images[index];
        uint32_t inner, i, j, x, y;
        const uint32_t block = divide(row - image.first_row, p.block, inner);
        i = divide(inner, p.merge, j);
        const uint32_t block_y = divide(block, image.blocks_w, x), group = divide(block_y, image.blocks_h, y);
        const uint8_t* corner = image.pixels + uint64_t{(y * p.merge.by + i) * kPatch} * image.stride_y +
                                uint64_t{(x * p.merge.by + j) * kPatch} * image.stride_x;
        T* out = static_cast<T*>(p.rows) + uint64_t{row} * (Steps::kValues * kSlots) + lane * kVec;

        for (uint32_t slot = 0; slot < kSlots; ++slot, out += kArea) {
            const uint32_t frame = min(group * kSlots + slot, image.last_frame);
            const uint8_t* pixels = corner + frame * image.stride_frame;
            uint32_t raw[kCount][kLoads] = {};
#pragma unroll
            for (int step = 0; step < kCount; ++step) {
                if (!Steps::has(step, lane)) continue;
                if constexpr (kWide && kVec == 2) {
                    raw[step][0] = __ldg(reinterpret_cast<const uint16_t*>(pixels + offset[step]));
                } else if constexpr (kWide) {
                    raw[step][0] = __ldg(reinterpret_cast<const uint32_t*>(pixels + offset[step]));
                } else {
#pragma unroll
                    for (int k = 0; k < kVec; ++k) raw[step][k] = __ldg(pixels + (offset[step] + k * image.stride_x));
                }
            }
            // The last frame is repeated in the next slot.
            const bool twice = kSlots == 2 && slot == 0 && frame == image.last_frame;
#pragma unroll
            for (int begin = 0; begin < kCount; begin += kChunk) {
                uint32_t values[kChunk][kWords] = {};
#pragma unroll
                for (int step = begin; step < min(begin + kChunk, kCount); ++step) {
                    // Bits of the byte address in the table: 2 for the channel, 8 for the pixel, 6 for a word of the copies.
                    const uint32_t own = Steps::plane(step, lane) << 14 | lane % kPackCopies * 4;
                    static_assert(kPackCopies == 16);
#pragma unroll
                    for (int k = 0; k < kVec; ++k) {
                        uint32_t& word = values[step - begin][k * sizeof(T) / 4];
                        const uint32_t bits = kWide ? raw[step][0] : raw[step][k], down = kWide ? 8 * k : 0;
                        if constexpr (sizeof(T) == 1) {
                            word |= (bits >> down & 255) << 8 * k;
                        } else {
                            const uint32_t at = own | ((down > 6 ? bits >> (down - 6) : bits << 6) & 255 << 6);
                            const char* address = reinterpret_cast<const char*>(table) + at;
                            const uint32_t value = *reinterpret_cast<const uint32_t*>(address);
                            const uint32_t mask = sizeof(T) == 4 ? ~0u : k % 2 ? 0xffff0000u : 0xffffu;
                            word |= value & mask;
                        }
                    }
                }
#pragma unroll
                for (int copy = 0; copy < kSlots; ++copy) {
                    if (copy == 1 && !twice) break;
#pragma unroll
                    for (int step = begin; step < min(begin + kChunk, kCount); ++step) {
                        T* address = out + (Steps::plane(step, lane) * (kSlots - 1) + copy) * kArea + step * Steps::kStep;
                        if (Steps::has(step, lane)) store_words<T, kVec>(address, values[step - begin]);
                    }
                }
            }
            if (twice) break;
        }
    }
}

// kPatch: the patch size if it is known at compile time, so that divisions become multiplications; else 0. kVec: pixels per
// lane, 4, or 1 if P P is not a multiple of 4 or the rows are not aligned.
template <class T, int kPatch, int kVec>
__global__ void __launch_bounds__(kPackThreads, kPackResident)
    pack_patches_general_kernel(const __grid_constant__ PackGeneral general) {
    const PackPatches& p = general.p;
    VLMK_SHARED(T, table, 3 * 256);
    if constexpr (sizeof(T) > 1) {
        for (int i = threadIdx.x; i < 3 * 256; i += kPackThreads) table[i] = __ldg(static_cast<const T*>(p.table) + i);
        __syncthreads();
    }
    const uint32_t size = kPatch > 0 ? kPatch : static_cast<uint32_t>(p.patch_size), area = size * size;
    const uint32_t slots = static_cast<uint32_t>(p.temporal_patch_size), block = p.channels_last ? 3 * area : area;
    for (int64_t row = blockIdx.x * int64_t{kPackWarps} + threadIdx.x / 32; row < p.num_rows;
         row += gridDim.x * int64_t{kPackWarps}) {
        const PatchImage image = general.images[image_of_row(general.images, p.num_images, row)];
        const Patch patch = patch_in_image(p, image, row);
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
                T* address = out + (plane * slots + slot) * block + first;
                if constexpr (kVec == 1) {
                    __stcs(address, static_cast<T>(x[0]));
                } else {
                    uint32_t words[sizeof(T)] = {};
#pragma unroll
                    for (int k = 0; k < kVec; ++k) words[k * sizeof(T) / 4] |= x[k] << (k * sizeof(T) % 4 * 8);
                    store_words<T, kVec>(address, words);
                }
            }
        }
    }
}

}  // namespace vlmk::cuda
