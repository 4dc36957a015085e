"""Rules about the optimizer, the data, the tools and the checkpoints."""

from typing import Any

from vlmkernels.doctor.completions import context, example, groups_of, most_common, recent, since
from vlmkernels.doctor.history import LARGE, WINDOW, Curve, Run, is_finite, is_number
from vlmkernels.doctor.rule import COMPLETIONS, NOTE, PROBLEM, Evidence, Rule
from vlmkernels.doctor.rules import lengths, policy, rewards
from vlmkernels.doctor.rules.common import changed, large_share
from vlmkernels.record.html import short

CHANGED = "frac_weights_changed"
FINITE = ("loss", "policy_loss", "reward", "entropy", "kl", "grad_norm")
MANY_EPOCHS = 20
COLLAPSES = ("reward-collapse", "entropy-collapse", "entropy-explosion", "length-collapse", "length-explosion", "kl-runaway")


def _lost_updates(run: Run) -> Evidence | None:
    rates, shares = run.curve("learning_rate"), run.curve(CHANGED)
    highest = max(rates.values, default=0.0)
    # A small learning rate, during warm-up and at the end, changes few weights.
    at_step = dict(zip(rates.steps, rates.values, strict=True))
    counted = [log for log in zip(shares.steps, shares.values, strict=True) if at_step.get(log[0], highest) >= highest / 2]
    share = Curve([step for step, _ in counted], [value for _, value in counted])
    if (step := share.since(lambda value, _: value < 0.5, WINDOW)) is None:
        return None
    text = f"An optimizer step changes {share.window():.1%} of the weights that have a gradient; the learning rate is"
    return Evidence(step, f"{text} {short(highest)}: the other updates are rounded away.", CHANGED, share.window(), 1.0)


def _no_update(run: Run) -> Evidence | None:
    for name, what in (("learning_rate", "The learning rate"), ("grad_norm", "The norm of the gradient")):
        curve = run.curve(name)
        if (step := curve.since(lambda value, _: value == 0)) is not None:
            # The end of a schedule, or of what there is to learn; or no group has spread, about which there is another rule.
            is_end = max(curve.values) > 0 if name == "learning_rate" else run.improved(step) or _lacks_spread(run)
            return Evidence(
                step,
                f"{what} is 0 in most logs, and the weights do not change.",
                name,
                0.0,
                severity=NOTE if is_end else PROBLEM,
            )
    return None


def _lacks_spread(run: Run) -> bool:
    """Whether no group had spread in the last logs in which the gradient is 0."""
    logs = [entry for entry in run.steps if entry.get("grad_norm") == 0][-WINDOW:]
    return bool(logs) and all(entry.get(rewards.ZERO_SPREAD) == 1 for entry in logs)


def _not_finite(run: Run) -> Evidence | None:
    for name in FINITE:
        steps = [entry["step"] for entry in run.steps if is_number(entry.get(name)) and not is_finite(entry[name])]
        # In fp16, the first gradients overflow until the scale of the loss is found.
        if steps and (name != "grad_norm" or sum(step in steps for step in _logged(run, name)[-WINDOW:]) > WINDOW / 2):
            return Evidence(steps[0], f"{name} is not finite in {len(steps)} logs, first at step {steps[0]}.", name)
    name = "frac_steps_skipped"
    skipped = run.curve(name)
    if (step := next((step for step, value in zip(skipped.steps, skipped.values, strict=True) if value > 0), None)) is None:
        return None
    text = f"Steps were skipped because a loss or gradient was not finite: {max(skipped.values):.0%} of those of a log."
    return Evidence(step, text, name, max(skipped.values), severity=PROBLEM if skipped.window() > 0 else NOTE)


def _logged(run: Run, name: str) -> list[int]:
    return [entry["step"] for entry in run.steps if name in entry]


def _overfitted(run: Run) -> Evidence | None:
    epoch = run.curve("epoch")
    for name in run.names("eval_*reward"):
        held_out = run.curve(name)
        if len(held_out) <= WINDOW or epoch.at(held_out.steps[-1], 0.0) < 2 or not run.improved(held_out.steps[-1]):
            continue
        best = max(range(len(held_out)), key=held_out.values.__getitem__)
        top, last = held_out.values[best], held_out.window()
        least = max(4 * held_out.noise, (top - held_out.start) / 2, LARGE * run.spread("reward"))
        if len(held_out) - best > WINDOW and top - last > least:
            text = f"{name} fell from {short(top)} to {short(last)} while the reward of training rose"
            return Evidence(held_out.steps[best], f"{text}; epoch {short(epoch.values[-1])}.", name, last, top)
    return None


def _equal_prompts(run: Run) -> Evidence | None:
    def contexts(steps: list[int]) -> list[tuple[Any, ...]]:
        found = [context(group) for group in groups_of(run, steps)]
        return [value for value in found if value is not None]

    def holds(steps: list[int]) -> bool:
        found, passes = contexts(steps), epoch.at(steps[-1], 0.0) - epoch.at(steps[0], 0.0)
        return len(found) >= 6 and len(set(found)) <= len(found) / 2 and passes < 1

    epoch = run.curve("epoch")
    if not (steps := since(run, holds)):
        return None
    window = next(recent(run))
    found = contexts(window)
    (prompt, *_), share = most_common(found)
    text = f"Steps {window[0]} to {window[-1]} have {len(found)} prompts, but only {len(set(found))} distinct ones"
    text = f"{text}: the model sees few tasks, often."
    return Evidence(steps[-1], text, None, share, example=example(run, steps[-1], lambda row: row.group["prompt"] == prompt))


