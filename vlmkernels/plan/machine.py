"""The rates of a device and its links, and the time of a ``Cost`` on the device."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

# Operations with a fixed overhead: the forward, backward or decoding pass of one layer; sampling the tokens of a decoding step;
# a whole decoding step of a vLLM engine.
CALLS = ("forward", "backward", "decode", "step", "engine")


@dataclass(frozen=True)
class Cost:
    """The cost of a part of a phase on one device.

    Attributes:
        gemm: floating-point operations of matrix products.
        rows: rows of each product; the rate of the products depends on it.
        attention: floating-point operations of attention.
        weights: bytes of weights that the products read.
        traffic: bytes of activations and states that other operations read and write.
        fresh: bytes of newly allocated large tensors.
        calls: name of an operation in ``CALLS`` -> how often it runs.
        host: bytes that are copied to or from host memory.
    """

    gemm: float = 0.0
    rows: float = 1.0
    attention: float = 0.0
    weights: float = 0.0
    traffic: float = 0.0
    fresh: float = 0.0
    calls: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    def scaled(self, factor: float) -> "Cost":
        """Return the cost times a factor."""
        numbers = {name: factor * value for name, value in vars(self).items() if name not in ("rows", "calls")}
        return replace(self, **numbers, calls={name: factor * count for name, count in self.calls.items()})


@dataclass(frozen=True)
class Machine:
    """One device and its links.

    Attributes:
        name: name in reports.
        source: where the numbers come from.
        precision: precision of the matrix products that the rates apply to.
        gemm: (rows, FLOP/s) of matrix products, sorted by rows. Rates are interpolated over the logarithm of rows.
        attention, attention_backward: FLOP/s of attention.
        bandwidth: bytes/s of element-wise operations.
        weights: bytes/s of reading weights.
        fresh: bytes/s of the first write to new memory.
        calls: overhead in seconds of each operation in ``CALLS``.
        overlaps: whether arithmetic, memory traffic and calls overlap, so that only the longest counts. Otherwise they add up.
        memory: bytes of memory.
        reserve: bytes of memory that are not available to tensors.
        link: bytes/s of a device to and from the other devices of its node, in each direction.
        network: bytes/s of a device to and from other nodes, in each direction.
        host: bytes/s of a device to and from pinned host memory, in each direction; infinite if they are the same.
        devices: number of devices per node.
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
    host: float = math.inf
    devices: int = 1

    def gemm_rate(self, rows: float) -> float:
        """Return the FLOP/s of matrix products with ``rows`` rows."""
        points = [(math.log(max(r, 1)), rate) for r, rate in self.gemm]
        x = math.log(max(rows, 1))
        for (x0, y0), (x1, y1) in pairwise(points):
            if x < x1:
                return y0 + (y1 - y0) * max(0.0, (x - x0) / (x1 - x0))
        return points[-1][1]

    def seconds_by_resource(self, cost: Cost, backward: bool = False) -> dict[str, float]:
        """Return the seconds that each resource is busy with a cost. ``backward``: attention runs at its backward rate."""
        return {
            "GEMMs": cost.gemm / self.gemm_rate(cost.rows),
            "attention": cost.attention / (self.attention_backward if backward else self.attention),
            "weights from memory": cost.weights / self.weights,
            "activations from memory": cost.traffic / self.bandwidth,
            "new memory": cost.fresh / self.fresh,
            "calls": sum(self.calls[name] * count for name, count in cost.calls.items()),
            "PCIe": cost.host / self.host,
        }

    def seconds(self, by_resource: dict[str, float]) -> float:
        """Return the seconds of a cost from the result of ``seconds_by_resource``.

        Even if resources overlap, GEMMs and attention add up, because they share the arithmetic units, and so do all kinds of
        memory traffic. Copies to host memory run in the stream of the computation, and do not overlap.
        """
        if not self.overlaps:
            return sum(by_resource.values())
        compute = by_resource["GEMMs"] + by_resource["attention"]
        memory = sum(value for name, value in by_resource.items() if "memory" in name)
        return max(compute, memory, by_resource["calls"]) + by_resource["PCIe"]

    def collective(self, size: float, devices: int) -> float:
        """Return the seconds of an all-gather or reduce-scatter. ``size``: bytes of the full tensors."""
        nodes = math.ceil(devices / self.devices)
        inside = size * (devices - 1) / devices / self.link
        outside = size * (nodes - 1) / nodes / (self.network * min(self.devices, devices))
        return max(inside, outside)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the machine as JSON, which ``from_name`` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_name(cls, name: str) -> "Machine":
        """Return the machine with this name in ``MACHINES``, or read the file with this path that ``save`` has written."""
        if name in MACHINES:
            return MACHINES[name]
        if not Path(name).is_file():
            raise ValueError(f"machine must be {', '.join(MACHINES)} or a file written by --calibrate, got {name}")
        try:
            content = json.loads(Path(name).read_text())
            return cls(**content | {"gemm": tuple(map(tuple, content["gemm"]))})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"machine must be a file written by --calibrate, got {name}: {error}") from error


