"""What a machine does in a second: from data sheets, or measured on this one."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from vlmkernels.ops.checks import require

CALLS = ("forward", "backward", "decode", "step", "engine")  # a layer's passes; a decoding step's rest, and all of an engine's


@dataclass(frozen=True)
class Work:
    """What a part of a phase asks of one device.

    gemm: floating-point operations in products of ``rows`` rows. attention: those in attention. weights: bytes of weights
    that are read for the products. traffic: bytes of activations and states that other operations read and write. fresh:
    bytes of large tensors that are allocated. calls: of each of ``CALLS``.
    """

    gemm: float = 0.0
    rows: float = 1.0
    attention: float = 0.0
    weights: float = 0.0
    traffic: float = 0.0
    fresh: float = 0.0
    calls: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """One device and its links.

    source: where the figures are from. precision: of the products that the rates are of. gemm: (rows, FLOP/s) of products,
    ascending; between them rates are interpolated in the logarithm of rows. attention, attention_backward: FLOP/s. bandwidth:
    bytes/s of element-wise operations; weights: of reading weights; fresh: of the first writes to new memory. calls: seconds
    that one of ``CALLS`` takes whatever its
    size. overlaps: whether these go on at the same time, so that the longest counts, or one after the other.
    memory: bytes; reserve: of it, what is not for tensors. link: bytes/s a device sends to and gets from one in its node;
    network: likewise to one in another node. devices: of a node.
    """

    name: str
    source: str
    precision: str
    gemm: tuple[tuple[float, float], ...]
    attention: float
    attention_backward: float
    bandwidth: float
    weights: float
    fresh: float
    calls: dict[str, float]
    overlaps: bool
    memory: float
    reserve: float = 0.0
    link: float = math.inf
    network: float = math.inf
    devices: int = 1

    def gemm_rate(self, rows: float) -> float:
        points = [(math.log(max(r, 1)), rate) for r, rate in self.gemm]
        x = math.log(max(rows, 1))
        for (x0, y0), (x1, y1) in pairwise(points):
            if x < x1:
                return y0 + (y1 - y0) * max(0.0, (x - x0) / (x1 - x0))
        return points[-1][1]

    def parts(self, work: Work, backward: bool = False) -> dict[str, float]:
        """Seconds by resource."""
        return {
            "GEMMs": work.gemm / self.gemm_rate(work.rows),
            "attention": work.attention / (self.attention_backward if backward else self.attention),
            "weights from memory": work.weights / self.weights,
            "activations from memory": work.traffic / self.bandwidth,
            "new memory": work.fresh / self.fresh,
            "calls": sum(self.calls[name] * count for name, count in work.calls.items()),
        }

    def seconds(self, parts: dict[str, float]) -> float:
        """Of parts by resource. Where they overlap, GEMMs and attention, which share the arithmetic units, add up, and so do
        all kinds of memory traffic."""
        if not self.overlaps:
            return sum(parts.values())
        compute = parts["GEMMs"] + parts["attention"]
        memory = sum(value for name, value in parts.items() if "memory" in name)
        return max(compute, memory, parts["calls"])

    def collective(self, size: float, devices: int) -> float:
        """Seconds that an all-gather to, or a reduce-scatter from, tensors of ``size`` bytes takes among devices."""
        nodes = math.ceil(devices / self.devices)
        inside = size * (devices - 1) / devices / self.link
        outside = size * (nodes - 1) / nodes / (self.network * min(self.devices, devices))
        return max(inside, outside)

    def save(self, path: str | os.PathLike) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def named(cls, name: str) -> "Machine":
        """A row of ``MACHINES``, or one that ``save`` wrote."""
        if name in MACHINES:
            return MACHINES[name]
        require(Path(name).is_file(), "machine", f"be {', '.join(MACHINES)} or a file that --calibrate wrote", name)
        try:
            content = json.loads(Path(name).read_text())
            return cls(**content | {"gemm": tuple(map(tuple, content["gemm"]))})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"machine must be a file that --calibrate wrote, got {name}: {error}") from error


def _sheet(name: str, flops: float, bandwidth: float, memory: float) -> Machine:
    """A Hopper GPU: bf16 dense FLOP/s, bytes/s and bytes of its data sheet, times efficiencies that are assumed: GEMMs 0.6,
    attention 0.4 and 0.3 backward, memory 0.8, links 0.7. NVLink 450 GB/s each way, a 400 Gb/s adapter per GPU. The time of
    calls is assumed as well: an eager layer 0.4 ms forward, 0.8 ms backward, 0.8 ms decoding; 5 ms to draw tokens; an
    engine's step 3 ms. Products of few rows are bound by their weights, which is counted."""
    return Machine(
        name,
        source="data sheet (dense bf16, HBM, NVLink 450 GB/s each way, 400 Gb/s per GPU) times assumed efficiencies: GEMM 0.6, "
        "attention 0.4 forward and 0.3 backward, memory 0.8, links 0.7; time of calls assumed",
        precision="bf16",
        gemm=((1, 0.6 * flops),),
        attention=0.4 * flops,
        attention_backward=0.3 * flops,
        bandwidth=0.8 * bandwidth,
        weights=0.8 * bandwidth,
        fresh=math.inf,  # the allocator keeps what is freed
        calls={"forward": 0.4e-3, "backward": 0.8e-3, "decode": 0.8e-3, "step": 5e-3, "engine": 3e-3},
        overlaps=True,
        memory=memory,
        reserve=4 * 2**30,
        link=0.7 * 450e9,
        network=0.7 * 50e9,
        devices=8,
    )


