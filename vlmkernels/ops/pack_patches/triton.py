"""pack_patches in Triton. One program per row. The layouts are in reference.py, the fields of the image table in images.py."""

import torch
import triton
import triton.language as tl

from vlmkernels.ops.pack_patches.images import image_table

BLOCK_F = 256  # a row has a few hundred to about 1500 features; larger blocks would waste masked elements
NUM_WARPS = 4


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


@triton.jit(do_not_specialize=["num_images"])
def pack_patches_kernel(
    images_ptr,  # (num_images, 9)
    table_ptr,  # (3, 256); None: the rows hold the pixels
    out_ptr,  # (N, 3 * SLOTS * SIZE * SIZE)
    num_images,
    SIZE: tl.constexpr,
    MERGE: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid (N,): write a row. Its image is found by a binary search over the first rows of the images."""
    row = tl.program_id(0).to(tl.int64)
    low = 0
    high = num_images - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(images_ptr + middle * 9 + 8) <= row:
            low = middle
        else:
            high = middle - 1
    image_ptr = images_ptr + low * 9
    pixels = tl.load(image_ptr)
    stride_t = tl.load(image_ptr + 1)
    stride_c = tl.load(image_ptr + 2)
    stride_y = tl.load(image_ptr + 3)
    stride_x = tl.load(image_ptr + 4)
    last_frame = tl.load(image_ptr + 5).to(tl.int32) - 1
    grid_h = tl.load(image_ptr + 6).to(tl.int32)
    blocks_w = tl.load(image_ptr + 7).to(tl.int32) // MERGE
    n = (row - tl.load(image_ptr + 8)).to(tl.int32)
    block = n // (MERGE * MERGE)
    patch_x = block % blocks_w * MERGE + n % MERGE
    patch_y = block // blocks_w * MERGE + n // MERGE % MERGE
    group = patch_y // grid_h
    patch_y -= group * grid_h

    FEATURES: tl.constexpr = 3 * SLOTS * SIZE * SIZE
    for first in tl.static_range(0, FEATURES, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        if CHANNELS_LAST:
            c = f % 3
            x = f // 3 % SIZE
            y = f // (3 * SIZE) % SIZE
            slot = f // (3 * SIZE * SIZE)
        else:
            x = f % SIZE
            y = f // SIZE % SIZE
            slot = f // (SIZE * SIZE) % SLOTS
            c = f // (SIZE * SIZE * SLOTS)
        frame = tl.minimum(group * SLOTS + slot, last_frame)
        address = pixels + frame * stride_t + c * stride_c + (patch_y * SIZE + y) * stride_y + (patch_x * SIZE + x) * stride_x
        value = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=f < FEATURES, other=0)
        if table_ptr is not None:
            value = tl.load(table_ptr + c * 256 + value.to(tl.int32), mask=f < FEATURES)
        tl.store(out_ptr + row * FEATURES + f, value, mask=f < FEATURES)


def fwd(frames, fields, table, out, layout, fresh):
    images = image_table(fields, out.device)
    with torch.cuda.device_of(out):
        pack_patches_kernel[(len(out),)](
            images,
            table,
            out,
            len(frames),
            SIZE=layout.patch_size,
            MERGE=layout.merge_size,
            SLOTS=layout.temporal_patch_size,
            CHANNELS_LAST=layout.channels_last,
            BLOCK_F=BLOCK_F,
            num_warps=NUM_WARPS,
        )
