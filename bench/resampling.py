"""Simulate how many prompts and rounds dynamic sampling needs for a batch. bench/tables.py writes the result to the docs.

Prompts are independent: each one has a group with different rewards with the same probability. There is one process.
"""

import random
from statistics import fmean
from typing import NamedTuple

from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.dynamic_sampling import next_count

SHARES, SIZES, BATCHES = (0.9, 0.75, 0.5, 0.25, 0.1), (64, 8), 400


class Simulated(NamedTuple):
    """Means over batches: prompts per group that is kept, rounds, and the share of the batch that other groups fill."""

    prompts: float
    rounds: float
    filled: float


def simulate(share: float, size: int) -> Simulated:
    """Sample ``BATCHES`` batches of ``size`` groups from prompts of which ``share`` have different rewards."""
    generator, max_rounds = random.Random(0), 1 + GRPOConfig.max_resample_times
    batches: list[tuple[int, int, int]] = []  # groups kept, prompts, rounds
    for _ in range(BATCHES):
        count, found, prompts, rounds = size, 0, 0, 0
        while count:
            found += sum(generator.random() < share for _ in range(count))
            prompts, rounds = prompts + count, rounds + 1
            count = 0 if rounds == max_rounds else next_count(size, size - found, found, prompts)
        batches.append((min(found, size), prompts, rounds))
    kept, prompts, rounds = map(fmean, zip(*batches, strict=True))
    return Simulated(prompts / kept, rounds, 1 - kept / size)


def table() -> list[str]:
    """Return the lines of the table in docs/dynamic-sampling.md."""
    head = "".join(f" batch of {size}: prompts | rounds | filled |" for size in SIZES)
    lines = [f"| kept share | prompts, at least |{head}", "| ---: | ---: |" + " ---: | ---: | ---: |" * len(SIZES)]
    for share in SHARES:
        cells = [f" {s.prompts:.2f} | {s.rounds:.1f} | {s.filled:.0%} |" for s in (simulate(share, size) for size in SIZES)]
        lines.append(f"| {share:.0%} | {1 / share:.2f} |{''.join(cells)}")
    return lines
