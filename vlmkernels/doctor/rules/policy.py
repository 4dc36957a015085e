"""Rules about the policy: entropy, KL divergence, ratios, and the mismatch of training and rollout."""

from vlmkernels.doctor.completions import example
from vlmkernels.doctor.history import WINDOW, Run
from vlmkernels.doctor.rule import NOTE, Evidence, Rule
from vlmkernels.doctor.rules.common import changed
from vlmkernels.record.html import short

DIFFERENCE = "sampling/sampling_logp_difference/mean"
SAMPLE_SIZE = "sampling/effective_sample_size"
CLIPPED = "clip_ratio/region_mean"
RATIO = "ratio/mean"


def _kl(run: Run) -> Evidence | None:
    kl, entropy = run.curve("kl"), run.curve("entropy")
    scale = max(entropy.start if len(entropy) else 0.0, 0.5)
    # Completions of the reference have about this cross-entropy under the reference; those of the policy have kl + entropy.
    step = kl.since(
        lambda value, step: (
            value >= scale and value + entropy.at(step, scale) >= 2 * scale and (value >= 10 * scale or not run.improved(step))
        )
    )
    if step is None:
        return None
    text = f"The KL divergence from the reference is {short(kl.window())} nats per token; the entropy at first was"
    return Evidence(
        step,
        f"{text} {short(scale)}: the reference would hardly write these completions.",
        "kl",
        kl.window(),
        scale,
        example(run, step, lambda row: -row.advantage),
    )


def _ratio(run: Run) -> Evidence | None:
    clipped, ratio = run.curve(CLIPPED), run.curve(RATIO)
    if (step := clipped.since(lambda value, _: value >= 0.3, WINDOW)) is not None:
        return Evidence(
            step,
            f"{clipped.window():.0%} of the tokens are clipped, and have no gradient.",
            CLIPPED,
            clipped.window(),
            clipped.start,
        )
    if (step := ratio.since(lambda value, _: abs(value - 1) >= 0.1, WINDOW)) is not None:
        text = f"The mean probability ratio to the policy that sampled is {short(ratio.window())}; its expected value is 1."
        return Evidence(step, text, RATIO, ratio.window(), 1.0)
    return None


def _mismatch(run: Run) -> Evidence | None:
    difference, size = run.curve(DIFFERENCE), run.curve(SAMPLE_SIZE)
    limit = min(0.1, max(0.02, 5 * difference.start)) if len(difference) else 0.1
    if (step := difference.since(lambda value, _: value >= limit, WINDOW)) is not None:
        text = "Log-probabilities of the sampled tokens differ between rollout and training by"
        text = f"{text} {short(difference.window())} on average: another policy is sampled than is trained."
        return Evidence(step, text, DIFFERENCE, difference.window(), difference.start)
    if (step := size.since(lambda value, _: value <= 0.5, WINDOW)) is not None:
        text = f"The effective sample size is {size.window():.0%} of the completions: few of them have most of the weight."
        return Evidence(step, text, SAMPLE_SIZE, size.window(), size.start, severity=NOTE)
    return None


RULES = (
    Rule(
        "entropy-collapse",
        "the entropy fell to a fifth, and no rise of the reward is visible",
        "Set epsilon_high above epsilon, lower learning_rate, raise temperature, or set entropy_coef > 0.",
        ("entropy",),
        changed("entropy", 0.2, "The entropy {} nats per token", lambda row: row.advantage),
        "a fifth of the entropy at the beginning; Cui et al. (arXiv 2505.22617): reward is traded for entropy",
    ),
    Rule(
        "entropy-explosion",
        "the entropy doubled, and no rise of the reward is visible",
        "Lower learning_rate, epsilon_high or entropy_coef, or set beta > 0.",
        ("entropy",),
        changed("entropy", 2, "The entropy {} nats per token", lambda row: -row.advantage, least=0.5),
        "twice the entropy at the beginning, and 0.5 nats more, so that a token has 1.6 times as many choices",
    ),
    Rule(
        "kl-runaway",
        "the policy has left the reference, and no rise of the reward is visible",
        "Increase beta, or lower learning_rate.",
        ("kl",),
        _kl,
        "under the reference, completions are twice as improbable (in nats) as its own: KL + entropy >= 2 x entropy at the"
        " beginning, which counts as at least 0.5",
    ),
    Rule(
        "ratio-out-of-bounds",
        "many tokens are clipped, or the mean probability ratio is not 1",
        "Lower learning_rate, num_iterations or steps_per_generation.",
        (f"{CLIPPED} or {RATIO}",),
        _ratio,
        "three of ten tokens (GSPO, arXiv 2507.18071, clips up to 0.15 in sound runs); 0.1 from the expected value 1",
        steps=WINDOW,
    ),
    Rule(
        "sampling-mismatch",
        "rollout and training compute different log-probabilities of the same tokens",
        "Check that both use the same temperature, top_p and chat template, and that the rollout gets every update. Correct"
        " what remains with rollout_correction.",
        (f"{DIFFERENCE} or {SAMPLE_SIZE}",),
        _mismatch,
        "0.1 nats, or five times the difference at the beginning if this is above 0.02; half of the completions",
        steps=WINDOW,
    ),
)
