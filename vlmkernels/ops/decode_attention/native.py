"""decode_attention with the compiled module: backends "cpp" and "cuda"."""

from array import array

import torch

from vlmkernels.ops.decode_attention.inputs import part_size
from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis

LOG2E = 1.4426950408889634
# Arguments of part_size. On an H100 two blocks run on each of 132 multiprocessors.
SPLIT = {"cpp": (), "cuda": (256, 256)}


def level_fields(level, part):
    """The members of a DecodeLevel."""
    key, value, table = level.key, level.value, level.block_table
    return (
        key.data_ptr(),
        value.data_ptr(),
        *map(address, (level.lengths, level.segment, table, level.order, level.rank)),
        level.num_segments,
        level.capacity,
        key.shape[2],
        key.shape[0],
        0 if table is None else table.stride(0),
        *key.stride()[:3],
        *value.stride()[:3],
        part,
    )


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        reasons = [unsupported_dtype(x) or unsupported_last_axis(x) for x in tensors]
        width, most = max(x.shape[-1] for x in tensors), self.module.decode_max_width
        if self.name == "cuda" and width > most:
            reasons.append(f"supports head dimensions up to {most}, got {width}")
        return next(filter(None, reasons), None)

    def fwd(self, query, key, value, levels, window, scale, out, lse):
        levels = [_contiguous(level) for level in levels]
        if self.name == "cuda":
            levels = [level.grouped() for level in levels]
        slots, heads, width = query.shape
        key_heads, value_width = levels[0].key.shape[1], out.shape[2]
        sizes = [part_size(level, *SPLIT[self.name]) for level in levels]
        parts = sum((level.capacity + part - 1) // part for level, part in zip(levels, sizes, strict=True))
        partial = lse.new_empty(slots * heads * parts * ((value_width + 31) // 32 * 32 + 16))
        fields = array("q", [x for row in zip(levels, sizes, strict=True) for x in level_fields(*row)])
        new = {} if key is None else {
            "new_key": key.data_ptr(), "key_stride_slot": key.stride(0), "key_stride_head": key.stride(1),
            "new_value": value.data_ptr(), "value_stride_slot": value.stride(0), "value_stride_head": value.stride(1),
        }  # fmt: skip
        params = self.module.DecodeAttention(
            levels=fields.buffer_info()[0],
            num_levels=len(levels),
            dtype=DTYPES[query.dtype],
            query=query.data_ptr(),
            query_stride_slot=query.stride(0),
            query_stride_head=query.stride(1),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            partial=partial.data_ptr(),
            slots=slots,
            query_heads=heads,
            key_heads=key_heads,
            width=width,
            value_width=value_width,
            window=window or 0,
            scale=scale * LOG2E,
            **new,
        )
        self.launch("decode_attention", params, query.device)


def _contiguous(level):
    """The level with indices as the kernels read them."""
    lengths, segment, table = level.lengths, level.segment, level.block_table
    if not lengths.is_contiguous():
        level = level._replace(lengths=lengths.contiguous())
    if segment is not None and not segment.is_contiguous():
        level = level._replace(segment=segment.contiguous())
    if table is not None and table.stride(1) != 1:
        level = level._replace(block_table=table.contiguous())
    return level
