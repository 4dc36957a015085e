"""Rules about the optimizer, the data and the checkpoints."""

import math

from vlmkernels.doctor.history import WINDOW, Curve, Run
from vlmkernels.doctor.rule import CHECKPOINTS, COMPLETIONS, NOTE, PROBLEM, Evidence, Rule
from vlmkernels.doctor.rules import lengths, policy, rewards
from vlmkernels.doctor.texts import context, example, groups_of, most_common, recent, since
from vlmkernels.record.html import short

CHANGED = "frac_weights_changed"
FINITE = ("loss", "policy_loss", "grad_norm", "reward", "entropy", "kl")  # metrics that are always numbers in a sound run
MANY_EPOCHS = 20
COLLAPSES = ("reward-collapse", "entropy-collapse", "entropy-explosion", "length-collapse", "length-explosion", "kl-runaway")


def _lost_updates(run: Run) -> Evidence | None:
    rate = run.curve("learning_rate")
    at = dict(zip(rate.steps, rate.values, strict=True))
    highest = max(rate.values, default=0.0)
    # A small learning rate in warm-up and at the end changes few weights.
    logs = [
        (step, value) for step, value in zip(*_columns(run.curve(CHANGED)), strict=True) if at.get(step, highest) >= highest / 2
    ]
    share = Curve([step for step, _ in logs], [value for _, value in logs])
    if (step := share.since(lambda value, _: value < 0.5, WINDOW)) is None:
        return None
    text = f"An optimizer step changes {share.window():.1%} of the weights that have a gradient, at a learning rate of"
    return Evidence(step, f"{text} {short(highest)}.", CHANGED, share.window(), 1.0)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return curve.steps, curve.values


def _no_update(run: Run) -> Evidence | None:
    for name, what in (("learning_rate", "The learning rate"), ("grad_norm", "The norm of the gradient")):
        curve = run.curve(name)
        if (step := curve.since(lambda value, _: value == 0)) is not None and len(curve):
            text = f"{what} has been 0 since step {step}."
            is_end = name == "learning_rate" and max(curve.values) > 0  # a schedule that reached 0
            return Evidence(step, text, name, 0.0, severity=NOTE if is_end else PROBLEM)
    return None


def _gradient_explosion(run: Run) -> Evidence | None:
    norm = run.curve("grad_norm")
    start, noise = norm.start, norm.noise
    step = norm.since(lambda value, step: value >= 10 * start > 0 and value - start > 3 * noise and not run.improved(step))
    if step is None:
        return None
    text = f"The norm of the gradient rose from {short(start)} to {short(norm.window())}, and the reward did not rise."
    return Evidence(step, text, "grad_norm", norm.window(), start)


def _not_finite(run: Run) -> Evidence | None:
    for entry in run.steps:
        for name in FINITE:
            value = entry.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                return Evidence(entry["step"], f"{name} is {value} at step {entry['step']}.", name)
        if (skipped := entry.get("frac_steps_skipped") or 0.0) > 0:
            text = (
                f"{skipped:.0%} of the steps up to step {entry['step']} were skipped because a loss or gradient was not finite."
            )
            return Evidence(entry["step"], text, "frac_steps_skipped", skipped)
    return None


def _replaced(run: Run) -> Evidence | None:
    name = "frac_samples_replaced"
    share = run.curve(name)
    if (step := share.since(lambda value, _: value >= 0.05, WINDOW)) is None:
        return None
    return Evidence(step, f"{share.window():.0%} of the prompts replaced a row that cannot be used.", name, share.window())


def _tools_fail(run: Run) -> Evidence | None:
    name = "tools/failure_frequency"
    share = run.curve(name)
    if (step := share.since(lambda value, _: value >= max(0.5, 0.8 * share.start))) is None:
        return None
    shown = example(run, step, lambda row: str(row.row.get("turns", "")).count("'error'"))
    return Evidence(step, f"{share.window():.0%} of the tool calls fail.", name, share.window(), share.start, shown)


def _repeated_data(run: Run) -> Evidence | None:
    return _overfitted(run) or _equal_prompts(run) or _many_epochs(run)


def _overfitted(run: Run) -> Evidence | None:
    for name in run.names("eval_*reward"):
        held_out, epoch = run.curve(name), run.curve("epoch")
        if len(held_out) < 6 or not len(epoch) or epoch.values[-1] < 2:
            continue
        best = max(range(len(held_out)), key=held_out.values.__getitem__)
        last = held_out.window()
        if (
            len(held_out) - best > WINDOW
            and held_out.values[best] - last > 4 * held_out.noise
            and run.improved(held_out.steps[-1])
        ):
            text = f"{name} fell from {short(held_out.values[best])} to {short(last)}, while the reward of training rose; epoch"
            text = f"{text} {epoch.values[-1]:.1f}."
            return Evidence(held_out.steps[best], text, name, last, held_out.values[best])
    return None


