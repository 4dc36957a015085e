"""Rules about what completions say: one answer for everything, images that do not matter, tokens that have no place."""

from statistics import fmean

from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import COMPLETIONS, Evidence, Rule
from vlmkernels.doctor.texts import SPECIAL, answer_of, example, groups_of, most_common, recent, rows_of, since
from vlmkernels.record.html import short

IMAGE_USE = "image_use/kl"
SPECIAL_TOKENS = "completions/frac_special_tokens"
MIN_GROUPS = 6  # prompts whose answers are compared


def _excess(run: Run, steps: list[int]) -> float:
    """Return by how much the most common answer is more common than the most common reference.

    Without references, equal answers must have got different rewards, which shows that the references differ.
    """
    groups = [group for group in groups_of(run, steps) if group["completions"]]
    if len(groups) < MIN_GROUPS:
        return 0.0
    answers = [[answer_of(row["text"]) for row in group["completions"]] for group in groups]
    answer, share = most_common([answer for group in answers for answer in group])
    references = [tuple(sorted(group["references"].items())) for group in groups]
    if any(references):
        return (
            share - most_common(references)[1]
            if len(set(references)) > 2
            else max(0.0, share - 0.5) * (len(set(references)) > 1)
        )
    rewards = {
        tuple(row["rewards"].values())
        for group, found in zip(groups, answers, strict=True)
        for row, own in zip(group["completions"], found, strict=True)
        if own == answer
    }
    return share - 0.5 if len(rewards) > 1 else 0.0


def _one_answer(run: Run) -> Evidence | None:
    if not (steps := since(run, lambda steps: _excess(run, steps) >= 0.4)):
        return None
    groups = groups_of(run, next(recent(run)))
    answer, share = most_common([answer_of(row["text"]) for group in groups for row in group["completions"]])
    text = f"{share:.0%} of the completions of {len(groups)} prompts answer {answer[:60]!r}."
    shown = example(run, steps[-1], lambda row: (answer_of(row.text) == answer, -row.advantage))
    return Evidence(steps[-1], text, None, share, example=shown)


def _image_ignored(run: Run) -> Evidence | None:
    use, entropy = run.curve(IMAGE_USE), run.curve("entropy")

    def holds(value: float, step: int) -> bool:
        count = entropy.count(step)
        return value <= 0.01 * max(entropy.window(count) if count else 0.0, 0.1)

    if (step := use.since(holds, 2)) is None:
        return None
    text = f"Without the image, the log-probabilities of the completions change by {short(use.window())} nats per token"
    shown = example(run, step, lambda row: -row.advantage)
    return Evidence(step, f"{text} (KL divergence).", IMAGE_USE, use.window(), use.values[0], shown)


def _special_tokens(run: Run) -> Evidence | None:
    share = run.curve(SPECIAL_TOKENS)
    if len(share) >= WINDOW:
        if (step := share.since(lambda value, _: value >= 0.005, WINDOW)) is None:
            return None
        text = f"{share.window():.1%} of the sampled tokens are padding or image tokens."
        shown = example(run, step, lambda row: len(SPECIAL.findall(row.text)))
        return Evidence(step, text, SPECIAL_TOKENS, share.window(), share.start, shown)

    def stored(steps: list[int]) -> float:
        rows = rows_of(run, steps)
        return fmean([SPECIAL.search(row.text) is not None for row in rows] or [0])

    if not (steps := since(run, lambda steps: stored(steps) >= 0.05)):
        return None
    value = stored(next(recent(run)))
    shown = example(run, steps[-1], lambda row: len(SPECIAL.findall(row.text)))
    return Evidence(
        steps[-1], f"{value:.0%} of the completions contain tokens of padding or images.", None, value, example=shown
    )


RULES = (
    Rule(
        "one-answer",
        "completions for prompts with different references have the same answer",
        "Lower learning_rate or set beta > 0; balance the answers in the dataset, and check that the images reach the model.",
        (COMPLETIONS,),
        _one_answer,
        "the most common answer is more common than the most common reference, by 0.4 of the completions",
    ),
    Rule(
        "image-ignored",
        "completions are as probable without the image as with it",
        "Check that images reach the model (resolution, placeholders in the chat template) and that the prompts need them;"
        " then set perception_loss_weight > 0.",
        (IMAGE_USE,),
        _image_ignored,
        "1 % of the entropy; PAPO (arXiv 2507.06448), section 3",
        logs=2,
    ),
    Rule(
        "special-tokens",
        "the model samples padding or image tokens",
        "Ban these tokens with suppress_tokens in generation_kwargs, and check the chat template and the end-of-sequence tokens.",
        (f"{SPECIAL_TOKENS} or {COMPLETIONS}",),
        _special_tokens,
        "one of 200 tokens; untrained models sample one of 1000",
        logs=WINDOW,
    ),
)
