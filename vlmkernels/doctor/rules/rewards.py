"""Rules about the rewards: whether they give a signal, rise, and mean what they should."""

import math
from itertools import accumulate, pairwise
from statistics import fmean

from vlmkernels.doctor.completions import MARKS, Row, example, has_answer, recent, rows_of, since
from vlmkernels.doctor.history import LARGE, SMALL, WINDOW, Curve, Run, reward_of
from vlmkernels.doctor.rule import COMPLETIONS, NOTE, PROBLEM, Evidence, Rule
from vlmkernels.doctor.rules.common import gain_text, is_stuck, large_share
from vlmkernels.doctor.trend import EXCLUDED, HINT, VISIBLE, Trend
from vlmkernels.record.html import short

ZERO_SPREAD = "frac_reward_zero_std"
FILLED = "dynamic_sampling/filled"  # groups without spread in the batch; ZERO_SPREAD then counts dropped groups, too
LITTLE_SPREAD = 0.2  # of the completions that are in groups with spread if half of the completions are right
SLOW = 40  # steps after which a reward that has not visibly risen is worth a note
VERY_SLOW, VERY_SLOW_LOGS = 100, 30  # the smallest numbers of steps and of logs after which it can be a problem
NEARLY_ALL = 0.9
FORMAT = ("format", "tag", "xml", "json", "struct", "think", "template", "syntax")  # in the names of rewards of the format