def _equal_prompts(run: Run) -> Evidence | None:
    """Compare the prompts, with their images, of a few stored steps."""

    def share(steps: list[int]) -> float:
        contexts = [found for group in groups_of(run, steps) if (found := context(group)) is not None]
        return 1 - len(set(contexts)) / len(contexts) if len(contexts) >= 6 and _epochs(run, steps) < 1 else 0.0

    if not (steps := since(run, lambda steps: share(steps) >= 0.5)):
        return None
    window = next(recent(run))
    contexts = [found for group in groups_of(run, window) if (found := context(group)) is not None]
    (prompt, *_), _ = most_common(contexts)
    text = f"{len(contexts)} prompts of steps {window[0]} to {window[-1]} are {len(set(contexts))} different ones."
    shown = example(run, steps[-1], lambda row: row.group["prompt"] == prompt)
    return Evidence(steps[-1], text, None, share(window), example=shown)


def _epochs(run: Run, steps: list[int]) -> float:
    """Return the number of passes over the data between the first and the last of some steps; 0 if it is not logged."""
    epoch = run.curve("epoch")
    first, last = (epoch.count(step) for step in (steps[0], steps[-1]))
    return epoch.values[last - 1] - epoch.values[first - 1] if first else 0.0


def _many_epochs(run: Run) -> Evidence | None:
    epoch = run.curve("epoch")
    above = [step for step, value in zip(*_columns(epoch), strict=True) if value >= MANY_EPOCHS]
    if not above:
        return None
    text = f"The run has passed over its prompts {short(epoch.values[-1])} times."
    return Evidence(above[0], text, "epoch", epoch.values[-1], severity=NOTE)


def _old_checkpoint(run: Run) -> Evidence | None:
    rules = [rule for rule in (*rewards.RULES, *lengths.RULES, *policy.RULES) if rule.name in COLLAPSES]
    findings = [finding for rule in rules if (finding := rule.finding(run))]
    if not findings:
        return None
    first = min(findings, key=lambda finding: finding.step)
    sound = [step for step in run.checkpoints if step < first.step]
    if sound:
        lost = run.steps[-1]["step"] - sound[-1]
        text = (
            f"{first.rule} began at step {first.step}; the newest checkpoint before it is checkpoint-{sound[-1]}, {lost} steps"
        )
        return Evidence(first.step, f"{text} before the end.", first.metric, sound[-1], first.step, severity=NOTE)
    text = (
        f"{first.rule} began at step {first.step}, and the oldest checkpoint that is left is checkpoint-{run.checkpoints[0]}."
    )
    return Evidence(first.step, text, first.metric, run.checkpoints[0], first.step)


RULES = (
    Rule(
        "updates-lost",
        "most weights do not change in an optimizer step, because they are in bf16 and the learning rate is small",
        "Load the model in float32 (model_init_kwargs={'dtype': 'float32'}) and compute in bf16 (bf16=True), or train LoRA"
        " adapters.",
        (CHANGED,),
        _lost_updates,
        "half of the weights, in steps with at least half the highest learning rate",
        logs=WINDOW,
    ),
    Rule(
        "no-update",
        "the learning rate or the gradient is 0",
        "Check learning_rate, warmup_steps and lr_scheduler_type; with a gradient of 0, see groups-without-spread.",
        ("learning_rate or grad_norm",),
        _no_update,
        "exactly 0 in most logs of a window",
    ),
    Rule(
        "gradient-explosion",
        "the norm of the gradient is ten times that at the beginning, and the reward did not rise",
        "Lower learning_rate or max_grad_norm.",
        ("grad_norm",),
        _gradient_explosion,
        "ten times the norm at the beginning, and three standard deviations of its noise",
    ),
    Rule(
        "not-finite",
        "a loss, gradient or reward is NaN or infinite",
        "Compute in bf16 instead of fp16, lower learning_rate, and check the values that the rewards return; on_nonfinite='skip'"
        " skips such steps.",
        ("loss or grad_norm or reward",),
        _not_finite,
        "any such value",
        logs=1,
    ),
    Rule(
        "data-repeated",
        "prompts repeat within a few steps, there were many epochs, or held-out rewards fall while training rewards rise",
        "Remove equal rows from the dataset and use more prompts; stop at the best evaluation (load_best_model_at_end=True).",
        (f"epoch or {COMPLETIONS}",),
        _repeated_data,
        f"half of the prompts of three stored steps, {MANY_EPOCHS} epochs, or four standard deviations of the held-out reward",
        logs=1,
    ),
    Rule(
        "samples-replaced",
        "rows of the dataset cannot be used, and others replace them",
        "Look at the warnings about these rows, and correct the dataset or max_prompt_length.",
        ("frac_samples_replaced",),
        _replaced,
        "one of twenty prompts",
        logs=WINDOW,
    ),
    Rule(
        "tools-fail",
        "most calls of tools fail, and their number does not fall",
        "Describe the arguments of the tools in their docstrings, increase tool_timeout, and look at the errors in the example.",
        ("tools/failure_frequency",),
        _tools_fail,
        "half of the calls, and no less than 0.8 of the share at the beginning",
    ),
    Rule(
        "checkpoint-after-collapse",
        "the run collapsed; which checkpoint is older than the collapse",
        "Resume from the named checkpoint (resume_from_checkpoint) with other settings. If none is left, save more often"
        " (save_steps) and keep more of them (save_total_limit).",
        (CHECKPOINTS,),
        _old_checkpoint,
        f"the first step of {', '.join(COLLAPSES)}",
    ),
)
