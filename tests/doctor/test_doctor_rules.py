"""Every rule finds its fault in a synthetic history, and nothing in a healthy one that looks similar."""

import math
import random
import re
from statistics import fmean

import pytest
from support.histories import HEALTHY, group, history, ramp, stored
from support.simulated_runs import simulate

from vlmkernels.doctor import NOTE, PROBLEM, RULES, Finding, Run, diagnose, unchecked
from vlmkernels.doctor.history import Curve
from vlmkernels.doctor.rule import COMPLETIONS
from vlmkernels.doctor.trend import fit
from vlmkernels.record.metrics import describe


def found(run: Run) -> dict[str, Finding]:
    return {finding.rule: finding for finding in diagnose(run)}


def with_completions(completions, **changes) -> Run:
    run = history(**changes)
    run.completions = completions
    return run


def lost_at(step: int, before: float, after: float):
    return lambda now: before if now < step else after


def numbers(step: int, index: int) -> dict:
    """A group whose completions are different numbers of a prompt of its own."""
    key = f"{step}-{index}"
    return group([f"{7 * step + index + k}" for k in range(4)], [1.0, 0.0, 0.0, 1.0], f"user: {key}", reference=key)


def sevens(share: int):
    """Four prompts per step; in ``share`` of four completions the answer is 7, with different texts."""
    texts = [f"<think>{k}</think>7" if k < share else f"{k}" for k in range(4)]
    return lambda step, index: group(texts, prompt=f"user: {step}-{index}", reference=f"{index}")


def long_texts(step: int, index: int) -> dict:
    lengths = [4 * step * (1 + k) for k in range(8)]
    return group(["a" * n for n in lengths], [float(n) for n in lengths], f"user: {step}-{index}")


def long_equal_rewards(step: int, index: int) -> dict:
    lengths = [4 * step * (1 + (k * 3) % 8) for k in range(8)]
    return group(["a" * n for n in lengths], [float(k) for k in range(8)], f"user: {step}-{index}")


def loops(step: int, index: int) -> dict:
    text = "the cat sat on the mat " * 6 if step > 6 else "one two three four five six seven eight nine ten"
    return group([text] * 4, [1.0, 0.0, 0.0, 0.0], f"user: {step}-{index}")


def unmarked(share: int):
    """In ``share`` of four completions with reward 0, no answer is marked."""
    texts = ["it is 4" if k < share else "<answer>4</answer>" for k in range(4)]
    return lambda step, index: group(texts, prompt="user: write <answer>...</answer>")