# Seconds that the host needs to launch an eager layer. Forward and backward are measured on an H200 (the training step 0.5b in
# bench/results/nvidia-h200.json): 60.5 and 77.5 ms for 32 layers. The other overheads are assumed.
CALL_SECONDS = {"forward": 1.9e-3, "backward": 2.4e-3, "decode": 0.8e-3, "step": 5e-3, "engine": 3e-3}
# Shares of the data sheet's numbers that are reached. On an H200, a GEMM of 8192^3 reaches 0.70 to 0.79 of the FLOP/s, and the
# fused head 0.63; tree_attention with a prefix of 2048 and 8 x 512 tokens 0.24 forward and 0.16 backward; a copy
# 0.88 of the bandwidth. Other GPUs are assumed to reach the same shares. The share of PCIe and NVLink is assumed.
GEMM, ATTENTION, ATTENTION_BACKWARD, MEMORY, LINKS = 0.6, 0.24, 0.16, 0.88, 0.7


def _from_data_sheet(
    name: str, flops: float, bandwidth: float, memory: float, host: float, link: float = math.inf, reserve: float = 4 * 2**30
) -> Machine:
    """Return a GPU from its data sheet, with the shares of its rates that an H200 reaches.

    The rate of matrix products is the rate for many rows. Products with few rows are bound by reading their weights, which the
    cost model counts separately.

    Args:
        flops: FLOP/s of dense bf16 matrix products with fp32 accumulation.
        bandwidth: bytes/s of its memory.
        memory: bytes of its memory.
        host: bytes/s of PCIe in each direction.
        link: bytes/s of NVLink in each direction. With it, nodes of 8 GPUs have a network of 400 Gb/s per GPU.
        reserve: bytes for the CUDA context and fragmentation, an assumption.
    """
    rates = f"{flops / 1e12:.0f} TFLOP/s, memory {bandwidth / 1e9:.0f} GB/s, PCIe {host / 1e9:.0f} GB/s"
    return Machine(
        name,
        source=f"data sheet ({rates}) times the shares that an H200 reaches; launches of layers as measured there, those of "
        "decoding assumed",
        precision="bf16",
        gemm=((1, GEMM * flops),),
        attention=ATTENTION * flops,
        attention_backward=ATTENTION_BACKWARD * flops,
        bandwidth=MEMORY * bandwidth,
        weights=MEMORY * bandwidth,
        fresh=math.inf,  # the caching allocator reuses freed memory
        calls=CALL_SECONDS,
        overlaps=True,
        memory=memory,
        reserve=reserve,
        link=LINKS * link,
        network=LINKS * 50e9 if link < math.inf else math.inf,
        host=LINKS * host,
        devices=8 if link < math.inf else 1,
    )


# From NVIDIA's data sheets and white papers, which docs/scale.md names. FLOP/s are those without sparsity, which data sheets
# often include, and with fp32 accumulation, which halves the rate of GeForce GPUs. 16 lanes of PCIe 4.0 have 32 GB/s.
_SMALL = {"host": 32e9, "reserve": 1.5 * 2**30}
MACHINES = {
    "h100": _from_data_sheet("h100", 989.4e12, 3.35e12, 80e9, host=64e9, link=450e9),
    "h200": _from_data_sheet("h200", 989.4e12, 4.8e12, 141e9, host=64e9, link=450e9),
    "a100": _from_data_sheet("a100", 312e12, 2.039e12, 80e9, host=32e9, link=300e9),
    "l40s": _from_data_sheet("l40s", 362e12, 0.864e12, 48e9, **_SMALL),
    "rtx-5090": _from_data_sheet("rtx-5090", 209.5e12, 1.792e12, 32e9, **_SMALL | {"host": 64e9}),
    "rtx-4090": _from_data_sheet("rtx-4090", 165.2e12, 1.008e12, 24e9, **_SMALL),
    "rtx-3090": _from_data_sheet("rtx-3090", 71e12, 0.936e12, 24e9, **_SMALL),
    "a10": _from_data_sheet("a10", 125e12, 0.6e12, 24e9, **_SMALL),
    "l4": _from_data_sheet("l4", 121e12, 0.3e12, 24e9, **_SMALL),
}
