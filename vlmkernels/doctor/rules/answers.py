"""Rules about what completions say: one answer for everything, images that do not matter, tokens that have no place."""

from statistics import fmean

from vlmkernels.doctor.completions import SPECIAL, Row, answer_of, example, groups_of, most_common, recent, rows_of, since
from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import COMPLETIONS, NOTE, PROBLEM, Evidence, Rule
from vlmkernels.doctor.rules.common import large_share
from vlmkernels.record.html import short

IMAGE_USE = "image_use/kl"
SPECIAL_TOKENS = "completions/frac_special_tokens"
MIN_GROUPS = 6  # prompts whose answers are compared


def _excess(run: Run, steps: list[int]) -> float:
    """Return by how much the most common answer is more common than the most common reference.

    Without references, equal answers must have got different rewards, which shows that the references differ.
    """
    groups = groups_of(run, steps)
    answers = [(answer_of(row["text"]), tuple(row["rewards"].values())) for group in groups for row in group["completions"]]
    if len(groups) < MIN_GROUPS or not answers:
        return 0.0
    answer, share = most_common([given for given, _ in answers])
    references = [tuple(group["references"].items()) for group in groups]
    if any(references):
        return share - most_common(references)[1]
    return share - 0.5 if len({rewards for given, rewards in answers if given == answer}) > 1 else 0.0


def _one_answer(run: Run) -> Evidence | None:
    if not (steps := since(run, lambda steps: _excess(run, steps) >= 0.4)):
        return None
    groups = groups_of(run, next(recent(run)))
    answer, share = most_common([answer_of(row["text"]) for group in groups for row in group["completions"]])
    given = f"answer {answer[:60]!r}, although the right answers differ" if answer else "are empty"
    text = f"{share:.0%} of the completions of {len(groups)} prompts {given}."
    shown = example(run, steps[-1], lambda row: (answer_of(row.text) == answer, -row.total))
    return Evidence(steps[-1], text, None, share, example=shown)


def _image_ignored(run: Run) -> Evidence | None:
    use = run.curve(IMAGE_USE)
    first = use.values[0]
    severity, step = PROBLEM, use.since(lambda value, _: value <= 0.005, 2)
    if step is None:
        severity, step = NOTE, use.since(lambda value, _: value <= 0.1 * first, 2)
    if step is None:
        return None
    text = f"With a grey image, the distributions of the next token differ from those with the image by {short(use.window())}"
    text, shown = (
        f"{text} nats (KL divergence), at first by {short(first)}: the image hardly matters.",
        example(run, step, lambda row: -row.advantage),
    )
    return Evidence(step, text, IMAGE_USE, use.window(), first, shown, severity)


def _count_special(row: Row) -> int:
    return len(SPECIAL.findall(row.text))


def _special_tokens(run: Run) -> Evidence | None:
    return _sampled_special(run) if run.curve(SPECIAL_TOKENS).covers(WINDOW) else _written_special(run)


_sampled_special = large_share(
    SPECIAL_TOKENS, 0.005, "{share} of the sampled tokens are padding or image tokens, which no answer has.", _count_special
)


def _written_special(run: Run) -> Evidence | None:
    def share(steps: list[int]) -> float:
        return fmean([_count_special(row) > 0 for row in rows_of(run, steps)] or [0])

    if not (steps := since(run, lambda steps: share(steps) >= 0.05)):
        return None
    value, shown = share(next(recent(run))), example(run, steps[-1], _count_special)
    return Evidence(
        steps[-1],
        f"{value:.0%} of the completions contain padding or image tokens, which no answer has.",
        None,
        value,
        example=shown,
    )


RULES = (
    Rule(
        "one-answer",
        "completions for prompts with different references have the same answer",
        "Check that the images reach the model, and balance the answers of the dataset; lower learning_rate or set beta > 0.",
        (COMPLETIONS,),
        _one_answer,
        "among completions, the most common answer has 0.4 more than the most common reference has among prompts",
    ),
    Rule(
        "image-ignored",
        "completions are as probable without the image as with it",
        "Check that the images reach the model (placeholders of the chat template, resolution) and that the prompts need them;"
        " then set perception_loss_weight > 0.",
        (IMAGE_USE,),
        _image_ignored,
        "0.005 nats, more than rounding in bf16 causes; a note below a tenth of the first measurement",
        steps=2,
    ),
    Rule(
        "special-tokens",
        "the model samples padding or image tokens",
        "Exclude these tokens (suppress_tokens in generation_kwargs); check the chat template and the end-of-sequence tokens.",
        (f"{SPECIAL_TOKENS} or {COMPLETIONS}",),
        _special_tokens,
        "one of 200 tokens; a model trained from scratch samples one of 1000",
        steps=WINDOW,
    ),
)
