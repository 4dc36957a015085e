// pack_patches on a GPU: a warp per row. Layouts: common/pack_patches.h.
//
// pack_patches_kernel serves the usual sizes: all pixels of a frame's patch are in flight at once, and the table lies in shared
// memory kPackCopies times, so that few lanes meet in a bank. pack_patches_general_kernel serves every case.
#pragma once

#include "../common/pack_patches.h"
#include "vec.h"

namespace vlmk::cuda {

constexpr int kPackThreads = 512;
constexpr int kPackWarps = kPackThreads / 32;
constexpr int kPackResident = 2;  // blocks per multiprocessor: at most 64 registers per thread
constexpr int kPackCopies = 16;   // 48 KB of tables per block, what needs no permission
constexpr int kPackImages = 32;   // of a launch: they are arguments, so that nothing has to be copied to the device

// A divisor of numbers below 2^31: n / by = n inverse / 2^(31 + shift), rounded down.
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

// Arguments of the general kernel, and of the other. Both have rows from 0 to num_rows - 1 and images from 0 to num_images - 1.
struct PackGeneral {
    PackPatches p;
    PatchImage images[kPackImages];
};

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

// kCount elements of T, stored at once; two or four to a word where T is smaller.
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

// How the lanes of a warp divide the 3 P P pixels of a frame's patch: kVec neighbours in a line each in every step.
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
    // The channel of a lane's pixels; a step touches two at most.
    static VLMK_DEVICE uint32_t plane(int step, int lane) {
        const int low = step * kStep / kArea, high = min(((step + 1) * kStep - 1) / kArea, 2);
        return low == high || step * kStep + lane * kVec < high * kArea ? low : high;
    }
};

// The lane, read anew in every call: what is computed from it is not moved out of a loop, where it would occupy registers.
VLMK_DEVICE int lane_again() {
#ifdef __CUDA_ARCH__
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
#else
    return threadIdx.x % 32;
#endif
}

// Channels first, kPatch 14 or 16, kSlots for the temporal patch size, rows aligned to kVec elements, and byte offsets within a
// patch below 2^31. kWide: neighbouring pixels are neighbours in memory, aligned to kVec bytes.
// Grid: any; its warps take the rows in turns, and each block copies the table into shared memory first.
template <class T, int kPatch, int kSlots, bool kWide>
__global__ void __launch_bounds__(kPackThreads, kPackResident) pack_patches_kernel(const __grid_constant__ PackRows p) {
    using Steps = PackSteps<kPatch>;
    constexpr int kVec = Steps::kVec, kArea = Steps::kArea, kCount = Steps::kCount;
    constexpr int kWords = (kVec * sizeof(T) + 3) / 4, kLoads = kWide ? 1 : kVec;
    constexpr int kHeld = sizeof(T) == 4 ? 10 : 12;  // words of values: what registers allow
    constexpr int kChunk = kCount * kWords <= kHeld ? kCount : kHeld / kWords;
    static_assert(kSlots == 1 || kSlots == 2);

    // Of each value kPackCopies words; a value of 16 bits is both halves of its word.
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

    uint32_t index = 0, end = 0;   // the image of the row, and the row after its last
    uint32_t offset[kCount] = {};  // of this lane's pixels in a patch, in bytes
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
            // The last frame is also in the slot after it.
            const bool twice = kSlots == 2 && slot == 0 && frame == image.last_frame;
#pragma unroll
            for (int begin = 0; begin < kCount; begin += kChunk) {
                uint32_t values[kChunk][kWords] = {};
#pragma unroll
                for (int step = begin; step < min(begin + kChunk, kCount); ++step) {
                    // The bits of a table's address in bytes: 2 of the channel, 8 of the pixel, 6 of a word in its copies.
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

// kPatch: the patch size where it is known, so that divisions by it are multiplications; else 0. kVec: the pixels of a lane, 4
// or, where P P is not a multiple of 4 or the rows are not aligned, 1.
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
