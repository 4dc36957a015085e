// pack_patches on the CPU. Layouts: common/pack_patches.h.
//
// A table lookup takes about one cycle on every instruction set; memory bandwidth limits the speed.
#include "../common/pack_patches.h"

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "memory.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int kChunk = 64;  // rows per OpenMP chunk

template <class T>
T value(const T* table, int64_t channel, uint8_t pixel) {
    if constexpr (sizeof(T) == 1) return pixel;
    return table[256 * channel + pixel];
}

// The values of one channel of a patch. kPatch and kStride are the patch size and stride_x if they are known at compile time,
// so that the compiler unrolls the loop over a line; otherwise 0.
template <class T, int kPatch, int kStride>
void look_up(const T* __restrict table, int64_t channel, const uint8_t* __restrict line, int64_t size, const PatchImage& image,
             T* __restrict out) {
    const int64_t stride_y = image.stride_y, stride_x = kStride > 0 ? kStride : image.stride_x;
    for (int64_t y = 0; y < size; ++y, line += stride_y, out += size) {
        if constexpr (kPatch == 0) {
            for (int64_t x = 0; x < size; ++x) out[x] = value(table, channel, line[x * stride_x]);
        } else if constexpr (sizeof(T) == 1 && kStride == 1) {
            std::memcpy(out, line, kPatch);
        } else {
#pragma GCC unroll 16
            for (int x = 0; x < kPatch; ++x) out[x] = value(table, channel, line[x * stride_x]);
        }
    }
}

// The values of a patch in the channels-last layout.
template <class T>
void look_up_pixels(const T* __restrict table, const uint8_t* __restrict line, int64_t size, const PatchImage& image,
                    T* __restrict out) {
    for (int64_t y = 0; y < size; ++y, line += image.stride_y) {
        for (int64_t x = 0; x < size; ++x) {
            const uint8_t* pixel = line + x * image.stride_x;
            for (int c = 0; c < 3; ++c) *out++ = value(table, c, pixel[c * image.stride_channel]);
        }
    }
}

#if defined(__AVX2__)
// Splits a patch of RGB pixels (channels last) into three planes, without a table: out[c * plane + y * kPatch + x].
template <int kPatch>
void split_channels(const uint8_t* __restrict line, int64_t stride_y, int64_t plane, uint8_t* __restrict out) {
    static_assert(kPatch == 14 || kPatch == 16);
    // A line has 3 kPatch <= 48 bytes: two registers, and a third one that ends with the line.
    constexpr int kBytes = 3 * kPatch, kLast = kBytes - 16;
    __m128i masks[3][3];
    for (int c = 0; c < 3; ++c) {
        alignas(16) int8_t from[3][16];
        std::memset(from, -1, sizeof(from));  // -1 writes 0
        for (int x = 0; x < kPatch; ++x) {
            int at = 3 * x + c;
            at < 16 ? from[0][x] = at : at < 32 ? from[1][x] = at - 16 : from[2][x] = at - kLast;
        }
        for (int i = 0; i < 3; ++i) masks[c][i] = _mm_load_si128(reinterpret_cast<const __m128i*>(from[i]));
    }
    for (int y = 0; y < kPatch; ++y, line += stride_y, out += kPatch) {
        auto load = [&](int at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + at)); };
        __m128i first = load(0), second = load(16), last = load(kLast);
        for (int c = 0; c < 3; ++c) {
            __m128i channel = _mm_or_si128(_mm_shuffle_epi8(first, masks[c][0]), _mm_shuffle_epi8(second, masks[c][1]));
            channel = _mm_or_si128(channel, _mm_shuffle_epi8(last, masks[c][2]));
            std::memcpy(out + c * plane, &channel, kPatch);
        }
    }
}
#endif

template <class T, int kPatch>
void pack_row(const PackPatches& p, int64_t row) {
    const int64_t size = kPatch > 0 ? kPatch : p.patch_size, planes = p.channels_last ? 1 : 3;
    const int64_t block = 3 / planes * p.patch_size * p.patch_size;
    const PatchImage& image = p.images[image_of_row(p.images, p.num_images, row)];
    const Patch patch = patch_in_image(p, image, row);
    const T* table = static_cast<const T*>(p.table);
    T* out = static_cast<T*>(p.rows) + row * planes * p.temporal_patch_size * block;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 1 && kPatch > 0) {
        if (planes == 3 && image.stride_x == 3 && image.stride_channel == 1) {
            for (int64_t slot = 0; slot < p.temporal_patch_size; ++slot) {
                split_channels<kPatch>(patch.pixels(slot), image.stride_y, p.temporal_patch_size * block, out + slot * block);
            }
            return;
        }
    }
#endif
    for (int64_t plane = 0; plane < planes; ++plane) {
        for (int64_t slot = 0; slot < p.temporal_patch_size; ++slot, out += block) {
            const uint8_t* pixels = patch.pixels(slot) + plane * image.stride_channel;
            if (patch.repeats(slot)) {
                std::memcpy(out, out - block, block * sizeof(T));
            } else if (p.channels_last) {
                look_up_pixels(table, pixels, size, image, out);
            } else if (image.stride_x == 1) {
                look_up<T, kPatch, 1>(table, plane, pixels, size, image, out);
            } else if (image.stride_x == 3) {
                look_up<T, kPatch, 3>(table, plane, pixels, size, image, out);
            } else {
                look_up<T, kPatch, 0>(table, plane, pixels, size, image, out);
            }
        }
    }
}

template <class T, int kPatch>
void pack(const PackPatches& p, int threads) {
#pragma omp parallel for schedule(dynamic, kChunk) num_threads(threads)
    for (int64_t row = 0; row < p.num_rows; ++row) pack_row<T, kPatch>(p, row);
}

template <class T>
void pack(const PackPatches& p, int threads) {
    if (p.fresh) {
        advise_huge_pages(p.rows, p.num_rows * 3 * p.temporal_patch_size * p.patch_size * p.patch_size * sizeof(T));
    }
    switch (p.patch_size) {
        case 14:
            return pack<T, 14>(p, threads);
        case 16:
            return pack<T, 16>(p, threads);
        default:
            return pack<T, 0>(p, threads);
    }
}

}  // namespace

void pack_patches(const PackPatches& p, int threads) {
    with_element(p.element_size, [&](auto x) { pack<decltype(x)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
