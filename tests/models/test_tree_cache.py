"""The matrix products of decoding; tests/rollout/test_generate.py compares the tokens with those of ``generate``."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels.models.tree_cache import TreeCache

HEADS, WIDTH = 2, 9


class Products(TorchDispatchMode):
    """Collect the operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.operands += args[:2]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 1, 1], [0, 1, 1]], ids=["one each", "even", "uneven"])
def test_no_operand_with_gaps_reaches_a_gemm(dtype, owners):
    """With AMX, oneDNN reads past the rows of such an operand. The result equals attention over each slot's own tokens."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    lengths, steps, slots = [5, 3], 3, len(owners)
    cache = TreeCache(slots)
    cache.begin([0, 1], lengths)
    prompt = [random(1, HEADS, sum(lengths), WIDTH) for _ in range(2)]
    cache.fill(0, *prompt)
    own = [[], []]
    for step in range(steps):
        cache.arrange(owners, [step] * slots, torch.device("cpu"))
        query = random(1, slots, 2 * HEADS, 2 * WIDTH)[..., :WIDTH].transpose(1, 2)
        new = [random(1, HEADS, slots, WIDTH) for _ in range(2)]
        for tokens, token in zip(own, new, strict=True):
            tokens.append(token)
        with Products() as products:
            out = cache.attend(0, query, *new, None)
    assert len(products.operands) == 8
    assert all(matrix.is_contiguous() or matrix.mT.is_contiguous() for x in products.operands for matrix in x)
    for slot, owner in enumerate(owners):
        start = sum(lengths[:owner])
        key, value = (
            torch.cat([x[0, :, start : start + lengths[owner]], torch.cat(tokens, 2)[0, :, slot::slots]], 1)
            for x, tokens in zip(prompt, own, strict=True)
        )
        q = query[0, :, slot : slot + 1]
        k, v = (x.repeat_interleave(2, 0) for x in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        torch.testing.assert_close(out[0, slot].double(), expected[:, 0], rtol=0.02, atol=0.02)