# Rule -> (a run with the fault, the latest step at which it must be found, a similar run without it)
CASES = {
    "reward-flat": (history(120, seed=1, reward=0.3), 120, history(reward=ramp(0.3, 0.36))),
    "reward-saturated": (
        history(**{"reward": ramp(0.2, 1.0, 0, 30), "frac_reward_zero_std": ramp(0.2, 0.95, 0, 40)}),
        45,
        history(**{"reward": ramp(0.2, 1.0, 0, 30), "frac_reward_zero_std": ramp(0.2, 0.7, 0, 40)}),
    ),
    "groups-without-spread": (
        history(reward=0.01, frac_reward_zero_std=0.9),
        10,
        history(reward=0.01, frac_reward_zero_std=0.6),
    ),
    "reward-collapse": (
        history(reward=lambda step: 0.2 + 0.02 * step if step < 30 else 0.1),
        33,
        history(reward=lambda step: 0.2 + 0.02 * step if step < 30 else 0.7),
    ),
    "format-not-task": (
        history(**{"rewards/format/mean": ramp(0.1, 0.98, 0, 10), "rewards/format/std": 0.1, "rewards/accuracy/mean": 0.1}),
        40,
        history(**{"rewards/format/mean": ramp(0.1, 0.98, 0, 10), "rewards/format/std": 0.1}),
    ),
    "unparsed-as-zero": (
        history(**{"rewards/accuracy/unparsed": 0.4}),
        10,
        history(**{"rewards/accuracy/unparsed": ramp(0.6, 0.1, 0, 30)}),
    ),
    "reward-fails": (
        history(**{"rewards/accuracy/failed": lost_at(20, 0.0, 0.2)}),
        25,
        history(**{"rewards/accuracy/failed": lambda step: 0.3 if step == 20 else 0.0}),
    ),
    "length-explosion": (
        history(**{"completions/mean_length": ramp(50, 300, 10), "reward": 0.2}),
        25,
        history(**{"completions/mean_length": ramp(50, 300, 10)}),
    ),
    "length-collapse": (
        history(**{"completions/mean_length": ramp(50, 5, 10, 30), "reward": 0.2}),
        25,
        history(**{"completions/mean_length": ramp(50, 5, 10, 30)}),
    ),
    "truncation": (
        history(**{"completions/clipped_ratio": ramp(0.1, 0.8, 0, 20)}),
        12,
        history(**{"completions/clipped_ratio": ramp(0.5, 0.05, 0, 20)}),
    ),
    "reward-by-length": (
        history(**{"completions/mean_length": ramp(50, 300, 10), "reward_length_correlation": 0.7}),
        25,
        history(**{"completions/mean_length": ramp(50, 300, 10), "reward_length_correlation": 0.3}),
    ),
    "repetition": (
        history(**{"completions/frac_repeated": ramp(0.05, 0.9, 10, 30)}),
        25,
        history(**{"completions/frac_repeated": 0.5}),  # for example JSON, from the beginning
    ),
    "entropy-collapse": (
        history(entropy=ramp(1.0, 0.01, 5, 25), reward=0.2),
        30,
        history(entropy=ramp(1.0, 0.01, 5, 25)),
    ),
    "entropy-explosion": (
        history(entropy=ramp(0.5, 4.0, 5, 25), reward=0.2),
        20,
        history(entropy=ramp(0.5, 0.9, 5, 25), reward=0.2),
    ),
    "kl-runaway": (history(kl=ramp(0.0, 8.0), reward=0.2), 25, history(kl=ramp(0.0, 0.8), reward=0.2)),
    "ratio-out-of-bounds": (
        history(**{"clip_ratio/region_mean": 0.5}),
        5,
        history(**{"clip_ratio/region_mean": 0.15, "ratio/mean": 1.02}),
    ),
    "sampling-mismatch": (
        history(**{"sampling/sampling_logp_difference/mean": ramp(0.01, 0.2, 20)}),
        35,
        history(**{"sampling/sampling_logp_difference/mean": 0.04}),
    ),
    "one-answer": (with_completions(stored(sevens(4))), 3, with_completions(stored(sevens(2)))),
    "image-ignored": (history(**{"image_use/kl": 1e-4}), 2, history(**{"image_use/kl": 0.05})),
    "special-tokens": (
        history(**{"completions/frac_special_tokens": 0.1}),
        5,
        history(**{"completions/frac_special_tokens": lambda step: 0.002 * (step % 3)}),
    ),
    "updates-lost": (history(frac_weights_changed=0.003), 10, history(frac_weights_changed=ramp(0.0, 0.9, 0, 3))),
    "no-update": (history(learning_rate=0.0), 10, history(learning_rate=ramp(1e-5, 0.0))),
    "gradient-explosion": (
        history(grad_norm=ramp(1.0, 100.0, 10), reward=0.2),
        25,
        history(grad_norm=lambda step: 100.0 if step % 10 == 0 else 1.0, reward=0.2),  # single spikes
    ),
    "not-finite": (
        history(loss=lost_at(20, 0.01, math.nan)),
        20,
        history(grad_norm=lambda step: math.inf if step < 4 else 1.0),  # fp16 looks for its scale
    ),
    "data-repeated": (
        with_completions(stored(lambda step, index: group([f"{step}"] * 4, image="x", reference="1"))),
        3,
        with_completions(stored(lambda step, index: group([f"{step}"] * 4, image=f"{step}{index}", reference="1"))),
    ),
    "samples-replaced": (history(frac_samples_replaced=0.2), 5, history(frac_samples_replaced=0.01)),
    "tools-fail": (
        history(**{"tools/failure_frequency": 0.8}),
        10,
        history(**{"tools/failure_frequency": ramp(0.9, 0.1, 0, 20)}),
    ),
    "checkpoint-before-collapse": (history(reward=lost_at(30, 0.8, 0.1)), 35, history(reward=lost_at(30, 0.8, 0.6))),
}


