"""The gated delta rule of trees of segments. Imports only torch: backends load on first use."""

from typing import Literal, NamedTuple, overload

import torch

from vlmkernels.backend import resolve, select
from vlmkernels.ops.checks import dtype_name, require_device, require_dtype, require_positive, require_shape, require_tensor
from vlmkernels.ops.tree_attention.layout import TreeLayout

__all__ = ["gated_delta_rule"]


class Inputs(NamedTuple):
    """The tensors of a call, by token."""

    query: torch.Tensor  # (N, Hk, Dk)
    key: torch.Tensor  # (N, Hk, Dk)
    value: torch.Tensor  # (N, Hv, Dv)
    g: torch.Tensor  # (N, Hv)
    beta: torch.Tensor  # (N, Hv)


@overload
def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    layout: TreeLayout,
    *,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    return_state: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    layout: TreeLayout,
    *,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    return_state: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    layout: TreeLayout,
    *,
    initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the gated delta rule along every path of a pack of trees: each segment starts from the final state of its parent.

    Equivalent, for the state ``S`` (Hv, Dk, Dv) before each token t, to::

        q, k = (l2norm(x[t]).repeat_interleave(Hv // Hk, 0) for x in (query, key))
        S = g[t].exp()[:, None, None] * S
        S = S + einsum("hk,hv->hkv", k, beta[t, :, None] * (value[t] - einsum("hkv,hk->hv", S, k)))
        out[t] = scale * einsum("hkv,hk->hv", S, q)

    Args:
        query, key: (N, Hk, Dk) with N = layout.num_tokens, floating point.
        value: (N, Hv, Dv) in the dtype of ``query``; Hk divides Hv.
        g: (N, Hv), the logarithm of the decay; <= 0. Any floating dtype, fp32 is best.
        beta: (N, Hv), the fraction by which a token corrects the state. Any floating dtype.
        layout: the segments and their parents, see ``TreeLayout``.
        initial_state: (R, Hv, Dk, Dv), the state before each of the R roots of ``layout``. Any floating dtype. Default: zeros.
        scale: multiplies the output. Default 1 / sqrt(Dk).
        normalize: divide each query and key by sqrt(its sum of squares + 1e-6).
        return_state: also return the state after each segment.
        backend: one of

            - "fla" (CUDA, bf16 and fp16): flash-linear-attention 0.5 or later, one call for all segments of one depth.
            - "torch": chunks of tokens by matrix products, all chunks with the same number of chunks before them in one batch.
            - "reference": one token after another, the oracle of the tests.
            - "auto": on CUDA "fla" if it is installed and supports the tensors, else "torch".

    Returns:
        The output (N, Hv, Dv) in the dtype of ``query``, and with ``return_state`` the final states (S, Hv, Dk, Dv) of the S
        segments, in the dtype of the computation: fp64 for fp64 inputs, else fp32. The state of an empty segment is that of its
        parent. All five inputs and ``initial_state`` get exact gradients, summed over the segments that continue a state.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong, or ``backend`` is unknown.
        NotImplementedError: the named backend does not support these tensors.

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464.
    """
    inputs = Inputs(query, key, value, g, beta)
    _check(inputs, layout, initial_state)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    require_positive("scale", scale)
    rule = select("gated_delta_rule", resolve("gated_delta_rule", backend), query)
    if layout.num_tokens:
        with torch.autocast(query.device.type, enabled=False):
            out, states = rule.run(inputs, layout, initial_state, scale, normalize, return_state)
    else:
        out = value + sum(x.sum() for x in inputs)  # empty, and a function of all inputs for their gradients
        states = _states_without_tokens(inputs, layout, initial_state)
    out = out.to(query.dtype)
    return (out, states) if return_state else out


def _states_without_tokens(inputs: Inputs, layout: TreeLayout, initial_state: torch.Tensor | None) -> torch.Tensor:
    """Return the final states (S, Hv, Dk, Dv) of a pack without tokens: those before the roots."""
    dtype, heads, width = torch.promote_types(inputs.query.dtype, torch.float32), *inputs.value.shape[1:]
    if initial_state is None:
        return inputs.value.new_zeros(len(layout.parents), heads, inputs.key.shape[2], width, dtype=dtype)
    roots = [layout.parents[: layout.path(segment)[0]].count(-1) for segment in range(len(layout.parents))]
    return initial_state.to(dtype)[roots]


def _check(inputs: Inputs, layout: TreeLayout, initial_state: torch.Tensor | None) -> None:
    query, key, value, g, beta = inputs
    given = {} if initial_state is None else {"initial_state": initial_state}
    for name, tensor in (inputs._asdict() | given).items():
        require_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {dtype_name(tensor.dtype)}")
        require_device(name, tensor, query.device, "query")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.dim() != 3 or len(tensor) != layout.num_tokens:
            raise ValueError(f"{name} must be (N, H, D) of the {layout.num_tokens} tokens of layout, got {tuple(tensor.shape)}")
    require_shape("key", key, query.shape, "query")
    require_dtype("key", key, query.dtype)
    require_dtype("value", value, query.dtype)
    if value.shape[1] % max(key.shape[1], 1):
        raise ValueError(f"value must have a multiple of the {key.shape[1]} heads of key, got {value.shape[1]}")
    for name, tensor in (("g", g), ("beta", beta)):
        require_shape(name, tensor, value.shape[:2], "(N, Hv)")
    if initial_state is not None:
        shape = (layout.parents.count(-1), value.shape[1], key.shape[2], value.shape[2])
        require_shape("initial_state", initial_state, shape, "(roots of layout, Hv, Dk, Dv)")
