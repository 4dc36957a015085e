"""Small and large calls of the kernels, one process each, for compute-sanitizer and ncu.

    python bench/kernel_cases.py CASE [--backend cuda|triton|cpp] [--large] [--repeat N]
    compute-sanitizer --tool memcheck python bench/kernel_cases.py misaligned_rows
    ncu --kernel-name regex:gather_logps_fwd --launch-skip 1 --launch-count 1 python bench/kernel_cases.py gather --large

Without --large the inputs are the smallest that reach the code. A case only checks that its results are finite. Without a GPU,
`triton` runs under TRITON_INTERPRET=1, and `cpp`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import vlmkernels as vk
from vlmkernels.ops.fixed_matmul import fixed_matmul
from vlmkernels.ops.tree_attention.merge import merge_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: dict[str, Callable[[str, bool], list[torch.Tensor]]] = {}


def case(function):
    CASES[function.__name__] = function
    return function


def randn(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _with_gradient(logits: torch.Tensor, backend: str, **options) -> list[torch.Tensor]:
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], device=DEVICE)
    leaf = logits.requires_grad_()
    source = leaf.clone() if options.get("inplace_backward") else leaf
    logp, entropy = vk.gather_logps(source, targets, return_entropy=True, backend=backend, **options)
    (gradient,) = torch.autograd.grad((logp + 0.1 * entropy).sum(), leaf)
    return [logp.detach(), entropy.detach(), gradient]


@case
def gather(backend: str, large: bool) -> list[torch.Tensor]:
    """gather_logps, forward and backward."""
    shape = (8192, 151936) if large else (5, 5003)
    return _with_gradient(randn(*shape, dtype=torch.bfloat16), backend)


@case
def misaligned_rows(backend: str, large: bool) -> list[torch.Tensor]:
    """Rows at every offset from a 16-byte boundary, rows that several blocks share, and in-place gradients."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for offset, num, vocab in ((1, 9, 1003), (3, 2, 40001)):
            storage = randn(offset + num * vocab, dtype=dtype)
            results += _with_gradient(storage[offset:].view(num, vocab).detach(), backend)
            results += _with_gradient(storage[offset:].view(num, vocab).detach(), backend, inplace_backward=True)
    return results


@case
def sample(backend: str, large: bool) -> list[torch.Tensor]:
    """sample_logps with all filters, a table of banned tokens and a penalty, and greedy, on misaligned rows."""
    num, vocab = (64, 151936) if large else (5, 5003)
    results = []
    for dtype, offset in ((torch.bfloat16, 0), (torch.float32, 1)):
        logits = randn(offset + num * vocab, dtype=dtype)[offset:].view(num, vocab)
        uniform = torch.rand(num, dtype=torch.float64, device=DEVICE)
        masks = torch.rand(num, vocab, device=DEVICE) < 0.1
        table = torch.arange(num, device=DEVICE)
        options = {"seen": masks, "repetition_penalty": 1.2, "banned": masks, "banned_rows": table, "backend": backend}
        results += vk.sample_logps(logits, uniform, top_k=50, top_p=0.9, min_p=0.01, **options)
        results += vk.sample_logps(logits, uniform, top_p=0.95, backend=backend)
        results += vk.sample_logps(logits, None, backend=backend)
    return results