def _many_epochs(run: Run) -> Evidence | None:
    epoch = run.curve("epoch")
    step = next((step for step, value in zip(epoch.steps, epoch.values, strict=True) if value >= MANY_EPOCHS), None)
    if step is None:
        return None
    text = f"The run has passed over its prompts {short(epoch.values[-1])} times."
    return Evidence(step, text, "epoch", epoch.values[-1], severity=NOTE)


def _old_checkpoint(run: Run) -> Evidence | None:
    rules = [rule for rule in (*rewards.RULES, *lengths.RULES, *policy.RULES) if rule.name in COLLAPSES]
    findings = [found for rule in rules if (found := rule.finding(run)) and found.severity == PROBLEM]
    if not findings:
        return None
    first = min(findings, key=lambda finding: finding.step)
    curve = run.curve(first.metric or "reward")
    began = curve.steps[max(0, curve.count(first.step) - curve.width)]  # of the first window in which the rule holds
    newest = max((step for step in run.checkpoints if step < began), default=None)
    if newest is not None:
        last = f"the last checkpoint before is checkpoint-{newest}"
    elif run.checkpoints:
        last = f"no checkpoint before is left; the oldest one is checkpoint-{run.checkpoints[0]}"
    else:
        last = "there is no checkpoint"
    text = f"The first sign of {first.rule} is at step {began}; {last}."
    return Evidence(first.step, text, first.metric, newest, severity=NOTE)


RULES = (
    Rule(
        "updates-lost",
        "most weights do not change in an optimizer step: bf16 weights with a small learning rate",
        "Load the model in float32 (model_init_kwargs={'dtype': 'float32'}) and compute in bf16 (bf16=True), or train LoRA"
        " adapters.",
        (CHANGED,),
        _lost_updates,
        "half of the weights with a gradient, in steps with at least half of the highest learning rate",
        steps=WINDOW,
    ),
    Rule(
        "no-update",
        "the learning rate or the gradient is 0",
        "Check learning_rate, warmup_steps and lr_scheduler_type. If the gradient is 0, see groups-without-spread.",
        ("learning_rate or grad_norm",),
        _no_update,
        "the median of a window is exactly 0",
    ),
    Rule(
        "gradient-explosion",
        "the norm of the gradient is ten times that at the beginning, and no rise of the reward is visible",
        "Lower learning_rate or max_grad_norm.",
        ("grad_norm",),
        changed("grad_norm", 10, "The norm of the gradient {}"),
        "ten times the norm at the beginning",
    ),
    Rule(
        "not-finite",
        "a loss, gradient or reward is NaN or infinite, or steps were skipped for it",
        "Compute in bf16 instead of fp16, lower learning_rate, and check the values that the rewards return.",
        ("loss or grad_norm or reward",),
        _not_finite,
        "any such value; for gradients most of a window, because fp16 overflows at the beginning",
        steps=0,
    ),
    Rule(
        "data-repeated",
        "prompts repeat within an epoch, held-out rewards fall while training rewards rise, or there were many epochs",
        "Remove equal rows from the dataset, use more prompts, or stop at the best evaluation (load_best_model_at_end=True).",
        (f"epoch or {COMPLETIONS}",),
        lambda run: _equal_prompts(run) or _overfitted(run) or _many_epochs(run),
        "half of the prompts of three stored steps; half of the gain on held-out prompts, four standard deviations of its"
        f" noise and {LARGE} of the rewards of completions; {MANY_EPOCHS} epochs",
        steps=1,
    ),
    Rule(
        "samples-replaced",
        "rows of the dataset cannot be used, and others replace them",
        "Look at the warnings about these rows; correct the dataset, or increase max_prompt_length.",
        ("frac_samples_replaced",),
        large_share(
            "frac_samples_replaced",
            0.05,
            "{share} of the prompts replaced a row that cannot be used, and are trained on more often.",
        ),
        "one of twenty prompts",
        steps=WINDOW,
    ),
    Rule(
        "tools-fail",
        "most calls of tools fail, and their number does not fall",
        "Describe the arguments in the docstrings of the tools, look at the errors of the calls, and increase tool_timeout.",
        ("tools/failure_frequency",),
        large_share(
            "tools/failure_frequency",
            0.5,
            "{share} of the tool calls fail, so that the model hardly learns to use the results.",
            lambda row: -row.total,
            kept=0.8,
        ),
        "half of the calls, and at least 0.8 times the share at the beginning",
    ),
    Rule(
        "checkpoint-before-collapse",
        "the run collapsed; names the last checkpoint before",
        "Resume from this checkpoint (resume_from_checkpoint) with other settings. If none is left, set save_steps lower and"
        " save_total_limit higher.",
        (f"reward or entropy or kl or {lengths.LENGTH}",),
        _old_checkpoint,
        f"the first of {', '.join(COLLAPSES)}",
        steps=WINDOW + 2,
    ),
)
