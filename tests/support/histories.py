"""Synthetic histories of runs: a healthy one, and changes of single metrics."""

import random
from collections.abc import Callable

from vlmkernels.doctor import Run

STEPS = 60
Value = float | Callable[[int], float | None]


def ramp(start: float, end: float, first: int = 0, last: int = STEPS) -> Callable[[int], float]:
    """A value that goes linearly from ``start`` at step ``first`` to ``end`` at step ``last``, and is constant outside."""
    return lambda step: start + (end - start) * min(max((step - first) / (last - first), 0.0), 1.0)


HEALTHY: dict[str, Value] = {
    "reward": ramp(0.2, 0.9),
    "reward_std": 0.45,
    "rewards/accuracy/mean": ramp(0.2, 0.9),
    "rewards/accuracy/std": 0.45,
    "rewards/accuracy/unparsed": 0.02,
    "rewards/accuracy/failed": 0.0,
    "frac_reward_zero_std": ramp(0.2, 0.5),
    "completions/mean_length": 50.0,
    "completions/clipped_ratio": 0.03,
    "completions/frac_repeated": 0.02,
    "completions/frac_special_tokens": 0.0,
    "reward_length_correlation": 0.1,
    "entropy": ramp(1.0, 0.4),
    "kl": ramp(0.0, 0.1),
    "clip_ratio/region_mean": 0.02,
    "sampling/sampling_logp_difference/mean": 0.01,
    "image_use/kl": 0.2,
    "learning_rate": ramp(0.0, 1e-5, 0, 5),
    "grad_norm": 1.0,
    "frac_weights_changed": 0.9,
    "loss": 0.01,
    "epoch": ramp(0.0, 2.0),
    "frac_samples_replaced": 0.0,
    "tools/failure_frequency": 0.1,
}


def history(num: int = STEPS, noise: float = 0.02, seed: int = 0, **changes: Value | None) -> Run:
    """A run with one log per step: the healthy values with relative noise, then the changed ones, also with noise.

    Args:
        changes: metric -> its value or function of the step; None removes the metric.
    """
    draw = random.Random(seed)
    values = {name: value for name, value in {**HEALTHY, **changes}.items() if value is not None}
    steps = []
    for step in range(1, num + 1):
        entry: dict = {"step": step}
        for name, value in values.items():
            level = value(step) if callable(value) else value
            entry[name] = level * (1 + noise * draw.gauss(0, 1)) if isinstance(level, float) else level
        steps.append(entry)
    return Run(steps)


def group(texts: list[str], rewards: list[float] | None = None, prompt="user: q", image="", reference="") -> dict:
    """A stored group. Its advantages are the rewards minus their mean."""
    rewards = rewards or [0.0] * len(texts)
    mean = sum(rewards) / len(rewards)
    return {
        "prompt": prompt,
        "images": [[f"data:image/png;base64,{image}", 8, 8, True]] if image else [],
        "references": {"answer": reference} if reference else {},
        "completions": [
            {"text": text, "rewards": {"accuracy": reward}, "advantage": reward - mean}
            for text, reward in zip(texts, rewards, strict=True)
        ],
    }


def stored(make: Callable[[int, int], dict], steps: int = 12, groups: int = 4) -> dict[int, list[dict]]:
    """Completions of some steps: ``make(step, index)`` returns each group."""
    return {step: [make(step, index) for index in range(groups)] for step in range(1, steps + 1)}
