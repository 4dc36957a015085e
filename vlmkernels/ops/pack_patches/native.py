"""pack_patches through the compiled module, for the backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import Launcher, address
from vlmkernels.ops.pack_patches.images import image_table


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        return None

    def fwd(self, frames, table, out, layout, fresh):
        images = image_table(frames, layout.patch_size, layout.temporal_patch_size)
        params = self.module.PackPatches(
            images=address(images),
            num_images=len(images),
            num_rows=len(out),
            patch_size=layout.patch_size,
            merge_size=layout.merge_size,
            temporal_patch_size=layout.temporal_patch_size,
            channels_last=layout.channels_last,
            element_size=out.element_size(),
            table=address(table),
            rows=address(out),
            fresh=fresh,
        )
        self.launch("pack_patches", params, out.device)
