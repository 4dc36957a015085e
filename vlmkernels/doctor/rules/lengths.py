"""Rules about the length of completions, and about rewards that are gained by length or repetition."""

from statistics import fmean

from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import COMPLETIONS, Evidence, Rule
from vlmkernels.doctor.texts import RECENT, example, length_correlation, repetition, rows_of, since
from vlmkernels.record.html import short

LENGTH = "completions/mean_length"
REPEATED = "completions/frac_repeated"
CORRELATION = "reward_length_correlation"


def _changed_length(run: Run, sign: int) -> Evidence | None:
    """Return evidence if the length has doubled (sign 1) or halved (-1), and the reward has not improved."""
    length = run.curve(LENGTH)
    start, noise = length.start, length.noise

    def holds(value: float, step: int) -> bool:
        changed = value >= 2 * start if sign > 0 else value <= start / 2
        return changed and sign * (value - start) > 3 * noise and not run.improved(step)

    if (step := length.since(holds)) is None:
        return None
    text = f"The mean length {'rose' if sign > 0 else 'fell'} from {short(start)} to {short(length.window())} tokens"
    shown = example(run, step, lambda row: sign * len(row.text))
    return Evidence(step, f"{text}, and the reward did not rise.", LENGTH, length.window(), start, shown)


def _truncated(run: Run) -> Evidence | None:
    name = "completions/clipped_ratio"
    share = run.curve(name)
    if (step := share.since(lambda value, _: value >= max(0.25, 0.8 * share.start))) is None:
        return None
    text = f"{share.window():.0%} of the completions are cut off at max_completion_length"
    limit = run.arguments.get("max_completion_length")
    shown = example(run, step, lambda row: len(row.text))
    return Evidence(step, f"{text}{f'={limit}' if limit else ''}.", name, share.window(), share.start, shown)


def _by_length(run: Run) -> Evidence | None:
    if len(run.curve(CORRELATION)) >= WINDOW:
        return _by_logged_length(run)
    return _by_stored_length(run)


def _by_logged_length(run: Run) -> Evidence | None:
    length, correlation = run.curve(LENGTH), run.curve(CORRELATION)

    def strongest(step: int) -> float:
        return max((correlation.window(end) for end in range(WINDOW, correlation.count(step) + 1)), default=0.0)

    def holds(value: float, step: int) -> bool:
        grown = value >= 1.5 * length.start and value - length.start > 3 * length.noise
        return grown and strongest(step) >= 0.5

    if (step := length.since(holds)) is None:
        return None
    value = strongest(step)
    return _length_evidence(run, step, value, length.start, length.window(), "tokens")


def _by_stored_length(run: Run) -> Evidence | None:
    first = sorted(run.completions)[:RECENT]
    start = _mean_length(run, first)

    def holds(steps: list[int]) -> bool:
        if steps[0] <= first[-1] or len(rows_of(run, steps)) < 32:
            return False
        return _mean_length(run, steps) >= 1.5 * start and length_correlation(run, steps) >= 0.5

    if not (steps := since(run, holds)):
        return None
    return _length_evidence(run, steps[-1], length_correlation(run, steps), start, _mean_length(run, steps), "characters")


def _mean_length(run: Run, steps: list[int]) -> float:
    return fmean([len(row.text) for row in rows_of(run, steps)] or [0])


def _length_evidence(run: Run, step: int, value: float, start: float, now: float, unit: str) -> Evidence:
    text = f"Within groups, the correlation of reward and length is {value:.2f}; the mean length rose from {short(start)}"
    shown = example(run, step, lambda row: (row.advantage > 0, len(row.text)))
    return Evidence(step, f"{text} to {short(now)} {unit}.", LENGTH, now, start, shown)


def _by_repetition(run: Run) -> Evidence | None:
    share = run.curve(REPEATED)
    if len(share) >= 2 * WINDOW:
        step = share.since(lambda value, _: value >= max(0.3, share.start + 0.2))
        start, now = share.start, share.window()
    else:
        first = sorted(run.completions)[:RECENT]
        start = _mean_repetition(run, first)
        steps = since(run, lambda steps: steps[0] > first[-1] and _mean_repetition(run, steps) >= max(0.3, start + 0.2))
        step, now = (steps[-1], _mean_repetition(run, steps)) if steps else (None, 0.0)
    if step is None:
        return None
    effect = "the reward rose with it" if run.improved(step) else "the reward did not rise"
    text = f"{now:.0%} of the sequences of four words occurred before in the same completion, at the beginning {start:.0%}; {effect}."
    return Evidence(step, text, REPEATED, now, start, example(run, step, lambda row: repetition(row.text)))


def _mean_repetition(run: Run, steps: list[int]) -> float:
    return fmean([repetition(row.text) for row in rows_of(run, steps)] or [0])


RULES = (
    Rule(
        "length-explosion",
        "the length doubled, and the reward did not rise",
        "Use loss_type='dapo' or 'dr_grpo' instead of a mean per completion, add the reward soft_overlong, or lower"
        " max_completion_length.",
        (LENGTH,),
        lambda run: _changed_length(run, 1),
        "twice the length at the beginning, and three standard deviations of its noise; Dr. GRPO (arXiv 2503.20783), section 3",
    ),
    Rule(
        "length-collapse",
        "the length halved, and the reward did not rise",
        "Remove rewards that favor short completions or lower their weight in reward_weights; lower learning_rate.",
        (LENGTH,),
        lambda run: _changed_length(run, -1),
        "half the length at the beginning, and three standard deviations of its noise",
    ),
    Rule(
        "truncation",
        "many completions are cut off, and their number does not fall",
        "Increase max_completion_length, add the reward soft_overlong, or set mask_truncated_completions=True.",
        ("completions/clipped_ratio",),
        _truncated,
        "a quarter of the completions, and no less than 0.8 of the share at the beginning; DAPO, section 3.4",
    ),
    Rule(
        "reward-by-length",
        "longer completions of a group get higher rewards, and the length rises",
        "Make the reward independent of the length, or add the reward soft_overlong or cosine_length.",
        (f"{CORRELATION} or {COMPLETIONS}", f"{LENGTH} or {COMPLETIONS}"),
        _by_length,
        "the length explains a quarter of the variance of rewards (correlation 0.5), and rose by half",
    ),
    Rule(
        "repetition",
        "completions repeat themselves more than at the beginning",
        "Add the reward repetition, or correct the reward that pays for repeated text; lower temperature or top_p if the text"
        " is noise.",
        (f"{REPEATED} or {COMPLETIONS}",),
        _by_repetition,
        "three of ten sequences of four words, 0.2 more than at the beginning",
    ),
)
