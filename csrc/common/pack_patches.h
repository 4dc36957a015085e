// Arguments of pack_patches on every device, filled in by vlmkernels/ops/pack_patches/native.py.
//
// A row holds the P x P pixels of one patch in Tp frames, each replaced by its value in a table of 3 x 256:
//   channels first   row[((c Tp + s) P + y) P + x]        channels last   row[((s P + y) P + x) 3 + c]
// The rows of a frame group lie in blocks of M x M patches, the order in which a model merges them; M = 1 is raster order.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace vlmk {

// A row of the table that vlmkernels/ops/pack_patches/images.py makes. Strides in bytes.
struct PatchImage {
    const uint8_t* pixels;
    int64_t stride_frame;
    int64_t stride_channel;
    int64_t stride_y;
    int64_t stride_x;
    int64_t frames;  // the last one stands for those missing from its group of Tp
    int64_t grid_h;  // patches
    int64_t grid_w;
    int64_t first_row;
};
static_assert(sizeof(PatchImage) == 9 * sizeof(int64_t));

struct PackPatches {
    const PatchImage* images;  // in memory of the host
    int64_t num_images;
    int64_t num_rows;
    int64_t patch_size;           // P
    int64_t merge_size;           // M, divides grid_h and grid_w
    int64_t temporal_patch_size;  // Tp
    bool channels_last;
    int64_t element_size;  // of table and rows: 4, 2, or 1: the rows are the pixels, there is no table
    const void* table;     // (3, 256)
    void* rows;            // (num_rows, 3 Tp P P)
    bool fresh;            // CPU: nobody has written to the rows' memory yet
};

// Where a row's pixels are.
struct Patch {
    const PatchImage* image;
    const uint8_t* corner;  // of frame 0
    uint32_t first_frame;

    VLMK_HD uint32_t frame(uint32_t slot) const {
        uint32_t last = static_cast<uint32_t>(image->frames) - 1, wanted = first_frame + slot;
        return wanted < last ? wanted : last;
    }
    VLMK_HD const uint8_t* pixels(uint32_t slot) const { return corner + frame(slot) * image->stride_frame; }
    // Whether the slot shows what the slot before it does: a still image, or the end of a video.
    VLMK_HD bool repeats(uint32_t slot) const { return slot > 0 && frame(slot) == frame(slot - 1); }
};

// The image of a row. Image: has a first_row.
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
    // Division in 64 bits is slow; an image has fewer than 2^32 patches.
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
