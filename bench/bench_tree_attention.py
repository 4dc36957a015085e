"""Attention of groups that share a prefix, compared with attention over one copy of the prefix per completion."""

import functools

import harness
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels.ops.tree_attention import TreeLayout, chosen_backend, tree_attention

EQUAL = TreeLayout.groups((2048,), ((512,) * 8,))
SHORT = TreeLayout.groups((1300,), ((256,) * 8,))
LONG = TreeLayout.groups((2048,), ((1024,) * 8,))
RAGGED = TreeLayout.groups((2048, 1100), ((512, 301, 477, 96, 388, 512, 230, 411), (512, 150, 333, 512, 275, 64, 490, 366)))
# layout, query heads, key heads, head dimension, dtype
CASES = {
    "P 1300, 8 x 256, 16 / 2 heads of 128": (SHORT, 16, 2, 128, torch.bfloat16),  # Qwen2.5-VL-3B
    "P 2048, 8 x 512, 16 heads of 128": (EQUAL, 16, 16, 128, torch.bfloat16),
    "P 2048, 8 x 512, 16 / 4 heads of 128": (EQUAL, 16, 4, 128, torch.bfloat16),
    "P 2048, 8 x 1024, 28 / 4 heads of 128": (LONG, 28, 4, 128, torch.bfloat16),  # Qwen2.5-VL-7B
    "two groups, ragged, 16 / 4 heads of 128": (RAGGED, 16, 4, 128, torch.bfloat16),
}
if not harness.GPU:
    CASES = {"P 256, 8 x 64, 4 heads of 64": (TreeLayout.groups((256,), ((64,) * 8,)), 4, 4, 64, torch.float32)}


def exact_results(inputs, weight, layout):
    """Output and gradients in fp64, one head after another."""
    mask = layout.mask().to(weight.device)
    results = [torch.zeros_like(x, dtype=torch.float64) for x in (inputs[0], *inputs)]
    shared = inputs[0].shape[1] // inputs[1].shape[1]
    for head in range(inputs[0].shape[1]):
        places = head, head // shared, head // shared
        leaves = [x.detach()[:, place].double().requires_grad_() for x, place in zip(inputs, places, strict=True)]
        query, key, value = leaves
        scores = (query @ key.T * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1) @ value
        gradients = torch.autograd.grad(out, leaves, weight[:, head].double())
        for total, part, place in zip(results, (out.detach(), *gradients), (head, *places), strict=True):
            total[:, place] += part
    return results


def leaves(layout):
    """The segments without descendants."""
    return [segment for segment in range(len(layout.parents)) if segment not in layout.parents]


class Copies:
    """A copy of its path for every leaf: (copies, H, T, D), padded on the right.

    Args:
        layout: the layout of the pack.
        chosen: the leaves, by default all.
        seen: the tokens of the pack that earlier copies have. Those of these copies are added.
    """

    def __init__(self, layout, chosen=None, seen=None):
        spans = [range(start, start + length) for start, length in zip(layout.starts, layout.lengths, strict=True)]
        chosen = leaves(layout) if chosen is None else chosen
        paths = [[token for segment in layout.path(leaf) for token in spans[segment]] for leaf in chosen]
        width, seen = max(map(len, paths)), set() if seen is None else seen
        self.index = torch.tensor([(*path, *[0] * (width - len(path))) for path in paths], device=harness.DEVICE)
        self.valid = torch.tensor([[1] * len(path) + [0] * (width - len(path)) for path in paths], device=harness.DEVICE).bool()
        once = [[row not in seen and not seen.add(row) for row in path] + [False] * (width - len(path)) for path in paths]
        self.once = torch.tensor(once, device=harness.DEVICE)  # the first copy of each token

    def make(self, x, places=None):
        """The copies of a packed tensor, 0 outside ``places``."""
        copies = x.detach()[self.index]
        if places is not None:
            copies = copies * places[..., None, None]
        return copies.transpose(1, 2)

    def pack(self, copies, places, num):
        """The sum of the copies of each packed token over ``places``."""
        rows = copies.transpose(1, 2)[places].double()
        return rows.new_zeros(num, *rows.shape[1:]).index_add_(0, self.index[places], rows)


def differentiate(attention, inputs, weight, backward):
    if not backward:
        with torch.no_grad():
            return (attention(*inputs),)
    out = attention(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, weight)


@pytest.mark.parametrize("backward", [True, False], ids=["forward and backward", "forward"])
@pytest.mark.parametrize("case", CASES)
def test_tree_attention(benchmark, case, backward):
    layout, heads, key_heads, width, dtype = CASES[case]
    rng, num = torch.Generator().manual_seed(0), layout.num_tokens
    *inputs, weight = (
        torch.randn(num, h, width, generator=rng).to(harness.DEVICE, dtype) for h in (heads, key_heads, key_heads, heads)
    )
    for x in inputs:
        x.requires_grad_()
    exact = exact_results(inputs, weight, layout)[: 4 if backward else 1]
    copies = Copies(layout)
    copied = [copies.make(x).contiguous().requires_grad_() for x in inputs]
    copied_weight = copies.make(weight, copies.once).contiguous()

    def ours(name):
        attention = functools.partial(tree_attention, layout=layout, backend=name)
        return lambda: differentiate(attention, inputs, weight, backward)

    def on_copies(kernel):
        def attention(q, k, v):
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != key_heads)

        return lambda: differentiate(attention, copied, copied_weight, backward)

    def flash4_on_copies():
        from flash_attn.cute import flash_attn_func

        def attention(q, k, v):
            return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0].transpose(1, 2)

        return differentiate(attention, copied, copied_weight, backward)

    names = harness.backends("tree_attention", inputs[0], first=chosen_backend(inputs[0], layout))
    providers = {f"vlmkernels {name}": ours(name) for name in names if harness.GPU or name != "flex"}  # forward only on the CPU
    if harness.GPU:
        providers["flash attention on copies"] = on_copies(SDPBackend.FLASH_ATTENTION)
        if "vlmkernels flash4" in providers:
            providers["FlashAttention-4 on copies"] = flash4_on_copies
        providers["cuDNN attention on copies"] = on_copies(SDPBackend.CUDNN_ATTENTION)
    else:
        providers["flash attention on copies"] = on_copies(SDPBackend.FLASH_ATTENTION)

    def check(name, result):
        if "copies" in name:
            out, *gradients = result
            result = [copies.pack(out, copies.once, num), *(copies.pack(x, copies.valid, num) for x in gradients)]
        errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(result, exact, strict=True)]
        assert max(errors) < 2e-2, f"{name} is wrong: relative errors {errors}"
        return ", ".join(f"{what} {error:.0e}" for what, error in zip(("out", "dq", "dk", "dv"), errors, strict=False))

    flops = (12 if backward else 4) * layout.num_pairs() * heads * width  # without the scores that the backward pass recomputes
    title = f"tree_attention {case}" + ("" if backward else ", no gradient")
    harness.compare(benchmark, harness.Case(title, providers, check, limit_s=10, flops=flops, late=["vlmkernels flex"]))
