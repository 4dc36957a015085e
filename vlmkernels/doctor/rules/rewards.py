"""Rules about the rewards: whether they give a signal, rise, and mean what they should."""

import math
from itertools import accumulate, pairwise
from statistics import fmean

from vlmkernels.doctor.completions import MARKS, Row, example, has_answer, recent, rows_of, since
from vlmkernels.doctor.history import WINDOW, Curve, Run, reward_of
from vlmkernels.doctor.rule import COMPLETIONS, NOTE, PROBLEM, Evidence, Rule
from vlmkernels.doctor.rules.common import large_share
from vlmkernels.record.html import short

ZERO_SPREAD = "frac_reward_zero_std"
FILLED = "dynamic_sampling/filled"  # groups without spread in the batch; ZERO_SPREAD then counts dropped groups, too
NO_SPREAD = 0.8  # share of completions in groups with equal rewards: of a batch, a fifth or less is left to learn from
SLOW, VERY_SLOW = 40, 100  # logs after which a reward that has not risen is worth a note, and a problem
FORMAT = ("format", "tag", "xml", "json", "struct", "think", "template", "syntax")  # in the names of rewards of the format


def _flat(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    if max(reward.values) - min(reward.values) <= 1e-9 * max(1.0, abs(reward.start)):
        text = f"The reward is {short(reward.start)} in all {len(reward)} logs."
        step, is_certain = reward.steps[2 * WINDOW - 1], True
    elif (since := reward.since(lambda _, step: _is_flat(reward, reward.count(step)), SLOW)) is not None:
        text = f"The reward was {short(reward.start)} at first and is {short(reward.window())} after {len(reward)} logs."
        step, is_certain = since, len(reward) >= VERY_SLOW
    else:
        return None
    shown, severity = example(run, step, lambda row: row.advantage), PROBLEM if is_certain else NOTE
    return Evidence(step, text, "reward", reward.window(), reward.start, shown, severity)


def _is_flat(reward: Curve, end: int) -> bool:
    """Whether the gain up to log ``end`` is not significant, and an optimistic estimate of it little more than the noise."""
    gain, error = _gain(reward, end)
    return gain < 1.5 * error and gain + 2 * error < 1.5 * reward.noise


def _gain(reward: Curve, end: int) -> tuple[float, float]:
    """Return the difference between the last and the first quarter of the logs up to ``end``, and its standard error."""
    quarter = end // 4
    gain = fmean(reward.values[end - quarter : end]) - fmean(reward.values[:quarter])
    return gain, reward.noise * math.sqrt(2 / quarter)


def _spread_is_lost(run: Run, metric: str, improved: bool) -> int | None:
    """Return since when groups have no spread although the reward has, or because it has not, improved."""
    share = run.curve(metric)
    limit = max(NO_SPREAD, share.start - 3 * share.noise)
    return share.since(lambda value, step: value >= limit and run.improved(step) is improved)


def _no_spread(run: Run) -> Evidence | None:
    metric = FILLED if run.names(FILLED) else ZERO_SPREAD
    if (step := _spread_is_lost(run, metric, improved=False)) is None:
        return None
    share, reward = run.curve(metric), run.curve("reward")
    level = f"; the mean reward is {short(reward.window())}" if len(reward) else ""
    text = f"{share.window():.0%} of the completions are in groups with equal rewards{level}."
    return Evidence(step, text, metric, share.window(), share.start, example(run, step, lambda row: -abs(row.advantage)))


def _saturated(run: Run) -> Evidence | None:
    if (step := _spread_is_lost(run, ZERO_SPREAD, improved=True)) is None or _collapsed(run):
        return None
    share, reward = run.curve(ZERO_SPREAD), run.curve("reward")
    text = (
        f"The reward rose from {short(reward.start)} to {short(reward.window())}; {share.window():.0%} of the completions are"
    )
    return Evidence(step, f"{text} in groups with equal rewards.", ZERO_SPREAD, share.window(), share.start, severity=NOTE)


def _collapsed(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    noise, start = reward.noise, reward.start
    # A run can collapse within the first logs, so that two neighbors of them are enough; a single one may be chance.
    early = max(map(min, pairwise(reward.values[:WINDOW])))
    best = list(accumulate(map(reward.window, range(WINDOW, len(reward) + 1)), max))

    def best_before(step: int) -> float:
        return max(early, best[max(0, reward.count(step) - reward.width - WINDOW)])

    def holds(value: float, step: int) -> bool:
        top = best_before(step)
        lost_half = value <= top - abs(top) / 2
        lost_gain = top - start >= 5 * noise and top - value >= (top - start) / 2
        return (lost_half or lost_gain) and top - value > 5 * noise

    if (step := reward.since(holds, WINDOW + 2)) is None:
        return None
    top, now = best_before(step), reward.window()
    shown = example(run, step, lambda row: -row.advantage)
    return Evidence(step, f"The reward fell from {short(top)} to {short(now)}.", "reward", now, top, shown)


def _format_only(run: Run) -> Evidence | None:
    names = [reward_of(name) for name in run.names("rewards/*/mean")]
    formats = [name for name in names if any(word in name.lower() for word in FORMAT)]
    tasks = [name for name in names if name not in formats]
    return next(filter(None, (_format_without(run, name, tasks) for name in formats)), None)


def _format_without(run: Run, name: str, tasks: list[str]) -> Evidence | None:
    """Return evidence if the format is learned, but the task is not: its rewards fell, or did not rise in ``SLOW`` logs."""
    learned = run.curve(f"rewards/{name}/mean")
    scored = {task: curve for task in tasks if len(curve := run.curve(f"rewards/{task}/mean"))}

    def fell(step: int) -> bool:
        gains = [curve.gain(step) for curve in scored.values()]
        return run.improved(step, f"rewards/{name}/mean") and min(gains) < -2 and max(gains) <= 2

    def holds(_: float, step: int) -> bool:
        if not _is_saturated(run, name, step) or any(_is_saturated(run, task, step) for task in scored):
            return False
        return fell(step) or (learned.count(step) >= SLOW and not any(_has_risen(c, step) for c in scored.values()))

    if not scored or (step := learned.since(holds)) is None:
        return None
    others = ", ".join(f"{task} went from {short(c.start)} to {short(c.window())}" for task, c in scored.items())
    text = f"{name} is {short(learned.window())} (at first {short(learned.start)}), but {others}."
    shown = example(run, step, lambda row: row.reward(name) - sum(map(row.reward, tasks)))
    severity = PROBLEM if fell(learned.steps[-1]) or len(learned) >= VERY_SLOW else NOTE
    task, curve = next(iter(scored.items()))
    return Evidence(step, text, f"rewards/{task}/mean", curve.window(), curve.start, shown, severity)


def _has_risen(curve: Curve, step: int) -> bool:
    """Whether a reward has risen, be it by less than its noise: over many logs, a small gain is significant."""
    if (count := curve.count(step)) < SLOW:
        return curve.gain(step) > 2
    gain, error = _gain(curve, count)
    return gain > 2 * error or curve.gain(step) > 2


def _is_saturated(run: Run, name: str, step: int) -> bool:
    """Whether nearly all completions have the same positive value of a reward: for values 0 and 1, nine of ten have 1."""
    mean, std = run.curve(f"rewards/{name}/mean"), run.curve(f"rewards/{name}/std")
    count, spread = mean.count(step), std.count(step)
    return count >= WINDOW and spread > 0 and mean.window(count) > 0 and std.window(spread) <= mean.window(count) / 3


def _unparsed(run: Run) -> Evidence | None:
    return _logged_unparsed(run) if run.names("rewards/*/unparsed") else _unmarked(run)


_logged_unparsed = large_share(
    "rewards/*/unparsed",
    0.25,
    "{reward} found no answer in {share} of the completions, and gave them its value for such completions.",
    lambda row: (not has_answer(row.text), -row.total),
    kept=0.8,
)


def _unmarked(run: Run) -> Evidence | None:
    """Compare marks of the answer in completions with and without reward, for runs that do not log unparsed answers."""

    def unmarked(steps: list[int]) -> float:
        rows = [row for row in rows_of(run, steps) if row.is_scored]
        zeros, others = [row for row in rows if not row.total], [row for row in rows if row.total]
        if len(rows) < 16 or len(zeros) < len(rows) / 4:
            return 0.0
        is_asked = any(mark in row.group["prompt"] for row in zeros for mark in MARKS)
        is_rewarded = bool(others) and fmean(has_answer(row.text) for row in others) > 0.9
        return fmean(not has_answer(row.text) for row in zeros) if is_asked or is_rewarded else 0.0

    if not (steps := since(run, lambda steps: unmarked(steps) >= 0.5)):
        return None
    value = unmarked(next(recent(run)))
    text = f"{value:.0%} of the completions with a reward of 0 do not mark an answer (<answer>, \\boxed or similar)."
    shown = example(run, steps[-1], lambda row: (not has_answer(row.text), -row.total))
    return Evidence(steps[-1], text, None, value, example=shown)


def _lowest(row: Row) -> float:
    return -row.total


RULES = (
    Rule(
        "reward-flat",
        "the reward is constant, or has not risen in 40 logs (a note) or 100 logs by more than its noise",
        "Check the reward on a few completions by hand, then learning_rate. If groups-without-spread or no-update is found too,"
        " begin there.",
        ("reward",),
        _flat,
        "1.5 standard errors of the difference between the first and the last quarter of the logs",
    ),
    Rule(
        "reward-saturated",
        "the reward has risen, and most groups have equal rewards now: the prompts have become too easy",
        "This is not a fault. For further progress, use harder prompts, or set dynamic_sampling=True to resample groups without"
        " spread.",
        ("reward", ZERO_SPREAD),
        _saturated,
        "four of five completions; DAPO (arXiv 2503.14476), section 3.2",
    ),
    Rule(
        "groups-without-spread",
        "most groups have equal rewards, and so no gradient, and the reward does not rise",
        "Choose prompts that the model solves sometimes, increase num_generations or temperature, give partial credit, or set"
        " dynamic_sampling=True to resample these groups.",
        (ZERO_SPREAD,),
        _no_spread,
        "four of five completions; DAPO (arXiv 2503.14476), section 3.2",
    ),
    Rule(
        "reward-collapse",
        "the reward lost half of its best value, or half of what it had gained",
        "Resume from a checkpoint before the collapse with a lower learning_rate or max_grad_norm, or with beta > 0.",
        ("reward",),
        _collapsed,
        "five standard deviations of the noise between neighboring logs",
        logs=WINDOW + 2,
    ),
    Rule(
        "format-not-task",
        "a reward of the format is high, but the others fall, or do not rise in 40 logs (a note) or 100 logs",
        "Lower the weight of the format in reward_weights, or give it only together with a correct answer.",
        ("rewards/*/mean", "rewards/*/std"),
        _format_only,
        "nine of ten completions have the format; the other rewards differ from the beginning by less than two standard errors",
    ),
    Rule(
        "unparsed-as-zero",
        "many completions get a reward of 0 because no answer was found in them",
        "Say in the prompt how to mark the answer, as the reward expects it. If answers are cut off, increase"
        " max_completion_length.",
        (f"rewards/*/unparsed or {COMPLETIONS}",),
        _unparsed,
        "a quarter of the completions, and at least 0.8 times the share at the beginning",
    ),
    Rule(
        "reward-fails",
        "a reward function raises or times out",
        "Look at the warnings of the reward function; correct it or increase its timeout.",
        ("rewards/*/failed",),
        large_share("rewards/*/failed", 0.05, "{reward} failed for {share} of the completions.", _lowest),
        "one of twenty completions",
        logs=WINDOW,
    ),
)
