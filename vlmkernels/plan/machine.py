"""The rates of a device and its links, and the time of a ``Cost`` on the device."""

import json
import math
import os
from dataclasses import asdict, dataclass, field
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
        }

    def seconds(self, by_resource: dict[str, float]) -> float:
        """Return the seconds of a cost from the result of ``seconds_by_resource``.

        Even if resources overlap, GEMMs and attention add up, because they share the arithmetic units, and so do all kinds of
        memory traffic.
        """
        if not self.overlaps:
            return sum(by_resource.values())
        compute = by_resource["GEMMs"] + by_resource["attention"]
        memory = sum(value for name, value in by_resource.items() if "memory" in name)
        return max(compute, memory, by_resource["calls"])

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


def _from_data_sheet(name: str, flops: float, bandwidth: float, memory: float) -> Machine:
    """Return a Hopper GPU in a node of 8, from its data sheet and assumed efficiencies.

    The rate of matrix products is the rate for many rows. Products with few rows are bound by reading their weights, which the
    cost model counts separately.

    Args:
        flops: FLOP/s of dense bf16 matrix products.
        bandwidth: bytes/s of HBM.
        memory: bytes of HBM.
    """
    return Machine(
        name,
        source="data sheet (dense bf16, HBM, NVLink 450 GB/s each way, 400 Gb/s per GPU) times assumed efficiencies: GEMM 0.6, "
        "attention 0.4 forward and 0.3 backward, memory 0.8, links 0.7; assumed call overheads",
        precision="bf16",
        gemm=((1, 0.6 * flops),),
        attention=0.4 * flops,
        attention_backward=0.3 * flops,
        bandwidth=0.8 * bandwidth,
        weights=0.8 * bandwidth,
        fresh=math.inf,  # the caching allocator reuses freed memory
        calls={"forward": 0.4e-3, "backward": 0.8e-3, "decode": 0.8e-3, "step": 5e-3, "engine": 3e-3},  # assumed
        overlaps=True,
        memory=memory,
        reserve=4 * 2**30,
        link=0.7 * 450e9,
        network=0.7 * 50e9,
        devices=8,
    )


MACHINES = {
    "h100": _from_data_sheet("h100", 989.4e12, 3.35e12, 80e9),
    "h200": _from_data_sheet("h200", 989.4e12, 4.8e12, 141e9),
}
