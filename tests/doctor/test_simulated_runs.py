"""How often rules find a problem in simulated runs without a fault, and in runs that do not learn."""

from collections import Counter
from dataclasses import replace

import pytest
from support.simulated_runs import GROUP_SIZES, LOGGING_STEPS, grid, simulate

from vlmkernels.doctor import NOTE, PROBLEM, Finding, Run, diagnose

RUNS = range(20)


def until(run: Run, logs: int) -> Run:
    """The run as it is after this many logs."""
    steps = run.steps[:logs]
    completions = {step: groups for step, groups in run.completions.items() if step <= steps[-1]["step"]}
    return replace(run, steps=steps, completions=completions)


def found(run: Run) -> dict[str, Finding]:
    return {finding.rule: finding for finding in diagnose(run)}


def problems(run: Run, ends: tuple[int, ...]) -> set[str]:
    """The rules that find a problem after some numbers of logs."""
    return {finding.rule for end in ends for finding in diagnose(until(run, end)) if finding.severity == PROBLEM}


def test_every_rule_finds_a_problem_in_at_most_one_of_60_healthy_runs():
    settings = grid()
    assert len(settings) == 180
    counts, runs = Counter(), Counter()
    for setting in settings:
        rules = problems(simulate(**setting), (15, 30, 60))
        counts.update(rules)
        runs[bool(rules)] += 1
    assert runs[True] <= 3, counts


@pytest.mark.parametrize("logging_steps", LOGGING_STEPS)
def test_small_batches_of_pairs(logging_steps):
    """Groups of 2 often have equal rewards by chance."""
    rates = [0.1 + 0.04 * number for number in RUNS]
    runs = [simulate(number, 2, rate, logging_steps=logging_steps, prompts=4) for number, rate in zip(RUNS, rates, strict=True)]
    assert sum(bool(problems(run, (20, 40, 60))) for run in runs) <= 1


@pytest.mark.parametrize("logging_steps", LOGGING_STEPS)
def test_a_reward_that_has_been_learned_may_stay(logging_steps):
    runs = [simulate(seed, 8, 0.3, logging_steps=logging_steps, logs=150, gain=3.0, pace=0.03) for seed in RUNS]
    assert sum(bool(problems(run, (110, 150))) for run in runs) == 0


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_reward_near_its_best_value_is_a_note(group_size):
    rules = Counter()
    for seed in RUNS:
        run = simulate(seed, group_size, 0.98, logs=150, gain=0.0, is_trl=seed % 2 == 0)
        findings = diagnose(run)
        assert {finding.severity for finding in findings} <= {NOTE}
        rules.update(finding.rule for finding in findings)
    assert rules["reward-flat"] >= 0.4 * len(RUNS)


@pytest.mark.parametrize("logging_steps", LOGGING_STEPS)
@pytest.mark.parametrize("reward", ["binary", "graded"])
def test_a_reward_that_never_rises_is_a_problem(reward, logging_steps):
    """After 100 steps, or 30 logs if they are the mean of many steps."""
    logs = max(100 // logging_steps, 30)
    runs = [simulate(seed, 8, 0.3, reward, logging_steps, logs=logs, gain=0.0) for seed in RUNS]
    severities = [found(run)["reward-flat"].severity for run in runs if "reward-flat" in found(run)]
    assert set(severities) == {PROBLEM}
    assert len(severities) >= 0.6 * len(RUNS)


@pytest.mark.parametrize("logging_steps", LOGGING_STEPS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_prompts_that_are_too_hard(group_size, logging_steps):
    runs = [simulate(seed, group_size, 0.002, logging_steps=logging_steps, logs=20, gain=0.0) for seed in RUNS]
    assert sum("groups-without-spread" in problems(run, (20,)) for run in runs) >= 0.9 * len(RUNS)


@pytest.mark.parametrize(("logging_steps", "step"), [(1, 10), (2, 12), (5, 20), (10, 40)])
def test_windows_count_steps(logging_steps, step):
    """With many steps per log, four logs are enough."""
    run = simulate(0, logging_steps=logging_steps, logs=20, clipped=0.7)
    assert found(run)["truncation"].step == step
