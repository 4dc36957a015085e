"""Runs with tools that resume, within a batch and after they were killed while a tool ran."""

import signal

import pytest
import torch
from support import forks, tool_runs
from support.tool_models import tool_model
from support.tool_pools import eventually, is_alive
from support.tool_runs import logs_of, resumable, texts

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made():
    return tool_model("qwen2_5_vl")


def batches_of(seen):
    """Prompts, conversations and token ids of each batch."""
    rows = []
    for call in seen.calls:
        prompts = [texts(prompt) if isinstance(prompt[0]["content"], str) else len(prompt) for prompt in call["prompts"]]
        rows.append((prompts, [texts(messages) for messages in call["completions"]], call["completion_ids"]))
    return rows


def assert_equal(one, other):
    """Two values of nested containers are equal bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """Runs that nothing interrupts, by what draws numbers: their folders, batches, logs and what each step was trained on."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for how in ("tools", "environment"):
        trainer, seen, steps = resumable(folder, made, how)
        trainer.train()
        runs[how] = folder / how, batches_of(seen), logs_of(trainer), steps
    return runs


def same_numbers(one, other):
    """Equal logs but for times, up to rounding: which trajectories share a step of sampling depends on how long tools take."""
    names = [name for name in one if not any(part in name for part in ("time", "per_second", "seconds"))]
    assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("how", ["tools", "environment"])
def test_a_checkpoint_within_a_batch_restores_it_and_the_next_batch_repeats(made, whole, tmp_path, how):
    folder, batches, logs, expected = whole[how]
    assert len(batches) == 3
    assert len({str(batch) for batch in batches}) == 3
    trainer, seen, steps = resumable(tmp_path, made, how)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert_equal(steps[4].state_dict(), expected[4].state_dict())
    assert steps[4].rollout.turns.inputs.num_images.any()
    assert batches_of(seen) == batches[2:]
    for one, other in zip(logs_of(trainer)[3:], logs[3:], strict=True):
        same_numbers(one, other)


def test_a_run_that_is_killed_while_a_tool_runs_repeats_the_batch(made, whole, server, tmp_path):
    """Its processes end with it."""
    _, batches, logs, _ = whole["tools"]
    torch.save(made, tmp_path / "made.pt")
    (killed,) = forks.start(server, tool_runs.hang, tmp_path)
    assert eventually(lambda: (tmp_path / "running").exists() and (tmp_path / "running").read_text(), 240)
    killed.kill()
    killed.join()
    worker = int((tmp_path / "running").read_text())
    assert killed.exitcode == -signal.SIGKILL
    assert eventually(lambda: not is_alive(worker))
    (tmp_path / "hang").unlink()
    trainer, seen, _ = resumable(tmp_path, made, "tools")
    trainer.train(resume_from_checkpoint=True)
    assert batches_of(seen) == batches[2:]
    for one, other in zip(logs_of(trainer)[4:], logs[4:], strict=True):
        same_numbers(one, other)
