"""Patches of images as rows, in plain PyTorch: the oracle of ``pack_patches``."""

import torch


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def fwd(frames, fields, table, out, layout, fresh):
    """Write the rows of all images (T, 3, H, W) to ``out``. ``table`` (3, 256): the result per pixel value; None: the pixel."""
    slots, size, merge = layout.temporal_patch_size, layout.patch_size, layout.merge_size
    rows = []
    for image in frames:
        missing = -len(image) % slots
        x = torch.cat([image, image[-1:].expand(missing, -1, -1, -1)])
        if table is not None:
            x = torch.stack([table[c, x[:, c].long()] for c in range(3)], 1)
        num, _, height, width = x.shape
        x = x.reshape(num // slots, slots, 3, height // size // merge, merge, size, width // size // merge, merge, size)
        # To: frame group, block row, block column, row and column in the block, then the features of a patch.
        features = (1, 5, 8, 2) if layout.channels_last else (2, 1, 5, 8)
        rows.append(x.permute(0, 3, 6, 4, 7, *features).reshape(-1, out.shape[1]))
    torch.cat(rows, out=out)
