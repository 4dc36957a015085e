"""pack_patches with the compiled module: backends "cpp" and "cuda"."""

import torch

from vlmkernels.ops.launch import Launcher, address


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        return None

    def fwd(self, frames, fields, table, out, layout, fresh):
        params = self.module.PackPatches(
            images=fields.buffer_info()[0],
            num_images=len(frames),
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