@case
def linear_sample(backend: str, large: bool) -> list[torch.Tensor]:
    """linear_sample_logps in two chunks: drawn tokens of capped logits, and the greatest."""
    num, vocab, width = (64, 151936, 2048) if large else (5, 1003, 33)
    hidden, weight = randn(num, width, dtype=torch.bfloat16), (randn(vocab, width) / width**0.5).bfloat16()
    options = {"chunk_bytes": 4 * vocab * (num // 2 + 1), "backend": backend}
    uniform = torch.rand(num, dtype=torch.float64, device=DEVICE)
    drawn = vk.linear_sample_logps(hidden, weight, uniform, softcap=30.0, top_p=0.9, **options)
    return [*drawn, *vk.linear_sample_logps(hidden, weight, None, **options)]


@case
def tiles(backend: str, large: bool) -> list[torch.Tensor]:
    """fixed_matmul, with rows and columns that do not fill the last tile."""
    m, k, n = (2000, 2048, 151936) if large else (70, 33, 130)
    options = {"out_dtype": torch.float32, "backend": "triton" if backend == "triton" else "auto"}
    operands = [(randn(m, k, dtype=x), randn(n, k, dtype=x).t(), randn(n, dtype=x)) for x in (torch.bfloat16, torch.float32)]
    return [fixed_matmul(a, b, bias=bias, **options) for a, b, bias in operands]


@case
def tree_attention(backend: str, large: bool) -> list[torch.Tensor]:
    """A tree of three levels, forward and backward; and the merge of two parts, by rows and whole."""
    lengths, width = ((1300, 256, 300, 256), 128) if large else ((70, 5, 3, 9), 40)
    layout = vk.TreeLayout(lengths, (-1, 0, 1, 0))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    inputs = [randn(layout.num_tokens, heads, width, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    out = vk.tree_attention(*inputs, layout)
    results = [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]
    if backend == "triton":
        num = layout.num_tokens
        for rows in (None, torch.randperm(num, device=DEVICE)[: num // 2].int()):
            part = randn(num if rows is None else len(rows), 4, width, dtype=torch.bfloat16)
            merged, lse = randn(num, 4, width), randn(4, num)
            merge_(merged, lse, part, randn(4, len(part)), rows)
            results += [merged, lse]
    return results


@case
def linear_attention(backend: str, large: bool) -> list[torch.Tensor]:
    """causal_conv1d and gated_delta_rule of a tree. They have no kernels of this package."""
    lengths, heads, width = ((1300, 256, 300), 16, 128) if large else ((70, 5, 3), 2, 16)
    layout = vk.TreeLayout(lengths, (-1, 0, 0))
    x = randn(layout.num_tokens, heads * width).requires_grad_()
    mixed = vk.causal_conv1d(x, randn(heads * width, 4), layout, activation="silu").view(-1, heads, width)
    gate, beta = -torch.rand(layout.num_tokens, heads, device=DEVICE), torch.rand(layout.num_tokens, heads, device=DEVICE)
    out = vk.gated_delta_rule(mixed, mixed, mixed, gate, beta, layout, backend="torch")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


@case
def linear_rows(backend: str, large: bool) -> list[torch.Tensor]:
    """linear_logps, forward and backward: the 16-bit gradient overwrites the fp32 logits."""
    num, vocab, width = (2048, 151936, 2048) if large else (21, 1003, 33)
    hidden, weight = randn(num, width, dtype=torch.bfloat16), (randn(vocab, width) / width**0.5).bfloat16()
    operands = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(vocab, (num,), device=DEVICE)
    logp, entropy = vk.linear_logps(*operands, targets, return_entropy=True, backend=backend)
    return [logp.detach(), *torch.autograd.grad((logp + 0.1 * entropy).sum(), operands)]


@case
def linear_grpo(backend: str, large: bool) -> list[torch.Tensor]:
    """linear_grpo_loss in one sweep."""
    (B, T), vocab, width = ((4, 512), 151936, 2048) if large else ((3, 7), 1003, 32)
    hidden, weight = randn(B, T, width, dtype=torch.bfloat16), (randn(vocab, width) / width**0.5).bfloat16()
    operands = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(vocab, (B, T), device=DEVICE)
    mask = torch.rand(B, T, device=DEVICE) < 0.8
    output = vk.linear_grpo_loss(*operands, targets, randn(B), loss_mask=mask, config=vk.GRPOLossConfig(), backend=backend)
    return [output.loss.detach(), *torch.autograd.grad(output.loss, operands)]


@case
def linear_kl(backend: str, large: bool) -> list[torch.Tensor]:
    """linear_kl in one sweep, with all kinds of divergence: the 16-bit gradient overwrites the student's fp32 logits."""
    num, vocab, widths = (2048, 151936, (1024, 2048)) if large else (21, 1003, (33, 16))
    hidden, teacher_hidden = (randn(num, width, dtype=torch.bfloat16) for width in widths)
    weight, teacher_weight = ((randn(vocab, width) / width**0.5).bfloat16() for width in widths)
    operands = hidden.requires_grad_(), weight.requires_grad_()
    results = []
    for beta in (0.0, 0.3, 1.0):
        options = {"beta": beta, "token_weights": randn(num), "backend": backend}
        total = vk.linear_kl(*operands, teacher_hidden, teacher_weight, **options)
        results += [total.detach(), *torch.autograd.grad(total, operands)]
    return results


@case
def grpo_loss(backend: str, large: bool) -> list[torch.Tensor]:
    """Padded and packed batches, importance ratios of tokens and of sequences, with the terms of PAPO."""
    B, T = (64, 512) if large else (3, 70)
    results = []
    for level in ("token", "sequence"):
        options = {"entropy_coef": 0.01, "perception_loss_weight": 0.01, "der_loss_weight2": 0.03}
        config = vk.GRPOLossConfig("grpo", beta=0.1, importance_sampling_level=level, **options)
        logps = -torch.rand(B, T, device=DEVICE)
        old, ref, entropy, mask = logps + 0.1, logps - 0.1, torch.rand_like(logps), torch.rand_like(logps) < 0.7
        masked = torch.where(torch.rand_like(logps) < 0.3, torch.nan, logps - 0.2)
        padded = {"old_logps": old, "ref_logps": ref, "masked_logps": masked, "entropy": entropy, "loss_mask": mask}
        lengths = mask.sum(1)
        packed = {name: x[mask] for name, x in padded.items() if name != "loss_mask"}
        packed["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        for values, rest in ((logps, padded), (logps[mask], packed)):
            leaf = values.clone().requires_grad_()
            loss, _ = vk.grpo_loss(leaf, randn(B), **rest, config=config, backend=backend)
            results += [loss.detach(), *torch.autograd.grad(loss, leaf)]
    return results


@case
def rotary(backend: str, large: bool) -> list[torch.Tensor]:
    tokens = 8192 if large else 5
    qkv = randn(tokens, 3 * 6, 80, dtype=torch.bfloat16)
    query, key = qkv[:, :6].detach().requires_grad_(), qkv[:, 6:8].detach().requires_grad_()
    angles = randn(tokens, 40)
    outputs = vk.rotary(query, key, angles.cos(), angles.sin(), backend=backend)
    gradients = torch.autograd.grad([x.float().square().sum() for x in outputs], (query, key))
    return [*(x.detach() for x in outputs), *gradients]


@case
def decode_attention(backend: str, large: bool) -> list[torch.Tensor]:
    """Groups with an even and an uneven number of slots, pages, windows, heads that are not aligned, all dtypes."""
    P, G, num, capacity = (2048, 8, 16, 256) if large else (70, 3, 2, 9)
    results = []
    for dtype, width in ((torch.bfloat16, 128), (torch.bfloat16, 40), (torch.float16, 64), (torch.float32, 128)):
        slots = num * G - 1
        query, key, value = (randn(slots, heads, width, dtype=dtype) for heads in (8, 2, 2))
        segment = (torch.arange(slots, device=DEVICE) // G).int()
        shared = (randn(num, 2, P, width, dtype=dtype) for _ in range(2))
        prompts = vk.KeyValues(*shared, torch.full((num,), P - 1, device=DEVICE).int(), segment).grouped()
        own = (randn(slots, 2, capacity, width, dtype=dtype) for _ in range(2))
        lengths = torch.randint(capacity, (slots,), device=DEVICE).int()
        table = torch.randperm(2 * num, device=DEVICE).view(num, 2).int()
        paged = prompts._replace(key=prompts.key.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1), block_table=table)
        paged = paged._replace(value=prompts.value.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1))
        last = vk.KeyValues(*own, lengths)
        for level, window in ((prompts, None), (paged, None), (prompts, 20)):
            levels = [level, last]
            results += vk.decode_attention(query, levels, key=key, value=value, window=window, return_lse=True, backend=backend)
    return results


@case
def pack_patches(backend: str, large: bool) -> list[torch.Tensor]:
    """Images of different sizes and strides, and patches with an odd number of values."""
    results = []
    for patch in (14, 3):
        side = 2 * patch * (24 if large else 1)
        images = [torch.randint(256, (3, side, 2 * side), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        images.append(images[0][:, :, :side])
        half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "dtype": torch.bfloat16}
        results.append(vk.pack_patches(images, patch_size=patch, **half, backend=backend).pixel_values)
    return results


@case
def group_advantages(backend: str, large: bool) -> list[torch.Tensor]:
    rewards = randn(4096 if large else 77, 2)
    sizes = {"num_generations": 8} if large else {"group_sizes": [1, 40, 2, 3, 31]}
    rules = (
        ("group", "mean", "sum_then_normalize"),
        ("batch", "mean", "sum_then_normalize"),
        ("group", "mean", "normalize_then_sum"),
    )
    names = ("scale", "baseline", "aggregation")
    return [
        vk.group_advantages(rewards, **sizes, **dict(zip(names, rule, strict=True)), backend=backend).advantages
        for rule in rules
    ]


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[*CASES, "all"], metavar="CASE", help=", ".join([*CASES, "all"]))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.backend == "cpp":
        DEVICE = "cpu"
    for name in CASES if "all" in options.cases else options.cases:
        for _ in range(options.repeat):
            results = CASES[name](options.backend, options.large)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        finite = all(bool(x.float().isfinite().all()) for x in results)
        print(f"{name}, {options.backend}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        if not finite:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