def test_every_rule_has_a_case():
    assert [rule.name for rule in RULES] == list(dict.fromkeys(rule.name for rule in RULES))
    assert set(CASES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    faulty, latest, similar = CASES[name]
    finding = found(faulty)[name]
    assert 1 <= finding.step <= latest, finding
    assert finding.evidence.endswith(".")
    assert finding.remedy.endswith(".")
    assert name not in found(similar)


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_finding(seed):
    for noise in (0.0, 0.02, 0.2):
        run = history(150, noise, seed)
        run.completions = stored(numbers)
        assert diagnose(run) == []
        assert unchecked(run) == {}


def test_a_run_of_one_log_has_no_finding():
    run = history(1)
    assert diagnose(run) == []
    assert unchecked(run)["reward-flat"] == "reward has 1 of at least 10 logs"
    assert unchecked(Run())["reward-flat"] == "reward is not logged"
    assert unchecked(Run())["one-answer"] == "no completions are stored (log_completions=True)"


def test_problems_come_before_notes_and_in_order_of_steps():
    run = history(reward=lost_at(30, 0.8, 0.1), loss=lost_at(50, 0.01, math.nan), epoch=ramp(0.0, 100.0))
    findings = diagnose(run)
    assert [finding.severity for finding in findings] == sorted((f.severity for f in findings), key=[PROBLEM, NOTE].index)
    problems = [finding.step for finding in findings if finding.severity == PROBLEM]
    assert problems == sorted(problems)
    assert len(problems) > 1
    assert found(run)["data-repeated"].severity == NOTE  # many epochs


def test_findings_grow_with_a_run_in_training():
    complete = history(reward=lost_at(30, 0.8, 0.1))
    run = Run()
    first = None
    for entry in complete.steps:
        run.steps.append(entry)
        if first is None and "reward-collapse" in found(run):
            first = entry["step"]
    assert first == found(complete)["reward-collapse"].step == 32


def test_a_healed_run_has_no_finding():
    assert "truncation" not in found(history(**{"completions/clipped_ratio": lambda step: 0.6 if 10 < step < 30 else 0.02}))


def test_a_constant_reward_is_found_after_ten_logs():
    finding = found(history(10, 0.0, reward=0.5))["reward-flat"]
    assert finding.step == 10
    assert finding.evidence == "The reward is 0.5 in all 10 logs, which gives no direction to learn in."


def test_a_flat_reward_is_a_note_before_100_logs():
    severities = [found(history(num, seed=1, reward=0.3))["reward-flat"].severity for num in (60, 120)]
    assert severities == [NOTE, PROBLEM]
    resumed = history(240, seed=1, reward=0.3)
    resumed.steps = resumed.steps[120:]
    assert found(resumed)["reward-flat"].severity == NOTE  # an earlier start may have learned


def test_a_reward_whose_noise_hides_a_gain_is_a_note_that_says_when_it_would_be_visible():
    draw = random.Random(0)
    finding = found(history(120, reward=lambda step: draw.gauss(0.3, 0.1)))["reward-flat"]
    assert finding.severity == NOTE
    said = re.fullmatch(
        r"The reward went from \S+ to \S+ in 119 steps, a gain of \S+ \+- \S+: too early to say whether it rises\. With this"
        r" noise, a gain below (\S+) is not visible after 119 steps; one of 0\.045 would be after about (\d+)\.",
        finding.evidence,
    )
    visible, steps = map(float, said.groups())
    assert visible == pytest.approx(
        4.1 * 0.1 * 3.4 / 120**0.5, rel=0.3
    )  # the standard error is about 4 deviations / sqrt(logs)
    assert steps == pytest.approx(119 * (visible / 0.045) ** 2, rel=0.1)


@pytest.mark.parametrize(("rule", "end"), [("length-explosion", 200.0), ("length-collapse", 10.0)])
def test_a_length_may_change_before_it_can_be_said_whether_the_reward_rises(rule, end):
    draw, length = random.Random(0), {"completions/mean_length": ramp(50, end)}
    noisy = history(**length, reward=lambda step: draw.gauss(0.3, 0.1))
    assert found(noisy)[rule].severity == NOTE
    assert "checkpoint-before-collapse" not in found(noisy)
    assert found(history(**length, reward=ramp(0.3, 0.2)))[rule].severity == PROBLEM


def test_a_collapse_within_the_first_logs():
    assert found(history(12, reward=lost_at(3, 0.9, 0.001)))["reward-collapse"].step == 7


def test_a_sparse_reward_does_not_collapse():
    assert "reward-collapse" not in found(history(reward=lambda step: 0.25 if step in (3, 17, 18, 40) else 0.0))


def test_the_task_may_fall_while_the_format_is_learned():
    changes = {"rewards/format/mean": ramp(0.1, 0.98, 0, 10), "rewards/format/std": 0.1}
    assert found(history(20, **changes, **{"rewards/accuracy/mean": ramp(0.4, 0.0, 0, 15)}))["format-not-task"].step <= 20
    assert "format-not-task" not in found(history(20, **changes, **{"rewards/accuracy/mean": 0.1}))  # too early to say


def test_a_task_that_is_never_solved():
    changes = {"rewards/format/mean": ramp(0.1, 0.98, 0, 10), "rewards/format/std": 0.1}
    assert "format-not-task" in found(history(**changes, **{"rewards/accuracy/mean": 0.0, "rewards/accuracy/std": 0.0}))


@pytest.mark.parametrize("seed", range(3))
def test_a_task_may_rise_by_less_than_its_noise(seed):
    """The accuracy of 64 completions of 8 prompts, from 0.3 to 0.5, of a model that has the format from the beginning."""
    draw = random.Random(seed)
    changes = {"rewards/format/mean": ramp(0.9, 1.0), "rewards/format/std": 0.1}
    assert "format-not-task" not in found(
        history(**changes, **{"rewards/accuracy/mean": lambda s: draw.gauss(0.3 + s / 300, 0.09)})
    )


def test_a_task_without_progress_is_a_note_before_100_logs():
    changes = {"rewards/format/mean": 0.98, "rewards/format/std": 0.1, "rewards/accuracy/mean": 0.1}
    assert found(history(60, **changes))["format-not-task"].severity == NOTE
    assert found(history(110, **changes))["format-not-task"].severity == PROBLEM


def test_a_task_that_is_never_scored():
    changes = {"rewards/format/mean": 0.98, "rewards/format/std": 0.1}
    assert "format-not-task" not in found(history(**changes, **{"rewards/accuracy/mean": math.nan}))


def test_groups_that_dynamic_sampling_dropped_are_no_fault():
    changes = {"reward": 0.1, "frac_reward_zero_std": 0.9}
    assert "groups-without-spread" not in found(history(**changes, **{"dynamic_sampling/filled": 0.0}))
    assert "groups-without-spread" in found(history(**changes, **{"dynamic_sampling/filled": 0.9}))


def test_completions_of_one_token_are_not_truncated():
    changes = {"completions/mean_length": 1.0, "completions/clipped_ratio": 1.0}
    assert "truncation" not in found(history(noise=0, **changes))


def test_a_format_without_a_task_is_no_fault():
    run = history(**{"rewards/format/mean": 0.98, "rewards/format/std": 0.1, "rewards/accuracy/mean": None})
    assert "format-not-task" not in found(run)


@pytest.mark.parametrize("change", [{"ratio/mean": 1.3, "clip_ratio/region_mean": None}, {"ratio/mean": 0.7}])
def test_a_mean_ratio_far_from_1(change):
    assert found(history(**change))["ratio-out-of-bounds"].metric == "ratio/mean"


def test_an_image_that_matters_less_and_less_is_a_note():
    finding = found(history(**{"image_use/kl": ramp(2.0, 0.05, 0, 30)}))["image-ignored"]
    assert (finding.severity, finding.step) == (NOTE, pytest.approx(31, abs=2))


def test_a_small_effective_sample_size_is_a_note():
    run = history(**{"sampling/sampling_logp_difference/mean": None, "sampling/effective_sample_size": 0.2})
    assert found(run)["sampling-mismatch"].severity == NOTE


def test_the_learning_rate_ends_at_0():
    finding = found(history(learning_rate=ramp(1e-5, 0.0, 0, 40), grad_norm=0.5))["no-update"]
    assert finding.severity == NOTE
    assert found(history(grad_norm=0.0, reward=0.2))["no-update"].severity == PROBLEM
    assert found(history(grad_norm=ramp(1.0, 0.0, 0, 40)))["no-update"].severity == NOTE  # everything is learned


def test_skipped_steps():
    assert found(history(frac_steps_skipped=lambda step: 1.0 if step == 7 else 0.0))["not-finite"].severity == NOTE
    assert found(history(frac_steps_skipped=0.5))["not-finite"].severity == PROBLEM


def test_the_first_groups_have_no_gradient():
    assert "gradient-explosion" not in found(history(grad_norm=lost_at(10, 0.0, 0.5), reward=0.2))


def test_gradients_that_stay_infinite():
    assert found(history(grad_norm=lost_at(20, 1.0, math.inf)))["not-finite"].step == 20


def test_held_out_rewards_that_fall():
    changes = {"epoch": ramp(0.0, 5.0), "eval_reward": lambda step: 0.4 + 0.01 * min(step, 30) - 0.02 * max(step - 30, 0)}
    finding = found(history(noise=0.002, **changes))["data-repeated"]
    assert finding.severity == PROBLEM
    assert finding.step == pytest.approx(30, abs=3)
    assert "data-repeated" not in found(history(noise=0.002, **{**changes, "epoch": ramp(0.0, 1.0)}))


def test_the_newest_checkpoint_before_the_collapse():
    run = history(reward=lost_at(30, 0.8, 0.1))

    def evidence(checkpoints: list[int]) -> str:
        run.checkpoints = checkpoints
        finding = found(run)["checkpoint-before-collapse"]
        assert finding.severity == NOTE
        return finding.evidence

    first = "The first sign of reward-collapse is at step 28; "  # of the window of 5 logs at whose end it was found
    assert evidence([10, 20, 30, 40]) == first + "the last checkpoint before is checkpoint-20."
    assert evidence([30, 40]) == first + "no checkpoint before is left; the oldest one is checkpoint-30."
    assert evidence([]) == first + "there is no checkpoint."


def test_example_of_a_finding():
    run = with_completions(stored(sevens(4)))
    example = found(run)["one-answer"].example
    assert (example.step, example.completion, example.references) == (2, "<think>0</think>7", {"answer": "0"})
    assert found(run)["one-answer"].as_json()["example"] == {
        "step": 2, "prompt": "user: 2-0", "completion": "<think>0</think>7", "rewards": {"accuracy": 0.0},
        "references": {"answer": "0"},
    }  # fmt: skip


NOTHING_LOGGED = {
    "completions/frac_repeated": None,
    "completions/frac_special_tokens": None,
    "reward_length_correlation": None,
    "rewards/accuracy/unparsed": None,
}


@pytest.mark.parametrize(
    ("name", "faulty", "similar"),
    [
        ("reward-by-length", long_texts, long_equal_rewards),
        ("repetition", loops, lambda step, index: group(["the cat sat on the mat " * 6] * 4, prompt=f"user: {step}-{index}")),
        (
            "special-tokens",
            lambda step, index: group(["a <|image_pad|>", "b"]),
            lambda step, index: group(["<image of a cat>"]),
        ),
        ("unparsed-as-zero", unmarked(3), unmarked(1)),
        ("unparsed-as-zero", unmarked(4), lambda *_: group(["4"] * 4, prompt="user: Answer: in one word")),
    ],
)
def test_rules_read_completions_if_the_metric_is_not_logged(name, faulty, similar):
    finding = found(with_completions(stored(faulty), **NOTHING_LOGGED))[name]
    assert 1 <= finding.step <= 12
    assert finding.example is not None
    assert name not in found(with_completions(stored(similar), **NOTHING_LOGGED))


def test_one_answer_of_a_balanced_choice():
    def choice(texts):
        return stored(lambda step, index: group(texts, prompt=f"user: {step}-{index}", reference=("yes", "no")[index % 2]))

    assert "one-answer" in found(with_completions(choice(["Yes", "yes ", "\\boxed{yes}", "The answer is: yes"])))
    assert "one-answer" not in found(with_completions(choice(["yes", "yes", "yes", "no"])))


def test_empty_completions():
    run = with_completions(stored(lambda step, index: group([" "] * 4, prompt=f"user: {step}", reference=f"{step}{index}")))
    assert found(run)["one-answer"].evidence == "100% of the completions of 12 prompts are empty."


def test_one_answer_without_references():
    """Equal answers with different rewards show that the references differ."""
    right = stored(lambda step, index: group(["7"] * 4, [float(index == 0)] * 4, f"user: {step}-{index}"))
    assert "one-answer" in found(with_completions(right))
    equal = stored(lambda step, index: group(["7"] * 4, [1.0] * 4, f"user: {step}-{index}"))
    assert "one-answer" not in found(with_completions(equal))


def test_prompts_whose_images_are_not_stored_are_not_compared():
    rows = stored(lambda step, index: {**group(["a"] * 4, prompt="user: [image]"), "images_missing": True})
    assert "data-repeated" not in found(with_completions(rows))


def test_steps_that_train_on_one_batch_do_not_repeat_prompts():
    """With num_iterations or steps_per_generation above 1."""
    rows = stored(lambda step, index: group(["a"] * 4, image=f"{step // 3}{index}", reference="1"))
    assert "data-repeated" not in found(with_completions(rows))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "NaN", True])
