"""How often rules find a problem in simulated runs without a fault, and in runs that do not learn."""

from collections import Counter
from dataclasses import replace

import pytest
from support.simulated_runs import GROUP_SIZES, LOGGING_STEPS, REWARDS, grid, simulate

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


# Runs that are healthy, but of which too little is seen to say that they learn
HARD_TO_SEE = {
    "slow": {},
    "slow, large batch": {"prompts": 64, "group_size": 16},
    "slow, many steps": {"logging_steps": 10, "logs": 150},
    "slow, longer": {"length": 2.5},
    "slow, shorter": {"length": 0.4},
    "slow, entropy falls": {"entropy": 0.3},
    "slow, resumed": {"resumed": 0.5, "logs": 200},
    "slow, image use falls": {"image_use": 0.1},
    "drifting difficulty": {"gain": None, "drift": 0.3},
    "learned in the first steps": {"gain": 3.0, "pace": 0.03},
}


@pytest.mark.parametrize("name", HARD_TO_SEE)
def test_runs_that_learn_slowly_have_no_problem(name):
    setting = {"group_size": 8, "logs": 110, "gain": 0.3, **HARD_TO_SEE[name]}
    runs = [simulate(seed, rate=0.1 + 0.04 * seed, reward=REWARDS[seed % 3], **setting) for seed in RUNS]
    assert sum(bool(problems(run, (60, len(run.steps)))) for run in runs) <= 1


def test_a_reward_that_never_rises_is_a_problem_once_a_gain_is_excluded():
    """With a small batch, this takes much longer than 100 steps."""
    counts = []
    for prompts in (8, 128):
        runs = [simulate(seed, 8, 0.3, prompts=prompts, logs=300, gain=0.0, wander=0.0) for seed in RUNS[:8]]
        severities = [found(run)["reward-flat"].severity for run in runs if "reward-flat" in found(run)]
        assert len(severities) >= 7
        counts.append(severities.count(PROBLEM))
    assert counts[0] == 0
    assert counts[1] >= 5


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
