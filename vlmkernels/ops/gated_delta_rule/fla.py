"""The gated delta rule by the kernels of flash-linear-attention. https://github.com/fla-org/flash-linear-attention

All segments with the same number of ancestors that have tokens are one call, as packed sequences. The next call starts from the
final states that it returns, and autograd leads through them.
"""

import functools
import inspect
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from vlmkernels.ops.checks import unless_half_on_cuda
from vlmkernels.ops.gated_delta_rule import plan as plans
from vlmkernels.ops.tree_attention.layout import TreeLayout

WIDEST = 256  # the largest head dimension of its kernels


@functools.cache
def _module() -> Any:
    """Return fla.ops.gated_delta_rule, or the error that importing it raised."""
    try:
        import fla.ops.gated_delta_rule

        return fla.ops.gated_delta_rule
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return error


def unsupported(query: torch.Tensor) -> str | None:
    if reason := unless_half_on_cuda(query):
        return reason
    if query.shape[-1] > WIDEST:
        return f"supports head dimensions up to {WIDEST}, got {query.shape[-1]}"
    if isinstance(_module(), Exception):
        return f"flash-linear-attention did not load ({_module()})"
    if "cu_seqlens_cpu" not in inspect.signature(_module().chunk_gated_delta_rule).parameters:
        return "needs flash-linear-attention 0.5 or later"
    return None


class _Level(NamedTuple):
    """The segments of one call.

    Attributes:
        count: the number of their tokens.
        bounds, bounds_cpu: (n + 1,) int64 cumulative lengths, on the device and on the host.
        sources: the states they start from, among those of the level before, or of the roots.
    """

    count: int
    bounds: torch.Tensor
    bounds_cpu: torch.Tensor
    sources: plans.Rows


class _Plan(NamedTuple):
    """The calls of a layout.

    Attributes:
        order: the tokens of all levels, one level after another; None if this is their order in the pack.
        places: the place of each token in ``order``.
        finals: for each segment its final state, among those of all levels, followed by those of the roots.
        needs_roots: whether ``finals`` has states of the roots.
    """

    levels: tuple[_Level, ...]
    order: torch.Tensor | None
    places: torch.Tensor | None
    finals: plans.Rows
    needs_roots: bool


@functools.lru_cache(maxsize=16)  # all layers of a pass have the same layout
@torch.inference_mode(False)
def _plan(layout: TreeLayout, device: torch.device) -> _Plan:
    segments, ends = plans.chunks(layout, (max(layout.lengths),))
    states = {-1 - root: root for root in range(layout.parents.count(-1))}
    ordered = sorted(segments)
    levels = []
    for number in range(ordered[-1].wave + 1):
        members = [x for x in ordered if x.wave == number]
        states.update((x.index, i) for i, x in enumerate(members))
        bounds = torch.tensor(list(accumulate((x.length for x in members), initial=0)))
        sources = plans.rows([states[x.source] for x in members], device)
        levels.append(_Level(int(bounds[-1]), plans.upload(bounds, device), bounds, sources))
    order = torch.cat([torch.arange(x.start, x.start + x.length) for x in ordered])
    places = order.argsort()
    row = {x.index: i for i, x in enumerate(ordered)}
    finals = plans.rows([row[x] if x >= 0 else len(ordered) - 1 - x for x in ends], device)
    if len(levels) == 1:
        return _Plan(tuple(levels), None, None, finals, min(ends) < 0)
    return _Plan(tuple(levels), *(plans.upload(x, device) for x in (order, places)), finals, min(ends) < 0)


def run(inputs, layout, initial_state, scale, normalize, return_state):
    plan, fla = _plan(layout, inputs.query.device), _module()
    tensors = inputs if plan.order is None else [x.index_select(0, plan.order) for x in inputs]
    roots = state = None if initial_state is None else initial_state.float()
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *(() if roots is None else (roots,))))
    outputs, states = [], []
    for level, *parts in zip(plan.levels, *(x.split([level.count for level in plan.levels]) for x in tensors), strict=True):
        settings = {
            "scale": scale,
            "initial_state": None if state is None else _take(state, level.sources),
            "output_final_state": return_state or level is not plan.levels[-1],
            "use_qk_l2norm_in_kernel": normalize,
        }
        if layout.longest_path == 1 and not grad:  # a decoding step; the function has no gradients
            settings |= dict(zip(("q", "k", "v", "g", "beta"), (x.unsqueeze(1) for x in parts), strict=True))
            out, state = fla.fused_recurrent_gated_delta_rule(**settings)
            outputs.append(out.squeeze(1))
        else:
            settings |= {"cu_seqlens": level.bounds, "cu_seqlens_cpu": level.bounds_cpu}
            out, state = fla.chunk_gated_delta_rule(*(x.unsqueeze(0) for x in parts), **settings)
            outputs.append(out.squeeze(0))
        states.append(state)
    out = outputs[0] if plan.places is None else torch.cat(outputs).index_select(0, plan.places)
    if not return_state:
        return out, None
    if plan.needs_roots:
        states.append(states[0].new_zeros(layout.parents.count(-1), *states[0].shape[1:]) if roots is None else roots)
    return out, _take(states[0] if len(states) == 1 else torch.cat(states), plan.finals)


def _take(x: torch.Tensor, rows: plans.Rows) -> torch.Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
