"""Rules about the rewards: whether they give a signal, rise, and mean what they should."""

import itertools
from statistics import fmean

from vlmkernels.doctor.history import WINDOW, Curve, Run
from vlmkernels.doctor.rule import NOTE, Evidence, Rule
from vlmkernels.doctor.texts import example, has_answer, rows_of, since
from vlmkernels.record.html import short

NO_SPREAD = 0.8  # share of completions in groups with equal rewards: of a batch, a fifth or less is left to learn from
SLOW = 40  # logs after which a reward that has not risen is flat
FORMAT = ("format", "tag", "xml", "json", "struct", "think", "template", "syntax")  # in the names of rewards of the format


def _flat(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    first = reward.values[0]
    if max(reward.values) - min(reward.values) <= 1e-9 * max(1.0, abs(first)):
        text = f"The reward is {short(first)} in all {len(reward)} logs."
        step = reward.steps[2 * WINDOW - 1]
    elif ends := [end for end in range(SLOW, len(reward) + 1) if _is_flat(reward, end)]:
        if ends[-1] < len(reward):
            return None
        step = reward.steps[next(a for a, b in zip(ends[::-1], [*ends[-2::-1], 0], strict=True) if a - b > 1) - 1]
        text = (
            f"The reward was {short(reward.start)} at the beginning and is {short(reward.window())} after {len(reward)} logs."
        )
    else:
        return None
    return Evidence(step, text, "reward", reward.window(), reward.start, example(run, step, lambda row: row.advantage))


def _is_flat(reward: Curve, end: int) -> bool:
    """Whether even an optimistic estimate of the gain up to log ``end`` is less than the noise of one log."""
    quarter = end // 4
    gain = fmean(reward.values[end - quarter : end]) - fmean(reward.values[:quarter])
    return gain + 2 * reward.noise * (2 / quarter) ** 0.5 < reward.noise


def _spread(run: Run, improved: bool) -> tuple[int, float, float] | None:
    """Return since when groups have no spread, their share and the reward, if the reward has improved or not as given."""
    share, reward = run.curve("frac_reward_zero_std"), run.curve("reward")
    step = share.since(
        lambda value, step: value >= NO_SPREAD and value >= share.start - 3 * share.noise and run.improved(step) is improved
    )
    return None if step is None else (step, share.window(), reward.window() if len(reward) else float("nan"))


def _no_spread(run: Run) -> Evidence | None:
    if (found := _spread(run, improved=False)) is None:
        return None
    step, share, reward = found
    text = f"{share:.0%} of the completions are in groups with equal rewards; the mean reward is {short(reward)}."
    shown = example(run, step, lambda row: not row.advantage)
    return Evidence(step, text, "frac_reward_zero_std", share, run.curve("frac_reward_zero_std").start, shown)


def _saturated(run: Run) -> Evidence | None:
    if (found := _spread(run, improved=True)) is None:
        return None
    step, share, reward = found
    start = run.curve("reward").start
    text = (
        f"The reward rose from {short(start)} to {short(reward)}, and {share:.0%} of the completions are in groups with equal"
    )
    return Evidence(step, f"{text} rewards: the prompts are too easy now.", "frac_reward_zero_std", share, start, severity=NOTE)


def _collapsed(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    noise, start = reward.noise, reward.start
    pairs = list(itertools.accumulate(map(fmean, itertools.pairwise(reward.values)), max))  # best mean of two neighbors
    windows = list(itertools.accumulate(map(reward.window, range(WINDOW, len(reward) + 1)), max))

    def best_at(step: int) -> tuple[float, float]:
        end = reward.count(step) - reward.width
        return pairs[max(end - 2, 0)], windows[max(end - WINDOW, 0)]

    def holds(value: float, step: int) -> bool:
        pair, window = best_at(step)
        lost_half = value <= pair - abs(pair) / 2
        lost_gain = window - start >= 5 * noise and window - value >= (window - start) / 2
        return (lost_half or lost_gain) and max(pair, window) - value >= max(5 * noise, 1e-9)

    if (step := reward.since(holds, WINDOW + 2)) is None:
        return None
    best, now = max(best_at(step)), reward.window()
    shown = example(run, step, lambda row: -row.advantage)
    return Evidence(step, f"The reward fell from {short(best)} to {short(now)}.", "reward", now, best, shown)


def _format_only(run: Run) -> Evidence | None:
    names = [name.split("/")[1] for name in run.names("rewards/*/mean")]
    formats = [name for name in names if any(word in name.lower() for word in FORMAT)]
    tasks = [name for name in names if name not in formats]
    for name in formats:
        learnt = run.curve(f"rewards/{name}/mean")
        step = learnt.since(
            lambda _, step, name=name: (
                _is_saturated(run, name, step)  # type: ignore[misc]
                and not any(_is_saturated(run, task, step) or run.improved(step, f"rewards/{task}/mean") for task in tasks)
            )
        )
        if step is not None and tasks:
            others = ", ".join(f"{task} is {short(run.curve(f'rewards/{task}/mean').window())}" for task in tasks)
            text = f"{name} is {short(learnt.window())}, but {others} and has not risen."
            best = example(run, step, lambda row, name=name: row.row["rewards"].get(name) or 0.0)  # type: ignore[misc]
            return Evidence(step, text, f"rewards/{tasks[0]}/mean", learnt.window(), learnt.start, best)
    return None


def _is_saturated(run: Run, name: str, step: int) -> bool:
    """Whether nearly all completions have the same positive value of a reward: for values 0 and 1, nine of ten have 1."""
    mean, std = run.curve(f"rewards/{name}/mean"), run.curve(f"rewards/{name}/std")
    count = mean.count(step)
    return count >= WINDOW and mean.window(count) > 0 and std.window(std.count(step)) <= mean.window(count) / 3


def _unparsed(run: Run) -> Evidence | None:
    for name in run.names("rewards/*/unparsed"):
        share = run.curve(name)
        step = share.since(lambda value, _, share=share: value >= max(0.25, share.start / 2))  # type: ignore[misc]
        if len(share) and step is not None:
            reward = name.split("/")[1]
            text = f"{reward} found no answer in {share.window():.0%} of the completions, which therefore got its lowest value."
            shown = example(run, step, lambda row, reward=reward: -(row.row["rewards"].get(reward) or 0.0))  # type: ignore[misc]
            return Evidence(step, text, name, share.window(), share.start, shown)
    return _unmarked(run)


def _unmarked(run: Run) -> Evidence | None:
    """Compare marks of the answer in completions with and without reward, for runs that do not log unparsed answers."""

    def share(steps: list[int]) -> float:
        rows = [row for row in rows_of(run, steps) if any(value is not None for value in row.row["rewards"].values())]
        zeros = [row for row in rows if not any(row.row["rewards"].values())]
        wants = [
            row
            for row in rows
            if has_answer(row.group["prompt"]) or (any(row.row["rewards"].values()) and has_answer(row.text))
        ]
        if len(rows) < 16 or len(zeros) < len(rows) / 4 or len(wants) < len(rows) / 10:
            return 0.0
        return sum(not has_answer(row.text) for row in zeros) / len(zeros)

    if run.names("rewards/*/unparsed") or not (steps := since(run, lambda steps: share(steps) >= 0.5)):
        return None
    value = share(max([sorted(run.completions)[-3:]]))
    text = f"{value:.0%} of the completions with a reward of 0 do not mark an answer with <answer>, \\boxed{{}} or similar."
    shown = example(run, steps[-1], lambda row: not any(row.row["rewards"].values()) and not has_answer(row.text))
    return Evidence(steps[-1], text, None, value, example=shown)


def _failed(run: Run) -> Evidence | None:
    for name in run.names("rewards/*/failed"):
        share = run.curve(name)
        if len(share) and (step := share.since(lambda value, _: value >= 0.05, WINDOW)) is not None:
            reward = name.split("/")[1]
            return Evidence(step, f"{reward} failed for {share.window():.0%} of the completions.", name, share.window())
    return None


RULES = (
    Rule(
        "reward-flat",
        "the reward is constant, or has not risen in 40 logs by more than its noise",
        "Check the reward on a few completions by hand, then learning_rate; if the groups have no spread, see"
        " groups-without-spread.",
        ("reward",),
        _flat,
        "two standard errors of the difference between the first and the last quarter of the logs",
    ),
    Rule(
        "reward-saturated",
        "the reward has risen, and most groups have equal rewards now",
        "Nothing is wrong with what was learnt. To learn more, use harder prompts, or set dynamic_sampling=True to resample"
        " the groups without spread.",
        ("reward", "frac_reward_zero_std"),
        _saturated,
        "DAPO (arXiv 2503.14476), section 3.2",
    ),
    Rule(
        "groups-without-spread",
        "most groups have equal rewards, and so no gradient, and the reward does not rise",
        "Choose prompts that the model solves sometimes, increase num_generations or temperature, use a reward with partial"
        " credit, or set dynamic_sampling=True to resample these groups.",
        ("frac_reward_zero_std",),
        _no_spread,
        "DAPO (arXiv 2503.14476), section 3.2",
    ),
    Rule(
        "reward-collapse",
        "the reward lost half of its best value, or half of what it had gained",
        "Lower learning_rate, lower max_grad_norm or set beta > 0, and resume from a checkpoint before the collapse.",
        ("reward",),
        _collapsed,
        "five standard deviations of the noise between neighboring logs",
        logs=WINDOW + 2,
    ),
    Rule(
        "format-not-task",
        "a reward of the format is saturated, but no other reward rises",
        "Lower the weight of the format in reward_weights, or give it only together with a correct answer.",
        ("rewards/*format*/mean or rewards/*/mean",),
        _format_only,
        "nine of ten completions have the format; the other rewards are within two standard deviations of their noise",
    ),
    Rule(
        "unparsed-as-zero",
        "many completions get a reward of 0 because no answer was found in them",
        "Say in the prompt how to mark the answer, as the reward expects it; if answers are cut off, increase"
        " max_completion_length.",
        ("rewards/*/unparsed or completions",),
        _unparsed,
        "a quarter of the completions, and no less than half of the share at the beginning",
    ),
    Rule(
        "reward-fails",
        "a reward function raises or times out",
        "Look at the warnings of the reward function; increase its timeout or correct it.",
        ("rewards/*/failed",),
        _failed,
        "one of twenty completions",
        logs=WINDOW,
    ),
)