def test_values_that_are_not_numbers(value):
    """Values that cannot be compared are left out, for every metric."""
    run = history(20)
    for entry in run.steps[::2]:
        entry |= {name: value for name in entry if name != "step"}
    assert set(found(run)) <= {"not-finite"}
    for entry in run.steps:
        entry |= {name: value for name in entry if name != "step"}
    assert set(found(run)) <= {"not-finite"}


def test_noise_of_a_curve_ignores_trend_and_jumps():
    steps = list(range(100))
    assert Curve(steps, [float(step) for step in steps]).noise == pytest.approx(1.05, abs=0.01)
    alternating = [0.1 * (-1) ** step + (10.0 if step >= 50 else 0.0) for step in steps]
    assert Curve(steps, alternating).noise == pytest.approx(0.21, abs=0.01)
    assert Curve([1], [0.3]).noise == 0.0
    assert Curve(steps, [1.0] * 99 + [2.0]).noise == pytest.approx(0.009, abs=0.001)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_a_gain_is_visible_as_often_as_stated(correlation):
    """Few curves without a gain rise, and four of five with the detectable gain, also if neighbors deviate together."""
    draw = random.Random(0)

    def values(gain: float) -> list[float]:
        noise = [draw.gauss(0, 1)]
        for _ in range(79):
            noise.append(correlation * noise[-1] + math.sqrt(1 - correlation**2) * draw.gauss(0, 1))
        return [gain * step / 79 + value for step, value in enumerate(noise)]

    without = [fit(range(80), values(0.0)) for _ in range(200)]
    assert sum(bool(trend.rising) for trend in without) <= 10
    gain = fmean(trend.detectable for trend in without)
    assert 150 <= sum(bool(fit(range(80), values(gain)).rising) for _ in range(200)) <= 195
    assert not any(fit(range(80), values(gain)).excludes(gain) for _ in range(200))


