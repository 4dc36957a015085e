"""Group attention on Hopper and newer GPUs by cuDNN's attention, in calls whose shapes recur.

cuDNN builds an execution plan for each shape that is new to a thread, which takes tens to hundreds of milliseconds, and the
lengths of packs differ from step to step. So all calls use shapes from a small set:

- The prefix is split at a multiple of BLOCK. All later tokens of the group attend to its head, the keys before the split.
- Its tail, the fewer than BLOCK tokens after the split, is copied in front of each completion, and [tail | completion] attends
  to itself causally. These sequences are padded at their ends to one length. The padding needs no mask: no token sees a later
  token.
- The queries that attend to the head are padded too. The results of padded queries are not read. In the backward pass their
  log-sum-exp is so large that their probabilities are 0, and so are their gradients.

If the lengths are multiples of BLOCK, the sequences are views of the pack. Results are merged as in parts.py.
"""

import os
from functools import lru_cache
from typing import NamedTuple

import torch

from vlmkernels.ops.group_attention.flash import aligned, unsupported_operands

BLOCK = 128
NO_WEIGHT = 1e30  # the log-sum-exp of padded queries: e^(score - NO_WEIGHT) is 0


def unsupported(query: torch.Tensor) -> str | None:
    if reason := unsupported_operands(query, 128, (9, 0)):
        return reason
    if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) <= 91500:
        return f"needs cuDNN 9.15.1 or higher, got {torch.backends.cudnn.version()}"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 changes the layout of the log-sum-exp"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "cuDNN's backward pass is not deterministic"
    return None