def _flat(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    if max(reward.values) - min(reward.values) <= 1e-9 * max(1.0, abs(reward.start)):
        first, shown = reward.steps[reward.logs(2 * WINDOW) - 1], example(run, reward.steps[-1], lambda row: row.advantage)
        text = f"The reward is {short(reward.start)} in all {len(reward)} logs, which gives no direction to learn in."
        return Evidence(first, text, "reward", reward.start, reward.start, shown)
    step = reward.since(lambda _, step: not reward.has_risen(step), SLOW)
    if step is None or not (trend := reward.trend(len(reward))):
        return None
    steps, small = reward.steps[-1] - reward.steps[0], SMALL * run.spread("reward")
    severity = NOTE
    text = f"The reward went from {short(reward.start)} to {short(reward.window())} in {steps} steps"
    if _has_no_room(run, reward.steps[-1]):
        text = f"{text}, near its best value."
    elif _never_rose(run, "reward"):
        severity = PROBLEM
        text = f"{text}, a gain of {gain_text(trend)}, which excludes that it has risen by {short(small)}."
    else:
        text = f"{text}, a gain of {gain_text(trend)}: too early to say whether it rises. {_visible(steps, trend, small)}"
    return Evidence(
        step, text, "reward", reward.window(), reward.start, example(run, step, lambda row: row.advantage), severity
    )


def _visible(steps: int, trend: Trend, small: float) -> str:
    """Say which gain would be visible, and when."""
    text = f"With this noise, a gain below {short(trend.detectable)} is not visible after {steps} steps"
    needed = steps * (trend.detectable / small) ** 2 if small else 0.0
    return f"{text}; one of {short(small)} would be after about {float(f'{needed:.1e}'):.0f}." if needed > steps else f"{text}."


def _never_rose(run: Run, name: str) -> bool:
    """Whether a reward has not risen since the beginning of training, in so many steps that this is a problem."""
    curve = run.curve(name)
    has_beginning = curve.steps[0] <= 2 * curve.every  # else an earlier start, which is not in the log, may have learned
    return has_beginning and len(curve) >= max(curve.logs(VERY_SLOW), VERY_SLOW_LOGS) and is_stuck(run, name)


def _has_no_room(run: Run, step: int) -> bool:
    """Whether nearly all completions get the best reward, so that it cannot rise.

    The best reward is 1 if all functions return 0 or 1, which shows in their standard deviation; otherwise it is that of the
    stored completions. A reward that has always been the same has no best value.
    """
    names = [reward_of(name) for name in run.names("rewards/*/mean")]
    if names and all(_is_best(run, name, step) for name in names):
        return True
    totals = [row.total for row in rows_of(run, sorted(run.completions))]
    window = [row.total for row in rows_of(run, next(recent(run), []))]
    if not window or min(totals) == max(totals):
        return False
    return fmean(total >= max(totals) - 1e-6 for total in window) >= NEARLY_ALL


def _is_best(run: Run, name: str, step: int) -> bool:
    """Whether a reward function returns 0 or 1, and 1 for nearly all completions."""
    means, stds = run.curve(f"rewards/{name}/mean"), run.curve(f"rewards/{name}/std")
    if not (count := means.count(step)) or not (spread := stds.count(step)) or max(means.values) > 1 + 1e-6:
        return False
    mean, std = means.mean(count)[0], stds.mean(spread)[0]
    largest = math.sqrt(max(mean * (1 - mean), 0.0))  # of values between 0 and 1, if all are 0 or 1; less in a small batch
    return min(means.values) < 1 and mean >= NEARLY_ALL and 0.4 * largest <= std <= 1.1 * largest


def _spread_is_lost(run: Run, metric: str, learned: bool) -> int | None:
    """Return since when groups have no spread although, or because not, the reward has risen or has no room to rise."""
    share = run.curve(metric)
    limit = max(_no_spread_limit(run), share.start - 3 * share.noise - 0.05)  # a share that falls is no fault

    def holds(value: float, step: int) -> bool:
        mean, error = share.mean(share.count(step))
        if min(value, mean - 2 * error) < limit:
            return False
        return (run.improved(step) or _has_no_room(run, step)) is learned

    return share.since(holds)


def _no_spread_limit(run: Run) -> float:
    """Return the share of completions in groups with equal rewards above which too few are left to learn from.

    Of groups of G completions, half of which get a reward of 1 on average, 1 - 2^(1 - G) have spread.
    """
    size = run.arguments.get("num_generations")
    if not isinstance(size, int):
        sizes = [len(group["completions"]) for groups in run.completions.values() for group in groups]
        size = max(sizes, default=0)
    return 1 - LITTLE_SPREAD * (1 - 2.0 ** (1 - size) if size > 1 else 1)


def _no_spread(run: Run) -> Evidence | None:
    metric = FILLED if run.names(FILLED) else ZERO_SPREAD
    if (step := _spread_is_lost(run, metric, learned=False)) is None:
        return None
    share, reward = run.curve(metric), run.curve("reward")
    level = f"; the mean reward is {short(reward.window())}" if len(reward) else ""
    text = f"{share.window():.0%} of the completions are in groups with equal rewards, which have no gradient{level}."
    return Evidence(step, text, metric, share.window(), share.start, example(run, step, lambda row: -abs(row.advantage)))


def _saturated(run: Run) -> Evidence | None:
    if (step := _spread_is_lost(run, ZERO_SPREAD, learned=True)) is None or _collapsed(run):
        return None
    share, reward = run.curve(ZERO_SPREAD), run.curve("reward")
    text = (
        f"The reward went from {short(reward.start)} to {short(reward.window())}; {share.window():.0%} of the completions are"
    )
    return Evidence(step, f"{text} in groups with equal rewards.", ZERO_SPREAD, share.window(), share.start, severity=NOTE)


def _collapsed(run: Run) -> Evidence | None:
    reward = run.curve("reward")
    start, noticeable = reward.start, max(5 * reward.noise, 10 * reward.wander)
    # A run can collapse within the first logs, so that two neighbors of them are enough; a single one may be chance.
    early = max(map(min, pairwise(reward.values[: reward.least])))
    best = list(accumulate(map(reward.window, range(reward.least, len(reward) + 1)), max))

    def best_before(step: int) -> float:
        return max(early, best[max(0, reward.count(step) - reward.width - reward.least)])

    def holds(value: float, step: int) -> bool:
        top = best_before(step)
        lost_half = value <= top - abs(top) / 2
        lost_gain = top - start >= noticeable and top - value >= (top - start) / 2
        return (lost_half or lost_gain) and top - value > noticeable and top - value >= LARGE * run.spread("reward")

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
        has_format = run.improved(step, f"rewards/{name}/mean")
        return has_format and not rose(step) and any(has_lost_half(curve, step) for curve in scored.values())

    def has_lost_half(curve: Curve, step: int) -> bool:
        return curve.has_fallen(step) and curve.start - curve.at(step, curve.start) >= abs(curve.start) / 2

    def rose(step: int) -> bool:
        return any(curve.has_risen(step) for curve in scored.values())

    def holds(_: float, step: int) -> bool:
        if not _is_saturated(run, name, step) or any(_is_saturated(run, task, step) for task in scored):
            return False
        return fell(step) or (learned.count(step) >= learned.logs(SLOW) and not rose(step))

    if not scored or (step := learned.since(holds)) is None:
        return None
    others = ", ".join(f"{task} went from {short(c.start)} to {short(c.window())}" for task, c in scored.items())
    text = f"{name} is {short(learned.window())} (at first {short(learned.start)}), but {others}: the form is learned"
    text = f"{text} without the task."
    shown = example(run, step, lambda row: row.reward(name) - sum(map(row.reward, tasks)))
    is_certain = fell(learned.steps[-1]) or all(_never_rose(run, f"rewards/{task}/mean") for task in scored)
    severity = PROBLEM if is_certain else NOTE
    task, curve = next(iter(scored.items()))
    return Evidence(step, text, f"rewards/{task}/mean", curve.window(), curve.start, shown, severity)


def _is_saturated(run: Run, name: str, step: int) -> bool:
    """Whether nearly all completions have the same positive value of a reward: for values 0 and 1, nine of ten have 1."""
    mean, std = run.curve(f"rewards/{name}/mean"), run.curve(f"rewards/{name}/std")
    count, spread = mean.count(step), std.count(step)
    return count >= mean.least and spread > 0 and mean.window(count) > 0 and std.window(spread) <= mean.window(count) / 3


def _unparsed(run: Run) -> Evidence | None:
    return _logged_unparsed(run) if run.names("rewards/*/unparsed") else _unmarked(run)


_logged_unparsed = large_share(
    "rewards/*/unparsed",
    0.25,
    "{reward} found no answer in {share} of the completions, and scored them as wrong, whatever they say.",
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
        "the reward is constant, or a gain that matters can be excluded after 100 steps; a note if after 40 steps no gain is"
        " visible, and it is too early to exclude one or the reward is near its best value",
        "If it is too early to say, train longer, or with more prompts per step, which reduces the noise. Else check the reward"
        " on a few completions by hand, then learning_rate. If groups-without-spread or no-update is found too, begin there.",
        ("reward",),
        _flat,
        f"visible: {VISIBLE} standard errors; excluded: a gain of {SMALL} standard deviations between completions, if it is"
        f" {EXCLUDED:.0f} standard errors above the estimate, and the estimate at most {HINT}, from {VERY_SLOW_LOGS} logs on;"
        " near its best value: nine of ten completions have it",
    ),
    Rule(
        "reward-saturated",
        "the reward has risen or is near its best value, and most groups have equal rewards: the prompts are too easy",
        "This is not a fault. For further progress, use harder prompts, or set dynamic_sampling=True to resample groups without"
        " spread.",
        ("reward", ZERO_SPREAD),
        _saturated,
        "that of groups-without-spread",
    ),
    Rule(
        "groups-without-spread",
        "most groups have equal rewards, and so no gradient, and the reward does not rise",
        "Choose prompts that the model solves sometimes, increase num_generations or temperature, give partial credit, or set"
        " dynamic_sampling=True to resample these groups.",
        (ZERO_SPREAD,),
        _no_spread,
        "four of five completions, nine of ten in groups of 2: a fifth of those with spread if half were right; DAPO (arXiv"
        " 2503.14476), section 3.2",
    ),
    Rule(
        "reward-collapse",
        "the reward lost half of its best value, or half of what it had gained",
        "Resume from a checkpoint before the collapse with a lower learning_rate or max_grad_norm, or with beta > 0.",
        ("reward",),
        _collapsed,
        "five standard deviations of the noise between neighboring logs, ten of that between tenths of the run, and"
        f" {LARGE} of the rewards of completions",
        steps=WINDOW + 2,
    ),
    Rule(
        "format-not-task",
        "a reward of the format is high, but the others lost half of their value, or have not risen (as in reward-flat, with a"
        " note if it is too early to say)",
        "Lower the weight of the format in reward_weights, or give it only together with a correct answer.",
        ("rewards/*/mean", "rewards/*/std"),
        _format_only,
        "nine of ten completions have the format; the others as in reward-flat",
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
        large_share(
            "rewards/*/failed", 0.05, "{reward} failed for {share} of the completions, which are trained without it.", _lowest
        ),
        "one of twenty completions",
        steps=WINDOW,
    ),
)
