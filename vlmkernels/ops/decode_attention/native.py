"""decode_attention with the compiled module: backends "cpp" and "cuda"."""

from array import array

import torch

from vlmkernels.ops.decode_attention.inputs import part_size
from vlmkernels.ops.launch import DTYPES, Launcher, address, unsupported_dtype
from vlmkernels.ops.layout import unsupported_last_axis

LOG2E = 1.4426950408889634


def level_fields(level):
    """The members of a DecodeLevel."""
    key, value, table = level.key, level.value, level.block_table
    return (
        key.data_ptr(),
        value.data_ptr(),
        *map(address, (level.lengths, level.segment, table, level.order, level.rank)),
        level.num_segments,
        level.capacity,
        key.shape[2],
        len(key),
        0 if table is None else table.stride(0),
        *key.stride()[:3],
        *value.stride()[:3],
    )


class Native(Launcher):
    def unsupported(self, *tensors: torch.Tensor) -> str | None:
        reasons = [unsupported_dtype(x) or unsupported_last_axis(x) for x in tensors]
        width, most = max(x.shape[-1] for x in tensors), self.module.decode_max_width
        if self.name == "cuda" and width > most:
            reasons.append(f"supports head dimensions up to {most}, got {width}")
        return next(filter(None, reasons), None)

    def fwd(self, query, key, value, levels, window, scale, out, lse):
        levels = [
            level._replace(
                lengths=level.lengths.contiguous(),
                segment=None if level.segment is None else level.segment.contiguous(),
                block_table=None if level.block_table is None else _contiguous_rows(level.block_table),
            )
            for level in levels
        ]
        if self.name == "cuda":
            levels = [level.grouped() for level in levels]
        slots, heads, width = query.shape
        key_heads, value_width = levels[0].key.shape[1], out.shape[2]
        part = part_size(levels)
        parts = sum((level.capacity + part - 1) // part for level in levels)
        partial = torch.empty(slots * heads * parts * ((value_width + 31) // 32 * 32 + 16), device=query.device)
        fields = array("q", [x for level in levels for x in level_fields(level)])
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
            part=part,
            window=window or 0,
            scale=scale * LOG2E,
            **new,
        )
        self.launch("decode_attention", params, query.device)


def _contiguous_rows(table):
    return table if table.stride(1) == 1 else table.contiguous()