def _padded(length: int) -> int:
    """Return the smallest length of the set that is >= ``length``.

    The set has all multiples of BLOCK up to 16 blocks, then 8 lengths per power of two.
    """
    step = max(BLOCK, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


class _Plan(NamedTuple):
    """The calls of cuDNN for one group."""

    num_tokens: int
    head: int  # the number of tokens of the prefix before the split
    tail: int  # the number of tokens of the prefix after the split
    num_sequences: int  # the number of sequences [tail | completion], of one padded length
    # The tokens after the head, (num_tokens - head,) int32.
    rows: torch.Tensor | None = None
    # The same with padding, int32: the queries that attend to the head. None: no padding.
    queries: torch.Tensor | None = None
    # The tokens of the sequences, (num_sequences * length,) int32. None: the tokens after the head.
    index: torch.Tensor | None = None
    # The same, but num_tokens for padding and for all copies of the tail except the first.
    lse_index: torch.Tensor | None = None
    # The position in the sequences of each token after the head, (num_tokens - head,) int32.
    places: torch.Tensor | None = None

    def calls_on_head(self) -> list[tuple[int, int, bool, torch.Tensor | None]]:
        """Return the calls on the head: the start and stop of the queries, whether it is causal, and ``queries`` or None."""
        calls = (0, self.head, True, None), (self.head, self.num_tokens, False, self.queries)
        return [call for call in calls if self.head and call[0] < call[1]]


@lru_cache(maxsize=64)  # all layers of a pass have the same groups
def _plan(prefix: int, completions: tuple[int, ...], device: torch.device) -> _Plan:
    """Build the plan of one group on the host and copy it without waiting for the device."""
    tail = prefix % BLOCK
    completions = tuple(length for length in completions if length) or ((0,) if tail else ())
    num, head = prefix + sum(completions), prefix - tail
    if num == head:
        return _Plan(num, head, tail, 0)
    host = {"rows": torch.arange(head, num)}
    length = _padded(tail + max(completions))
    if tail or completions != (length,) * len(completions):
        host |= _sequences(head, prefix, completions, length)
    padding = _padded(num - head + ("index" in host)) - (num - head)  # lse_index needs a padded row
    if head and padding:
        host["queries"] = torch.cat([host["rows"], torch.full((padding,), head)])
    packed = torch.cat(list(host.values())).to(torch.int32)
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([len(x) for x in host.values()])
    return _Plan(num, head, tail, len(completions), **dict(zip(host, parts, strict=True)))


def _sequences(head: int, prefix: int, completions: tuple[int, ...], length: int) -> dict[str, torch.Tensor]:
    """Return the fields index, lse_index and places of a plan."""
    num, tail = prefix + sum(completions), prefix - head
    index = torch.zeros(len(completions), length, dtype=torch.int64)
    lse_index = torch.full_like(index, num)
    start = prefix
    for number, size in enumerate(completions):
        index[number, :tail] = torch.arange(head, prefix)
        index[number, tail : tail + size] = torch.arange(start, start + size)
        own = slice(tail if number else 0, tail + size)
        lse_index[number, own] = index[number, own]
        start += size
    index, lse_index = index.flatten(), lse_index.flatten()
    places = torch.empty(num + 1, dtype=torch.int64).scatter_(0, lse_index, torch.arange(len(index)))
    return {"index": index, "lse_index": lse_index, "places": places[head:num]}


def _forward(query, key, value, causal: bool, scale: float):
    """Return the output, with the memory layout of query (B, H, S, D), and the log-sum-exp (B, H, S) in fp32.

    key and value are (B, Hkv, T, D).
    """
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(query.shape[:3])


def _backward(dout, query, key, value, out, lse, causal: bool, scale: float):
    """Return the gradients of query, key and value through one call, given the merged ``out`` and ``lse`` (contiguous)."""
    dropout_state = torch.empty(0, dtype=torch.int64, device=lse.device)  # not read without dropout
    lengths = query.shape[2], key.shape[2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        query,
        key,
        value,
        out,
        lse.view(-1).view(*lse.shape, 1),
        dropout_state,
        dropout_state,
        None,
        None,
        None,
        *lengths,
        0.0,
        causal,
        scale=scale,
    )


def _batch(x: torch.Tensor, num_sequences: int = 1) -> torch.Tensor:
    """View (B * S, H, D) as (B, H, S, D)."""
    return x.unflatten(0, (num_sequences, -1)).transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape (B, H, S, D) to (B * S, H, D). For the results of cuDNN this is a view."""
    return x.transpose(1, 2).flatten(0, 1)


def _take(x: torch.Tensor, index: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    return x[start:stop] if index is None else x.index_select(0, index)


def _join(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scale):
        from vlmkernels.ops.group_attention.merge import merge_

        query, key, value = (aligned(x.contiguous()) for x in (query, key, value))
        num, head = plan.num_tokens, plan.head
        outs, lses = [], []  # padding is at the end
        for start, stop, causal, index in plan.calls_on_head():
            q = _batch(_take(query, index, start, stop))
            part, part_lse = _forward(q, _batch(key[:head]), _batch(value[:head]), causal, scale)
            outs.append(_rows(part))
            lses.append(part_lse[0])
        if outs:
            out, lse = _join(outs), _join(lses, 1)
        if plan.num_sequences:
            inputs = [_batch(_take(x, plan.index, head, num), plan.num_sequences) for x in (query, key, value)]
            part, part_lse = _forward(*inputs, True, scale)
            part, part_lse = _rows(part), part_lse.transpose(0, 1).flatten(1)
            if plan.places is not None:
                part, part_lse = part.index_select(0, plan.places), part_lse.index_select(1, plan.places)
            if outs:
                merge_(out, lse, part, part_lse, plan.rows)
            else:
                out, lse = part, torch.nn.functional.pad(part_lse, (0, 1))
        if lse.shape[1] > num:
            lse[:, num:].fill_(NO_WEIGHT)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out if len(out) == num else out[:num]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        num, head, tail = plan.num_tokens, plan.head, plan.tail
        dout = aligned(dout.contiguous())
        dqueries, dkeys, dvalues = [], [], []
        for start, stop, causal, index in plan.calls_on_head():
            do, q = (_batch(_take(x, index, start, stop)) for x in (dout, query))
            padded = slice(start, start + q.shape[2])
            results = _batch(out[padded]), lse[None, :, padded].contiguous()
            dq, dk, dv = map(_rows, _backward(do, q, _batch(key[:head]), _batch(value[:head]), *results, causal, scale))
            if dkeys:
                dk, dv = dkeys.pop() + dk, dvalues.pop() + dv
            dqueries.append(dq[: stop - start])
            dkeys.append(dk)
            dvalues.append(dv)
        if plan.num_sequences:
            tensors = [_batch(_take(x, plan.index, head, num), plan.num_sequences) for x in (dout, query, key, value, out)]
            own_lse = lse[:, head:num] if plan.lse_index is None else lse.index_select(1, plan.lse_index)
            own_lse = own_lse.unflatten(1, (plan.num_sequences, -1)).transpose(0, 1).contiguous()
            dq, dk, dv = map(_rows, _backward(*tensors, own_lse, True, scale))
            if plan.places is not None:
                dq = dq.index_select(0, plan.places)
                if tail:
                    copies = [x.unflatten(0, (plan.num_sequences, -1))[:, :tail].sum(0) for x in (dk, dv)]
                    dkeys.append(copies[0])
                    dvalues.append(copies[1])
                dk, dv = (x.index_select(0, plan.places[tail:]) for x in (dk, dv))
            if dqueries:
                dqueries[-1][head - num :].add_(dq)
            else:
                dqueries.append(dq)
            dkeys.append(dk)
            dvalues.append(dv)
        return *(_join(x) for x in (dqueries, dkeys, dvalues)), None, None


def run(query, key, value, layout, scale):
    sizes = [end - begin for begin, _, end in layout.groups]
    outs = []
    for prefix, completions, *inputs in zip(
        layout.prefixes, layout.completions, *(x.split(sizes) for x in (query, key, value)), strict=True
    ):
        outs.append(_Group.apply(*inputs, _plan(prefix, completions, query.device), scale))
    return _join(outs)
