"""Measure the rates of this machine's CPU."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from vlmkernels.plan.machine import Machine

Clock = Callable[[], float]


def _time(run: Callable[[], object], clock: Clock, repeats: int = 7) -> float:
    """Return the median duration of a call in seconds, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = clock()
        result = run()
        times.append(clock() - start)
        del result
    return statistics.median(times[1:])


@contextmanager
def _decoding_layer(inputs: int, outputs: int) -> Iterator[torch.nn.Linear]:
    """Yield a linear layer that runs as in decoding steps: with few rows, by another kernel than with many."""
    from vlmkernels.models.few_rows import few_rows_linears

    layer = torch.nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad(), few_rows_linears(layer):
        yield layer


def _gemm_rates(clock: Clock) -> tuple[tuple[int, float], ...]:
    """Measure the FLOP/s of linear layers with 1 to 1024 rows."""
    rates = []
    with _decoding_layer(512, 512) as layer:
        for rows in (1, 4, 16, 64, 256, 1024):
            x = torch.randn(rows, 512)
            rates.append((rows, 2 * rows * layer.weight.numel() / _time(lambda x=x: layer(x), clock, 15)))
    return tuple(rates)


def _weights_rate(gemm: dict[int, float], clock: Clock) -> float:
    """Measure the bytes/s of reading weights, from the time that a product with 16 rows takes beyond its arithmetic."""
    x = torch.randn(16, 2**10)
    with _decoding_layer(2**10, 2**14) as layer:  # 64 MiB, larger than the caches
        operations = 2 * 16 * layer.weight.numel()
        seconds = _time(lambda: layer(x), clock) - operations / gemm[16]
        return 4 * layer.weight.numel() / max(seconds, 1e-9)


def _attention_rates(clock: Clock) -> tuple[float, float]:
    """Measure the FLOP/s of attention, forward and backward."""
    from vlmkernels.ops.tree_attention import TreeLayout
    from vlmkernels.ops.tree_attention.parts import run as attention

    length, heads, width = 512, 4, 64
    q = torch.randn(length, heads, width, requires_grad=True)
    layout, scale = TreeLayout.groups((length,), ((),)), width**-0.5
    dout, flops = torch.ones(length, heads, width), 2 * heads * width * length**2
    forward = _time(lambda: attention(q, q, q, layout, None, scale), clock)
    both = _time(lambda: torch.autograd.grad(attention(q, q, q, layout, None, scale), q, dout), clock)
    return flops / forward, 2.5 * flops / (both - forward)


class _NarrowDecoder:
    """A decoder so narrow that its time per layer is only the overhead of the calls.

    ``decode`` runs ``DECODE_STEPS`` decoding steps.
    """

    DECODE_STEPS = 8

    def __init__(self, layers: int):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        from vlmkernels.models.attention import use_tree_attention
        from vlmkernels.models.families import TEXT
        from vlmkernels.models.inputs import ModelInputs
        from vlmkernels.models.packs import pack_groups

        config = Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng():
            self.model = use_tree_attention(Qwen2ForCausalLM(config).eval())
        ids = torch.ones(1, 8, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": ids}
        completions = torch.ones(2, 2, dtype=torch.int64)
        self.pack = pack_groups(inputs, ids.cumsum(1) - 1, torch.tensor([0, 0]), completions, completions.bool(), TEXT).inputs
        self.prompts = ModelInputs.from_processor(inputs, TEXT, torch.tensor([0]), torch.tensor([0]))

    def forward(self) -> torch.Tensor:
        return self.model.model(**self.pack, use_cache=False).last_hidden_state

    def forward_backward(self) -> None:
        self.forward().sum().backward()

    def decode(self) -> None:
        from vlmkernels.rollout.base import Sampling
        from vlmkernels.rollout.decode import decode_groups

        sampling = Sampling(self.DECODE_STEPS + 1, (), 0, suppress_tokens=(1,))
        decode_groups(self.model, self.prompts, 2, sampling)


def _call_seconds(clock: Clock) -> dict[str, float]:
    """Measure the overhead of each operation in ``CALLS``. A layer's is the difference between 6 and 2 layers, divided by 4."""
    few, many = _NarrowDecoder(2), _NarrowDecoder(6)
    with torch.no_grad():
        forward = (_time(many.forward, clock, 15) - _time(few.forward, clock, 15)) / 4
    both = (_time(many.forward_backward, clock, 15) - _time(few.forward_backward, clock, 15)) / 4
    of_few, of_many = (_time(decoder.decode, clock) / decoder.DECODE_STEPS for decoder in (few, many))
    decode = (of_many - of_few) / 4
    step = of_few - 2 * decode
    return {"forward": forward, "backward": both - forward, "decode": decode, "step": step, "engine": step}


def calibrate(clock: Clock = time.perf_counter) -> Machine:
    """Measure the rates of this machine's CPU in fp32 with ``torch.get_num_threads()`` threads. Takes a few seconds.

    Args:
        clock: returns the time in seconds. With one thread, ``time.process_time`` excludes the time of other processes.
    """
    gemm = _gemm_rates(clock)
    weights = _weights_rate(dict(gemm), clock)
    x = torch.randn(2**20)
    bandwidth = 8 * x.numel() / _time(lambda: F.silu(x), clock, 15)
    size = 2**26
    fresh = size / _time(lambda: torch.empty(size, dtype=torch.uint8).fill_(1), clock)
    attention, attention_backward = _attention_rates(clock)
    threads = torch.get_num_threads()
    return Machine(
        name=f"cpu, {threads} thread{'s' * (threads > 1)}, fp32",
        source="measured on this machine",
        precision="fp32",
        gemm=gemm,
        attention=attention,
        attention_backward=attention_backward,
        bandwidth=bandwidth,
        weights=weights,
        fresh=fresh,
        calls=_call_seconds(clock),
        overlaps=False,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
