"""The rules."""

from statistics import median

from vlmkernels.doctor.history import WINDOW, Log, Run
from vlmkernels.doctor.rule import Evidence, Rule


def _since(logs: list[Log], holds) -> int | None:
    """Return the step since which the median of the last ``WINDOW`` logs satisfies ``holds``, or None if it does not now."""
    since = None
    for end in range(len(logs), WINDOW - 1, -1):
        if not holds(median(log.value for log in logs[end - WINDOW : end])):
            break
        since = logs[end - 1].step
    return since


def _no_spread(run: Run) -> Evidence | None:
    name = "frac_reward_zero_std"
    logs = run.logs(name)
    if (step := _since(logs, lambda value: value >= 0.8)) is None:
        return None
    value = median(log.value for log in logs[-WINDOW:])
    return Evidence(step, f"{value:.0%} of the completions are in groups with equal rewards.", name, value)


def _special_tokens(run: Run) -> Evidence | None:
    name = "completions/frac_special_tokens"
    for log in run.logs(name):
        if log.value > 0:
            return Evidence(log.step, f"{log.value:.2%} of the sampled tokens are of padding or images.", name, log.value)
    return None


RULES = (
    Rule(
        "groups without spread",
        "most groups have equal rewards, and so no gradient",
        "Set dynamic_sampling=True, or choose prompts that the model solves sometimes.",
        ("frac_reward_zero_std",),
        _no_spread,
        "DAPO (arXiv 2503.14476), section 3.2",
    ),
    Rule(
        "special tokens sampled",
        "the model samples tokens of padding or of images",
        "Ban these tokens: see bad_words_ids in generation_kwargs.",
        ("completions/frac_special_tokens",),
        _special_tokens,
        "such tokens have no meaning in a completion",
        logs=1,
    ),
)
