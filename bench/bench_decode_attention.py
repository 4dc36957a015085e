"""One layer of a decoding step: attention of one token per completion over shared prompts and own tokens.

Every call appends a token to each completion at the same place. Useful bytes: the keys and values of every prompt once, those
of every completion once, the queries, and the outputs. What kernels write and read in between, such as the results of parts of
a prompt, is not useful.

On a CPU the floating-point operations bound long prompts with many rows (completions x query heads per key head), and the bytes
bound own tokens and groups with few rows. In a core's cache, the tiles of products reach the processor's peak; of the time on
prompts, about 15 % is not products: keys are transposed, scores become probabilities, and parts are merged.

Errors are those of the outputs against fp64, relative to the largest value.
"""

import importlib.util

import harness
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels import KeyValues, decode_attention

# name: prompts, completions of each, tokens of a prompt, own tokens, query heads, key heads, features, dtype
QWEN_3B, QWEN_05B, SMALL = (16, 2, 128), (14, 2, 64), (8, 4, 64)
if harness.GPU:
    CASES = {
        f"{num * 8} completions, P 2048, C 256, {heads[0]} / {heads[1]} heads of {heads[2]}": (num, 8, 2048, 256, *heads, dtype)
        for dtype in (torch.bfloat16,)
        for heads in (QWEN_3B, (28, 4, 128), (32, 8, 128))
        for num in (8, 64)
    }
else:
    CASES = {
        f"{num * 8} completions, P {prompt}, C 64, {heads[0]} / {heads[1]} heads of {heads[2]}, {str(dtype)[6:]}": (
            num, 8, prompt, 64, *heads, dtype,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for heads in (QWEN_3B, QWEN_05B, SMALL)
        for num, prompt in ((2, 269), (8, 2048))
    }  # fmt: skip


def exact_result(query, key, value, levels, own_length):
    """The outputs in fp64, one completion after another."""
    prompts, own = levels
    outs = []
    for s, n in enumerate(prompts.segment.tolist()):
        k, v = (
            torch.cat([x[n], y[s, :, :own_length], z[s].unsqueeze(1)], 1).double().unsqueeze(0)
            for x, y, z in ((prompts.key, own.key, key), (prompts.value, own.value, value))
        )
        outs.append(scaled_dot_product_attention(query[s].double()[None, :, None], k, v, enable_gqa=True)[0, :, 0])
    return torch.stack(outs)


def flashinfer_provider(query, key, value, levels, own_length, page_size=16):
    """FlashInfer's wrapper for several levels, planned outside of the measurement as an engine plans once per step."""
    import flashinfer

    prompts, own = levels
    num, slots, device = len(prompts.key), len(query), query.device
    total = own_length + 1

    def paged(level, tokens):
        pages = -(-tokens // page_size)
        both = torch.stack([level.key, level.value], 1)[:, :, :, :tokens]  # (N, 2, Hkv, tokens, D)
        both = torch.nn.functional.pad(both, (0, 0, 0, pages * page_size - tokens))
        return both.unflatten(3, (pages, page_size)).permute(0, 3, 1, 4, 2, 5).flatten(0, 1).contiguous(), pages

    (shared_pages, shared_count), (own_pages, own_count) = paged(prompts, prompts.key.shape[2]), paged(own, total)
    cache = torch.cat([shared_pages, own_pages])
    ints = {"dtype": torch.int32, "device": device}
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(2**28, dtype=torch.uint8, device=device), "NHD")
    wrapper.plan(
        [torch.arange(0, slots + 1, slots // num, **ints), torch.arange(slots + 1, **ints)],
        [torch.arange(num + 1, **ints) * shared_count, torch.arange(slots + 1, **ints) * own_count],
        [
            torch.arange(num * shared_count, **ints),
            torch.arange(slots * own_count, **ints) + num * shared_count,
        ],
        [
            torch.full((num,), (prompts.key.shape[2] - 1) % page_size + 1, **ints),
            torch.full((slots,), (total - 1) % page_size + 1, **ints),
        ],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        page_size,
        q_data_type=query.dtype,
    )
    place = num * shared_count + torch.arange(slots, device=device) * own_count + own_length // page_size

    def run():
        cache[place, 0, own_length % page_size] = key
        cache[place, 1, own_length % page_size] = value
        return wrapper.run(query, cache)

    return run


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decode_attention(benchmark, case):
    num, generations, prompt, own_length, heads, key_heads, width, dtype = CASES[case]
    slots, capacity, device = num * generations, -(-(own_length + 1) // 64) * 64, harness.DEVICE
    rng = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    owners = [n for n in range(num) for _ in range(generations)]
    query, key, value = randn(slots, heads, width), randn(slots, key_heads, width), randn(slots, key_heads, width)
    prompt_lengths, lengths = torch.full((num,), prompt), torch.full((slots,), own_length)
    shared = randn(num, key_heads, prompt, width), randn(num, key_heads, prompt, width)
    own = randn(slots, key_heads, capacity, width), randn(slots, key_heads, capacity, width)
    segment = torch.tensor(owners, dtype=torch.int32, device=device)
    levels = [
        KeyValues(*shared, prompt_lengths.int().to(device), segment).grouped(),
        KeyValues(*own, lengths.int().to(device)),
    ]
    exact = exact_result(query, key, value, levels, own_length)

    def ours(name):
        return lambda: decode_attention(query, levels, key=key, value=value, backend=name)

    names = harness.backends("decode_attention", query, *(x for level in levels for x in level[:2]))
    providers = {f"vlmkernels {name}": ours(name) for name in names}

    copies = [x.repeat_interleave(generations, 0) for x in shared]
    copies = [torch.cat([x, y[:, :, : own_length + 1]], 2) for x, y in zip(copies, own, strict=True)]

    def on_copies():
        for x, new in zip(copies, (key, value), strict=True):
            x[:, :, -1] = new
        return scaled_dot_product_attention(query.unsqueeze(2), *copies, enable_gqa=True).squeeze(2)

    providers["SDPA on copies of the prompts"] = on_copies
    if harness.GPU and importlib.util.find_spec("flashinfer"):
        providers["FlashInfer, two levels"] = flashinfer_provider(query, key, value, levels, own_length)

    def check(name, result):
        error = ((result.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 2e-2, f"{name} is wrong: relative error {error}"
        return f"{error:.0e}"

    tokens = num * prompt + slots * (own_length + 1)
    bytes = query.element_size() * (2 * tokens * key_heads * width + 2 * query.numel())
    flops = 4 * slots * heads * width * (prompt + own_length + 1)
    title = f"decode_attention {case}"
    harness.compare(benchmark, harness.Case(title, providers, check, limit_s=10, bytes=bytes, flops=flops))
