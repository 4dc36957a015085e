"""Simulated histories of runs without a fault: sampled rewards of groups, whose noise is that of their numbers."""

import math
from itertools import product

import numpy as np

from support.histories import group
from vlmkernels.doctor import Run

GROUP_SIZES = 2, 4, 8, 16
SUCCESS_RATES = 0.1, 0.3, 0.5, 0.7, 0.9  # at the beginning
REWARDS = "binary", "graded", "several"
LOGGING_STEPS = 1, 5, 10
# Metrics of this package's trainer that TRL does not log.
OWN = (
    *("rewards/accuracy/unparsed", "rewards/accuracy/failed", "completions/frac_repeated", "completions/frac_special_tokens"),
    *("reward_length_correlation", "frac_weights_changed", "image_use/kl", "frac_samples_replaced"),
)
STORED, STORED_GROUPS, STORED_COMPLETIONS = 6, 3, 4  # logs, groups of each and completions of each group that are stored


def grid() -> list[dict]:
    """Every combination of group size, success rate, kind of reward and logging_steps, alternately with TRL's metrics."""
    names = "group_size", "rate", "reward", "logging_steps"
    settings = [dict(zip(names, values, strict=True)) for values in product(GROUP_SIZES, SUCCESS_RATES, REWARDS, LOGGING_STEPS)]
    return [{**setting, "is_trl": index % 2 == 1, "seed": index} for index, setting in enumerate(settings)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _persistent(draw: np.random.Generator, steps: int, kept: float) -> np.ndarray:
    """Return a series with standard deviation 1 whose correlation falls by the factor ``kept`` per step."""
    values = draw.normal(0, 1, steps)
    for step in range(1, steps):
        values[step] = kept * values[step - 1] + math.sqrt(1 - kept**2) * values[step]
    return values


def simulate(
    seed: int,
    group_size: int = 8,
    rate: float = 0.3,
    reward: str = "binary",
    logging_steps: int = 1,
    *,
    is_trl: bool = False,
    logs: int = 60,
    prompts: int = 8,
    gain: float | None = None,
    pace: float | None = None,
    begins: float = 0.0,
    clipped: float = 0.05,
    wander: float = 0.1,
    drift: float = 0.0,
    memory: float = 20.0,
    length: float | None = None,
    entropy: float | None = None,
    image_use: float = 1.0,
    resumed: float = 0.0,
) -> Run:
    """Return the history of a run that learns, or with ``gain`` = 0 of one that does not.

    Each prompt has a difficulty of its own. The log-odds of success rise by ``gain``, fast at first, and wander.

    Args:
        rate: success rate at the beginning.
        reward: "binary", "graded" (continuous), "scaled" (-5 or 5), "sparse" (a few large values), or "several" (binary, and
            one of the format with weight 0.5).
        is_trl: whether only what TRL logs is in the history.
        logs: the number of logs.
        prompts: prompts per step.
        gain: None: 1 to 2.
        pace: share of the run in which most of the gain is made; None: 0.2 to 0.5.
        begins: share of the run before which nothing is learned.
        clipped: share of completions that are cut off.
        wander: standard deviation of the log-odds at the end around their course.
        drift: standard deviation, in log-odds, of the difficulty that the prompts of neighboring steps have in common.
        memory: the number of steps over which this difficulty persists.
        length: factor by which the completions become longer; None: 0.7 to 1.3.
        entropy: factor by which the entropy changes; None: 0.4 to 1.
        image_use: factor by which the use of the image changes.
        resumed: share of the run that an earlier start has logged.
    """
    draw = np.random.default_rng(seed)
    steps = logs * logging_steps
    time = np.arange(steps) / steps
    gain = draw.uniform(1.0, 2.0) if gain is None else gain
    pace = draw.uniform(0.2, 0.5) if pace is None else pace
    walk = np.cumsum(draw.normal(0, wander / steps**0.5, steps))
    level = np.log(rate / (1 - rate)) + gain * (1 - np.exp(-np.maximum(time - begins, 0) / pace)) + walk
    held_out = level + draw.normal(0, 0.05, steps)  # is not affected by the prompts of training
    if drift:
        level = level + drift * _persistent(draw, steps, math.exp(-1 / memory))
    ability = level[:, None, None] + draw.normal(0, 1, (steps, prompts, 1))
    shape = steps, prompts, group_size
    if reward == "graded":
        task = _sigmoid(ability + draw.normal(0, 1, shape))
    elif reward == "sparse":
        task = (draw.random(shape) < _sigmoid(ability)) * draw.lognormal(0, 1, shape)
    else:
        task = (draw.random(shape) < _sigmoid(ability)).astype(float)
    if reward == "scaled":
        task = 10 * task - 5
    rewards, total = {"accuracy": task}, task
    if reward == "several":
        form = (draw.random(shape) < (0.7 + 0.28 * np.minimum(3 * time, 1))[:, None, None]).astype(float)
        rewards, total = {**rewards, "format": form}, task + 0.5 * form
    flat = (1, 2)
    spread = total.std(2) > 1e-6
    count = prompts * group_size

    def share(mean: float) -> np.ndarray:
        return draw.binomial(count, mean, steps) / count

    def noisy(values: np.ndarray | float, noise: float) -> np.ndarray:
        return values * np.exp(draw.normal(0, noise, steps))

    def changing(start: float, factor: float) -> np.ndarray:
        return start * (1 + (factor - 1) * time)

    lengths = changing(draw.uniform(50, 400), draw.uniform(0.7, 1.3) if length is None else length)
    entropies = changing(draw.uniform(0.3, 1.0), draw.uniform(0.4, 1.0) if entropy is None else entropy)
    metrics = {
        "reward": total.mean(flat),
        "reward_std": total.std(flat),
        "frac_reward_zero_std": 1 - spread.mean(1),
        **{f"rewards/{name}/mean": values.mean(flat) for name, values in rewards.items()},
        **{f"rewards/{name}/std": values.std(flat) for name, values in rewards.items()},
        "completions/mean_length": lengths + draw.normal(0, 1, steps) * 0.4 * lengths / count**0.5,
        "completions/clipped_ratio": share(clipped),
        "entropy": noisy(entropies, 0.1),
        "kl": noisy(0.2 * time, 0.3),
        "clip_ratio/region_mean": noisy(0.01, 0.5),
        "sampling/sampling_logp_difference/mean": noisy(0.01, 0.2),
        "grad_norm": np.where(spread.any(1), noisy(draw.uniform(0.1, 2.0), 0.4), 0.0),
        "loss": draw.normal(0, 0.01, steps),
        "learning_rate": 1e-6 * np.minimum(np.arange(1, steps + 1) / 10, 1) * (1 - 0.9 * time),
        "epoch": 3 * time,
        "rewards/accuracy/unparsed": share(0.03),
        "rewards/accuracy/failed": np.zeros(steps),
        "completions/frac_repeated": noisy(0.05, 0.3),
        "completions/frac_special_tokens": np.zeros(steps),
        "reward_length_correlation": draw.normal(0.1, (prompts * (group_size - 1)) ** -0.5, steps).clip(-1, 1),
        "frac_weights_changed": np.clip(noisy(0.8, 0.05), 0, 1),
        "image_use/kl": np.where(np.arange(1, steps + 1) % 10 == 0, noisy(changing(0.3, image_use), 0.5), np.nan),
        "tools/failure_frequency": share(0.1),
        "frac_samples_replaced": share(0.002),
        "eval_reward": np.where(np.arange(1, steps + 1) % (5 * logging_steps) == 0, _sigmoid(held_out), np.nan),
    }
    metrics = {name: values for name, values in metrics.items() if not (is_trl and name in OWN)}
    table = np.stack([*metrics.values()]).reshape(len(metrics), logs, logging_steps)
    known = np.isfinite(table)
    means = np.where(known, table, 0).sum(2) / np.maximum(known.sum(2), 1)
    means[~known.any(2)] = np.nan
    ends = logging_steps * np.arange(1, logs + 1)
    entries = [
        {"step": int(step), **{name: value for name, value in zip(metrics, values, strict=True) if value == value}}
        for step, values in zip(ends, means.T.tolist(), strict=True)
    ]
    entries = entries[int(resumed * logs) :]
    completions = {}
    for index in np.linspace(int(resumed * logs), logs - 1, STORED).astype(int).tolist():
        values = task[(index + 1) * logging_steps - 1, :STORED_GROUPS, :STORED_COMPLETIONS].tolist()
        completions[int(ends[index])] = [_stored(draw, f"{index}-{place}", row) for place, row in enumerate(values)]
    return Run(entries, completions, {"num_generations": group_size, "logging_steps": logging_steps})


def _stored(draw: np.random.Generator, key: str, rewards: list[float]) -> dict:
    texts = [
        f"{' '.join(map(str, draw.integers(1000, size=12)))} <answer>{key if value > 0.5 else draw.integers(1000)}</answer>"
        for value in rewards
    ]
    return group(texts, rewards, f"user: {key}", image=key, reference=key)
