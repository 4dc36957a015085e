"""Bytes per token of a transformer layer: what autograd saves, and what the layer reads and writes.

The numbers were counted in the eager layers of transformers, as the trainer runs them.
tests/plan/test_costs.py compares them with measurements in torch.
"""

from typing import NamedTuple

from vlmkernels.plan.shape import Stack

FP32_BYTES = 4


class PerToken(NamedTuple):
    """Elements per token and layer, as multiples of the layer's widths: hidden, query, key (or value), intermediate."""

    hidden: float
    query: float
    key: float
    intermediate: float

    def elements(self, stack: Stack) -> float:
        """Return the elements per token and layer for the widths of ``stack``."""
        widths = stack.hidden, stack.query_width, stack.kv_width, stack.intermediate
        return sum(factor * width for factor, width in zip(self, widths, strict=True))


class LayerKind(NamedTuple):
    """Elements per token and layer of one kind of layer.

    Attributes:
        saved: elements that autograd saves in fp32.
        forward, backward: elements that operations other than matrix products read and write.
    """

    saved: PerToken
    forward: PerToken
    backward: PerToken


# Decoders without and with norms of queries and keys, with the rotary embeddings of use_tree_attention. Vision towers with and
# without a gate in the MLP; their queries and keys are as wide as their hidden states, so they are counted under hidden.
DECODER = LayerKind(PerToken(6, 2, 2, 4), PerToken(20, 13.5, 2, 5), PerToken(50, 24, 16, 9))
DECODER_QK_NORM = LayerKind(PerToken(6, 4, 4, 4), PerToken(20, 21.5, 9, 5), PerToken(63, 33.5, 39.5, 9))
TOWER_GATED = LayerKind(PerToken(12, 0, 0, 4), PerToken(24.4, 0, 0, 5), PerToken(84, 0, 0, 11))
TOWER = LayerKind(PerToken(10, 0, 0, 2), PerToken(14.4, 0, 0, 2), PerToken(39.5, 0, 0, 4))
# Bytes (not elements) that autograd saves under bf16 autocast: norms and the residual stream stay fp32, and each matrix product
# saves its own copy of its input.
DECODER_BF16 = {False: PerToken(26, 4, 4, 8), True: PerToken(26, 10, 10, 8)}  # by qk_norm
TOWER_BF16 = {False: PerToken(20, 0, 0, 4), True: PerToken(30, 0, 0, 8)}  # by gated


def kind_of(stack: Stack, tower: bool) -> LayerKind:
    """Return the kind of layer of a decoder, or with ``tower`` of a vision tower."""
    if tower:
        return TOWER_GATED if stack.gated else TOWER
    return DECODER_QK_NORM if stack.qk_norm else DECODER


def saved_bytes(stack: Stack, tower: bool, precision: str) -> float:
    """Return the bytes per token and layer that autograd saves."""
    if precision == "fp32":
        return FP32_BYTES * kind_of(stack, tower).saved.elements(stack)
    return (TOWER_BF16[stack.gated] if tower else DECODER_BF16[stack.qk_norm]).elements(stack)
