// Arguments of pack_patches on every device. vlmkernels/ops/pack_patches/native.py fills them in.
//
// A row holds the P x P pixels of one patch in Tp frames. Each pixel is replaced by its value in a (3, 256) table:
//   channels first   row[((c Tp + s) P + y) P + x]        channels last   row[((s P + y) P + x) 3 + c]
// The rows of Tp frames are ordered in blocks of M x M patches, which a model merges. M = 1 is raster order.
#pragma once

#include "dtypes.h"

namespace vlmk {

// One image, as image_fields() of vlmkernels/ops/pack_patches/images.py describes it. Strides are in bytes.
struct PatchImage {
    const uint8_t* pixels;
    int64_t stride_frame;
    int64_t stride_channel;
    int64_t stride_y;
    int64_t stride_x;
    int64_t frames;  // the last frame is repeated to fill a group of Tp
    int64_t grid_h;  // in patches
    int64_t grid_w;
    int64_t first_row;
};
static_assert(sizeof(PatchImage) == 9 * sizeof(int64_t));

struct PackPatches {
    VLMK_STRUCT(PackPatches);
    VLMK_FIELD(const PatchImage*, images);  // in host memory
    VLMK_FIELD(int64_t, num_images);
    VLMK_FIELD(int64_t, num_rows);
    VLMK_FIELD(int64_t, patch_size);           // P
    VLMK_FIELD(int64_t, merge_size);           // M, divides grid_h and grid_w
    VLMK_FIELD(int64_t, temporal_patch_size);  // Tp
    VLMK_FIELD(bool, channels_last);
    VLMK_FIELD(int64_t, element_size);  // bytes per element of table and rows: 4 or 2; 1: the rows are raw pixels, no table
    VLMK_FIELD(const void*, table);     // (3, 256)
    VLMK_FIELD(void*, rows);            // (num_rows, 3 Tp P P)
    VLMK_FIELD(bool, fresh);            // CPU: the memory of rows has just been allocated
};

// Calls f(T{}) with an unsigned integer type of `bytes` bytes: pack_patches copies elements without interpreting them.
template <class Function>
void with_element(int64_t bytes, Function f) {
    switch (bytes) {
        case 1:
            return f(uint8_t{});
        case 2:
            return f(uint16_t{});
        case 4:
            return f(uint32_t{});
    }
}

// The position of a row's pixels.
struct Patch {
    const PatchImage* image;
    const uint8_t* corner;  // of frame 0
    uint32_t first_frame;

    VLMK_HD uint32_t frame(uint32_t slot) const {
        uint32_t last = static_cast<uint32_t>(image->frames) - 1, next = first_frame + slot;
        return next < last ? next : last;
    }
    VLMK_HD const uint8_t* pixels(uint32_t slot) const { return corner + frame(slot) * image->stride_frame; }
    // Whether the slot shows the same frame as the slot before it: in a still image, or at the end of a video.
    VLMK_HD bool repeats(uint32_t slot) const { return slot > 0 && frame(slot) == frame(slot - 1); }
};

// The index of the image that contains a row. Image is a struct with a first_row.
template <class Image>
VLMK_HD uint32_t image_of_row(const Image* images, int64_t num_images, int64_t row) {
    uint32_t low = 0, high = static_cast<uint32_t>(num_images) - 1;
    while (low < high) {
        uint32_t middle = (low + high + 1) / 2;
        if (images[middle].first_row <= row) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

VLMK_HD Patch patch_in_image(const PackPatches& p, const PatchImage& image, int64_t row) {
    // 64-bit division is slow, and an image has fewer than 2^32 patches.
    uint32_t merge = static_cast<uint32_t>(p.merge_size), n = static_cast<uint32_t>(row - image.first_row);
    uint32_t grid_h = static_cast<uint32_t>(image.grid_h), blocks_w = static_cast<uint32_t>(image.grid_w) / merge;
    uint32_t j = n % merge, i = n / merge % merge, block = n / (merge * merge);
    uint32_t x = block % blocks_w * merge + j, y = block / blocks_w * merge + i;
    uint32_t group = y / grid_h;
    int64_t top = (y - group * grid_h) * p.patch_size, left = x * p.patch_size;
    return {&image, image.pixels + top * image.stride_y + left * image.stride_x,
            group * static_cast<uint32_t>(p.temporal_patch_size)};
}

}  // namespace vlmk