MACHINES = {"h100": _sheet("h100", 989.4e12, 3.35e12, 80e9), "h200": _sheet("h200", 989.4e12, 4.8e12, 141e9)}


def _time(run: Callable[[], object], clock: Callable[[], float], repeats: int = 7) -> float:
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = clock()
        result = run()
        times.append(clock() - start)
        del result
    return statistics.median(times[1:])


def _layers(layers: int):
    """A decoder so narrow that only its calls take time, and how to run it forward, forward and backward, and decoding.

    Returns three functions and the number of decoding steps of the last.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vlmkernels.models.attention import use_group_attention
    from vlmkernels.models.families import TEXT
    from vlmkernels.models.group import pack_groups
    from vlmkernels.models.inputs import Batch
    from vlmkernels.rollout.decode import Sampling, decode_groups

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = use_group_attention(Qwen2ForCausalLM(config).eval())
    ids = torch.ones(1, 8, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids}
    completions = torch.ones(2, 2, dtype=torch.int64)
    pack = pack_groups(inputs, ids.cumsum(1) - 1, torch.tensor([0, 0]), completions, completions.bool()).inputs
    prompts, steps = Batch.of(inputs, TEXT, torch.tensor([0]), torch.tensor([0])), 8

    def forward():
        return model.model(**pack, use_cache=False).last_hidden_state

    def decode():
        decode_groups(model, prompts, 2, Sampling(steps + 1, (), 0, suppress_tokens=(1,)))

    return forward, lambda: forward().sum().backward(), decode, steps


def calibrate(clock: Callable[[], float] = time.perf_counter) -> Machine:
    """This machine's CPU, in fp32 with torch's number of threads, measured for a few seconds.

    Args:
        clock: seconds. With one thread ``time.process_time`` measures what a machine shared with others does for this process.
    """
    from vlmkernels.ops.group_attention import GroupLayout
    from vlmkernels.ops.group_attention.parts import run as attention

    gemm = []
    for rows in (1, 4, 16, 64, 256, 1024):
        x, w = torch.randn(rows, 512), torch.randn(512, 512)
        gemm.append((rows, 2 * rows * 512 * 512 / _time(lambda x=x, w=w: torch.nn.functional.linear(x, w), clock, 15)))
    large = torch.randn(2**14, 2**10)  # 64 MiB: beyond the caches
    row = torch.randn(16, 2**10)
    taken = _time(lambda: torch.nn.functional.linear(row, large), clock) - 2 * 16 * large.numel() / dict(gemm)[16]
    weights = 4 * large.numel() / max(taken, 1e-9)
    x = torch.randn(2**20)
    bandwidth = 8 * x.numel() / _time(lambda: torch.nn.functional.silu(x), clock, 15)
    new = 2**26
    fresh = new / _time(lambda: torch.empty(new, dtype=torch.uint8).fill_(1), clock)
    length, heads, width = 512, 4, 64
    q = torch.randn(length, heads, width, requires_grad=True)
    layout, scale = GroupLayout((length,), ((),)), width**-0.5
    out, flops = torch.ones(length, heads, width), 2 * heads * width * length**2
    forward = _time(lambda: attention(q, q, q, layout, scale), clock)
    both = _time(lambda: torch.autograd.grad(attention(q, q, q, layout, scale), q, out), clock)
    few, many, calls = _layers(2), _layers(6), {}
    with torch.no_grad():
        at_2, at_6 = (_time(model[0], clock, 15) for model in (few, many))
    calls["forward"] = (at_6 - at_2) / 4
    at_2, at_6 = (_time(model[1], clock, 15) for model in (few, many))
    calls["backward"] = (at_6 - at_2) / 4 - calls["forward"]
    at_2, at_6 = (_time(model[2], clock) / model[3] for model in (few, many))
    calls["decode"] = (at_6 - at_2) / 4
    calls["step"] = at_2 - 2 * calls["decode"]
    calls["engine"] = calls["step"]
    threads = torch.get_num_threads()
    return Machine(
        name=f"cpu, {threads} thread{'s' * (threads > 1)}, fp32",
        source="measured on this machine",
        precision="fp32",
        gemm=tuple(gemm),
        attention=flops / forward,
        attention_backward=2.5 * flops / (both - forward),
        bandwidth=bandwidth,
        weights=weights,
        fresh=fresh,
        calls=calls,
        overlaps=False,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