def test_windows_grow_with_the_run():
    assert [Curve([], [0.0] * n).width for n in (3, 100, 400, 5000)] == [5, 5, 20, 50]


@pytest.mark.parametrize(("every", "least", "logs"), [(1, 5, 10), (2, 3, 6), (3, 2, 4), (10, 2, 4), (100, 2, 4)])
def test_windows_have_five_steps_and_two_logs(every, least, logs):
    curve = Curve([every * number for number in range(1, 30)], [0.0] * 29)
    assert (curve.every, curve.least, curve.logs(10), curve.logs(2)) == (every, least, logs, 2)


def test_noise_of_few_logs_is_increased():
    assert Curve([10, 20, 30, 40], [1.0, 2.0, 1.0, 2.0]).noise == pytest.approx(3 * 1.4826 / math.sqrt(2))


def test_a_gradient_of_0_because_no_group_has_spread_is_a_note():
    changes = {"grad_norm": 0.0, "reward": 0.2, "frac_reward_zero_std": 1.0}
    assert found(history(noise=0.0, **changes))["no-update"].severity == NOTE


def test_rules_read_metrics_that_are_logged():
    needed = {name for rule in RULES for need in rule.needs for name in need.split(" or ")} - {COMPLETIONS}
    simulated = {name for entry in simulate(0, reward="several").steps for name in entry} - {"step"}
    for name in needed | simulated | HEALTHY.keys():
        assert describe(name.replace("*", "x")) is not None, name
