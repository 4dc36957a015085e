"""Recurrent layers over trees: the gated delta rule and causal convolutions, compared with a copy of each path."""

import functools
import inspect

import harness
import pytest
import torch
from torch.nn.functional import conv1d
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from vlmkernels.ops.causal_conv1d import causal_conv1d
from vlmkernels.ops.gated_delta_rule import gated_delta_rule
from vlmkernels.ops.tree_attention import TreeLayout

GROUP = TreeLayout.groups((269,), ((64,) * 8,))
FORKS = TreeLayout((269, *(64,) * 14), (-1, 0, 1, 2, 2, 1, 5, 5, 0, 8, 9, 9, 8, 12, 12))  # each segment has two children
ALONE = TreeLayout((333,) * 4, (-1,) * 4)
# layout, key heads, value heads, head dimension, dtype; the paths of a layout have equal lengths
CASES = {
    "P 269, 8 x 64, 4 / 8 heads of 64": (GROUP, 4, 8, 64, torch.float32),
    "P 269, 3 turns of 64 with two forks each, 4 / 8 heads of 64": (FORKS, 4, 8, 64, torch.float32),
    "4 x 333 without shared tokens, 4 / 8 heads of 64": (ALONE, 4, 8, 64, torch.float32),
}
if harness.GPU:
    CASES = {
        "P 2048, 8 x 512, 16 / 32 heads of 128": (TreeLayout.groups((2048,), ((512,) * 8,)), 16, 32, 128, torch.bfloat16),
        "P 269, 3 turns of 64 with two forks each, 16 / 32 heads of 128": (FORKS, 16, 32, 128, torch.bfloat16),
    }


def paths_of(layout):
    """(copies, T) the tokens of the path of each leaf."""
    spans = [range(start, start + length) for start, length in zip(layout.starts, layout.lengths, strict=True)]
    chosen = [segment for segment in range(len(spans)) if segment not in layout.parents]
    return torch.tensor([[t for s in layout.path(leaf) for t in spans[s]] for leaf in chosen], device=harness.DEVICE)


def first_copies(paths):
    """Whether each token is the first copy of its token of the pack."""
    flat, first = paths.flatten().tolist(), {}
    for i, token in enumerate(flat):
        first.setdefault(token, i)
    return torch.tensor([first[token] == i for i, token in enumerate(flat)], device=paths.device).view_as(paths)


def differentiate(function, inputs, weight):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, weight)


class Copies:
    """The inputs of a layout with a copy of the path of each leaf, and the sums of the gradients of the copies."""

    def __init__(self, layout, inputs, weight):
        self.paths = paths_of(layout)
        self.once = first_copies(self.paths)
        self.inputs = [x.detach()[self.paths].requires_grad_() for x in inputs]  # (copies, T, ...)
        self.weight = weight[self.paths] * self.once.view(*self.paths.shape, *[1] * (weight.dim() - 1))

    def pack(self, out, *gradients):
        num = int(self.paths.max()) + 1
        packed = [out.new_zeros(num, *out.shape[2:]).index_put_((self.paths[self.once],), out[self.once])]
        for x in gradients:
            total = x.new_zeros(num, *x.shape[2:], dtype=torch.float64)
            packed.append(total.index_put_((self.paths,), x.double(), accumulate=True))
        return packed


def check(name, result, exact, names, copies):
    if "copies" in name:
        result = copies.pack(*result)
    errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(result, exact, strict=True)]
    assert max(errors) < (1e-4 if result[0].dtype == torch.float32 else 3e-2), f"{name} is wrong: relative errors {errors}"
    return ", ".join(f"{what} {error:.0e}" for what, error in zip(names, errors, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_gated_delta_rule(benchmark, case):
    layout, key_heads, heads, width, dtype = CASES[case]
    rng, num = torch.Generator().manual_seed(0), layout.num_tokens
    query, key, value, weight = (torch.randn(num, h, width, generator=rng) for h in (key_heads, key_heads, heads, heads))
    g, beta = torch.rand(2, num, heads, generator=rng)
    inputs = [x.to(harness.DEVICE, dtype).requires_grad_() for x in (query, key, value, -g, beta)]
    weight = weight.to(harness.DEVICE, dtype)
    copies = Copies(layout, inputs, weight)
    count, length = copies.paths.shape
    apart = TreeLayout((length,) * count, (-1,) * count)

    def rule(name, layout):
        return functools.partial(gated_delta_rule, layout=layout, backend=name)

    def transformers(query, key, *inputs):
        query, key = (x.repeat_interleave(heads // key_heads, 2) for x in (query, key))  # older versions do not
        return inspect.unwrap(torch_chunk_gated_delta_rule)(query, key, *inputs, use_qk_l2norm_in_kernel=True)[0]

    def on_copies(name):
        flat = [x.detach().flatten(0, 1).requires_grad_() for x in copies.inputs]
        weight = copies.weight.flatten(0, 1)
        return lambda: [x.unflatten(0, (count, length)) for x in differentiate(rule(name, apart), flat, weight)]

    names = harness.backends("gated_delta_rule", inputs[0])
    providers = {f"vlmkernels {name}": functools.partial(differentiate, rule(name, layout), inputs, weight) for name in names}
    if count * length > num:
        providers |= {f"vlmkernels {name} on copies": on_copies(name) for name in names}
    providers["transformers on copies"] = functools.partial(differentiate, transformers, copies.inputs, copies.weight)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = differentiate(rule("torch" if harness.GPU else "reference", layout), doubles, weight.double())
    test = functools.partial(check, exact=exact, names=("out", "dq", "dk", "dv", "dg", "dbeta"), copies=copies)
    harness.compare(benchmark, harness.Case(f"gated_delta_rule {case}", providers, test, limit_s=10))


@pytest.mark.parametrize("channels", [1024] if not harness.GPU else [8192])
def test_causal_conv1d(benchmark, channels):
    rng, num, width = torch.Generator().manual_seed(0), GROUP.num_tokens, 4
    dtype = torch.bfloat16 if harness.GPU else torch.float32
    shapes = (num, channels), (channels, width), (num, channels)
    x, weight, upstream = (torch.randn(*shape, generator=rng).to(harness.DEVICE, dtype) for shape in shapes)
    for leaf in (x, weight):
        leaf.requires_grad_()
    copies = Copies(GROUP, [x], upstream)

    def ours(x, weight):
        return causal_conv1d(x, weight, GROUP)

    def torch_conv1d(x, weight):  # (B, T, D)
        out = conv1d(x.mT, weight.unsqueeze(1), padding=width - 1, groups=channels)
        return out[..., : x.shape[1]].mT

    doubles = [x.detach().double().requires_grad_() for x in (x, weight)]
    exact = differentiate(ours, doubles, upstream.double())[:2]
    providers = {
        "vlmkernels": lambda: differentiate(ours, (x, weight), upstream),
        "conv1d on copies": lambda: differentiate(torch_conv1d, (*copies.inputs, weight), copies.weight),
    }
    whole = x.detach()[None].requires_grad_()
    floors = {"conv1d of the pack as one sequence": lambda: differentiate(torch_conv1d, (whole, weight), upstream[None])}

    def test(name, result):
        return check(name, result[:2], exact, ("out", "dx"), copies)

    title = f"causal_conv1d P 269, 8 x 64, {channels} channels"
    harness.compare(benchmark, harness.Case(title, providers, test, floors, limit_s=5))
