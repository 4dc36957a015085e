"""Rules about the policy: entropy, KL divergence, ratios, the mismatch of training and rollout."""

from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import Evidence, Rule
from vlmkernels.doctor.texts import example
from vlmkernels.record.html import short

DIFFERENCE = "sampling/sampling_logp_difference/mean"
SAMPLE_SIZE = "sampling/effective_sample_size"
CLIPPED = "clip_ratio/region_mean"
CHANGED = "frac_weights_changed"


def _changed_entropy(run: Run, sign: int) -> Evidence | None:
    """Return evidence if the entropy exploded (sign 1) or collapsed (-1), and the reward has not improved."""
    entropy = run.curve("entropy")
    start, noise = entropy.start, entropy.noise

    def holds(value: float, step: int) -> bool:
        changed = value >= max(2 * start, start + 0.5) if sign > 0 else value <= start / 5
        return changed and sign * (value - start) > 3 * noise and not run.improved(step)

    if (step := entropy.since(holds)) is None:
        return None
    text = f"The entropy {'rose' if sign > 0 else 'fell'} from {short(start)} to {short(entropy.window())} nats"
    shown = example(run, step, lambda row: sign * len(row.text))
    return Evidence(step, f"{text}, and the reward did not rise.", "entropy", entropy.window(), start, shown)


def _kl(run: Run) -> Evidence | None:
    kl, entropy = run.curve("kl"), run.curve("entropy")
    scale = entropy.start if len(entropy) else 0.5

    def holds(value: float, step: int) -> bool:
        cross_entropy = value + (entropy.window(entropy.count(step)) if len(entropy) else scale)
        return value >= scale and cross_entropy >= 2 * scale and (value >= 10 * scale or not run.improved(step))

    if (step := kl.since(holds)) is None:
        return None
    text = f"The KL divergence from the reference is {short(kl.window())} nats per token; the entropy was {short(scale)} at the"
    return Evidence(step, f"{text} beginning.", "kl", kl.window(), scale, example(run, step, lambda row: -row.advantage))


def _ratio(run: Run) -> Evidence | None:
    clipped, ratio = run.curve(CLIPPED), run.curve("ratio/mean")
    if len(clipped) >= WINDOW and (step := clipped.since(lambda value, _: value >= 0.2, WINDOW)) is not None:
        text = f"{clipped.window():.0%} of the tokens are clipped."
        return Evidence(step, text, CLIPPED, clipped.window(), clipped.start)
    if len(ratio) >= WINDOW and (step := ratio.since(lambda value, _: abs(value - 1) >= 0.1, WINDOW)) is not None:
        text = f"The mean probability ratio to the policy that sampled is {short(ratio.window())}; its expected value is 1."
        return Evidence(step, text, "ratio/mean", ratio.window(), 1.0)
    return None


def _mismatch(run: Run) -> Evidence | None:
    difference, size = run.curve(DIFFERENCE), run.curve(SAMPLE_SIZE)
    if len(difference) >= WINDOW:
        limit = min(0.1, max(0.02, 5 * difference.start))
        if (step := difference.since(lambda value, _: value >= limit, WINDOW)) is not None:
            text = (
                f"Log-probabilities of the sampled tokens differ between rollout and training by {short(difference.window())}"
            )
            return Evidence(step, f"{text} on average.", DIFFERENCE, difference.window(), difference.start)
    if len(size) >= WINDOW and (step := size.since(lambda value, _: value <= 0.5, WINDOW)) is not None:
        text = f"The effective sample size is {size.window():.0%} of the completions."
        return Evidence(step, text, SAMPLE_SIZE, size.window(), size.start)
    return None


RULES = (
    Rule(
        "entropy-collapse",
        "the entropy fell to a fifth, and the reward did not rise",
        "Set epsilon_high above epsilon, lower learning_rate, raise temperature, or set entropy_coef > 0.",
        ("entropy",),
        lambda run: _changed_entropy(run, -1),
        "a fifth of the entropy at the beginning; Cui et al. (arXiv 2505.22617): the reward is bought with entropy",
    ),
    Rule(
        "entropy-explosion",
        "the entropy doubled, and the reward did not rise",
        "Lower learning_rate, epsilon_high or entropy_coef; set beta > 0.",
        ("entropy",),
        lambda run: _changed_entropy(run, 1),
        "twice the entropy at the beginning, and 0.5 nats more: each token has 1.6 times as many choices",
    ),
    Rule(
        "kl-runaway",
        "the policy has left the reference, and the reward did not rise",
        "Increase beta, or lower learning_rate.",
        ("kl",),
        _kl,
        "the KL divergence exceeds the entropy at the beginning: completions are twice as improbable, in nats, as typical ones of"
        " the reference",
    ),
    Rule(
        "ratio-out-of-bounds",
        "many tokens are clipped, or the mean probability ratio is not 1",
        "Lower learning_rate, num_iterations or steps_per_generation.",
        (f"{CLIPPED} or ratio/mean",),
        _ratio,
        "a fifth of the tokens; the mean ratio of samples to their own policy is 1",
        logs=WINDOW,
    ),
    Rule(
        "sampling-mismatch",
        "rollout and training compute different log-probabilities of the same tokens",
        "Check temperature, top_p, the chat template and that the rollout gets every update; correct the rest with"
        " rollout_correction (docs/mismatch.md).",
        (f"{DIFFERENCE} or {SAMPLE_SIZE}",),
        _mismatch,
        "0.1 nats, or 0.02 if it was a fifth of this at the beginning; bf16 alone causes about 0.01",
        logs=WINDOW,
    ),
)
