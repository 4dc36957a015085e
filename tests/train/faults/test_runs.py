"""A run in which a process dies, a sample cannot be read, a number is not finite, or a reward hangs."""

import itertools
import json
import logging
import re
import threading
import time

import pytest
import torch
from support import forks, tiny
from support.faults import runs
from support.faults.runs import build, losses

from vlmkernels.rewards import Rewards, calls
from vlmkernels.train.faults import MAX_SKIPPED


@pytest.fixture(scope="module")
def two(server, tmp_path_factory):
    """The reports of two processes; see ``runs.what_two_do``."""
    folder = tmp_path_factory.mktemp("two")
    codes = forks.ended(forks.start(server, runs.what_two_do, folder, world=2), 120)
    assert codes == [0, 0], (folder / "output-0").read_text()[-3000:] + (folder / "output-1").read_text()[-3000:]
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("disk raises", *2 * [r"OSError: .*checkpoint-4 could not be written \(process 1: RuntimeError.*checkpoint-2$"]),
        ("loss", *2 * ["FloatingPointError: step 2: process 1: not finite: the loss, kl$"]),
        (
            "image raises",
            "RuntimeError: process 1 stopped at the completions of step .: ValueError: train_dataset: sample 2: images",
            "ValueError: train_dataset: sample 2: images",
        ),
        ("newer", *2 * ["ValueError: resume_from_checkpoint .* must have a format that vlmkernels"]),
    ],
)
def test_a_fault_of_one_process_stops_all_by_name(two, name, here, there):
    assert re.match(here, two[0][name]["error"])
    assert re.match(there, two[1][name]["error"])


def test_a_fault_of_one_process_is_skipped_by_all(two):
    report = two[0]
    for step, log in report["whole"]["losses"].items():
        assert report["disk"]["losses"][step] == pytest.approx(log, rel=1e-5, abs=1e-7)
    skipped = [log["frac_steps_skipped"] for log in report["loss skipped"]["losses"].values()]
    assert skipped == [0, 1]
    assert report["image"]["losses"]["1"]["frac_samples_replaced"] == 0.25  # one of four samples: two processes read two each


def test_survivors_of_a_killed_process_end_and_say_why(server, tmp_path, two):
    """No launcher terminates the survivors. Afterwards two processes resume from the last checkpoint."""
    processes = forks.start(server, runs.train_and_die, tmp_path, 1, 3, runs.SHORT, world=2)
    assert forks.ended(processes, 60) == [1, -9]
    report = (tmp_path / "output-0").read_text()
    assert f"process 0 stops: process 1 (pid {processes[1].pid}) has ended or cannot be reached" in report
    assert forks.ended(forks.start(server, runs.train, tmp_path, runs.SHORT, world=2), 60) == [0, 0]
    resumed = json.loads((tmp_path / "losses-0.json").read_text())
    assert list(resumed) == ["1", "2", "3", "4", "5"]
    for step, log in two[0]["whole"]["losses"].items():
        assert resumed[step] == pytest.approx(log, rel=1e-5, abs=1e-7)


# Samples


def bad_rows() -> list[dict]:
    """The pixels of sample 1 and the header of sample 3 cannot be read."""
    rows = tiny.rows(6, "one")
    return [rows[0], runs.corrupt(rows[1]), rows[2], {**rows[3], "image": b"no image"}, *rows[4:]]


def test_a_corrupt_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="sample 3: image cannot be read: cannot identify image file"):
        build(tmp_path, data=bad_rows())
    with pytest.raises(ValueError, match=r"sample 1: images\[0\] cannot be read: image file is truncated"):
        build(tmp_path, data=bad_rows()[:3], save_strategy="no").train()


def test_a_corrupt_image_that_the_dataset_decodes_is_named(tmp_path):
    import datasets

    rows = [
        {"prompt": row["prompt"], "image": {"bytes": row["images"][0], "path": None}} for row in map(runs.corrupt, tiny.rows(3))
    ]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(mode="RGB"))
    with pytest.raises(ValueError, match=r"sample \d: cannot be read: image file is truncated"):
        build(tmp_path, data=data, rewards=[runs.brevity]).train()


def test_another_sample_takes_the_place_of_one_that_cannot_be_read(tmp_path, caplog):
    seen = []

    def watch(completions, prompts, **kwargs):
        seen.append(tuple(dict.fromkeys(prompt[0]["content"] for prompt in prompts)))
        return [len(c[0]["content"]) for c in completions]

    options = {"on_bad_sample": "skip", "num_iterations": 1, "steps_per_generation": 1, "max_steps": 6, "save_strategy": "no"}
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, data=bad_rows(), eval_data=bad_rows(), rewards=[watch], shuffle_dataset=False, **options)
        trainer.train()
    assert seen == [(f"what is {index}?",) for index in (0, 2, 2, 4, 4, 5)]
    assert [log["frac_samples_replaced"] for log in losses(trainer).values()] == [0, 1, 0, 1, 0, 0]
    assert "1 of 6 samples are not used (on_bad_sample='skip'); the first: train_dataset: sample 3" in caplog.text
    assert "sample 1: images[0] cannot be read: image file is truncated; using the next sample instead" in caplog.text
    del seen[:]
    trainer.control.should_evaluate = True
    evaluated = trainer.evaluation_loop(trainer.get_eval_dataloader(), "")
    assert evaluated.num_samples == 4  # samples that replace others do not count twice
    other = trainer.get_eval_dataloader(tiny.rows(6, "one"))  # row 3 of this dataset can be read
    assert [sample.index for rows in other for _, sample in rows] == list(range(6))


def test_a_dataset_that_cannot_be_read_at_all_stops_the_run(tmp_path):
    rows = [runs.corrupt(row) for row in tiny.rows(2)]
    with pytest.raises(ValueError, match="train_dataset must have a sample that can be read, got train_dataset: sample"):
        build(tmp_path, data=rows, on_bad_sample="skip").train()
    with pytest.raises(ValueError, match="eval_dataset must have a sample that can be read, got eval_dataset: sample"):
        build(tmp_path, eval_data=rows, on_bad_sample="skip").evaluate()


# Numbers


def test_the_parameters_whose_gradients_are_not_finite_are_named(tmp_path):
    trainer = build(tmp_path, save_strategy="no")
    runs.spoil_gradient(trainer, [1], "model.language_model.norm.weight")
    with pytest.raises(FloatingPointError, match=r"^step 2: gradients not finite: model.language_model.norm.weight$"):
        trainer.train()
    trainer = build(tmp_path, save_strategy="no")
    runs.spoil_loss(trainer, [2])
    with pytest.raises(FloatingPointError, match=r"^step 3: not finite: the loss, kl$"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_is_skipped_changes_nothing(tmp_path, max_grad_norm):
    options = {"on_nonfinite": "skip", "save_strategy": "no", "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm}
    trainer, states = build(tmp_path, **options, max_steps=3), []
    runs.spoil_gradient(trainer, [1], "model.language_model.norm.weight")
    log = trainer.log

    def keep(logs, *arguments):
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        states.append([x.clone() for x in [*trainer.model.parameters(), *moments]])
        log(logs, *arguments)

    trainer.log = keep
    trainer.train()
    assert [entry["frac_steps_skipped"] for entry in losses(trainer).values()] == [0, 1, 0]
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(states)]
    assert same[:2] == [True, False]
    assert all(x.isfinite().all() for x in states[-1])


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", max_steps=20, save_strategy="no")
    runs.spoil_loss(trainer, range(20), always=True)
    with pytest.raises(
        FloatingPointError, match=f"^step {MAX_SKIPPED + 1}, after 10 skipped steps in a row: not finite: the loss"
    ):
        trainer.train()


# Rewards


def test_a_reward_that_hangs(tmp_path):
    calls = []

    def hangs(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            threading.Event().wait()
        return [0.5] * len(completions)

    hanging = {"name": hangs, "timeout": 1.0}
    with pytest.raises(
        RuntimeError, match=r"reward hangs failed for completion 2 of sample \d: TimeoutError: no result within 1.0 s"
    ):
        build(tmp_path, rewards=[hanging], save_strategy="no").train()
    calls.clear()
    trainer = build(tmp_path, rewards=[{**hanging, "on_error": "skip"}, runs.brevity], save_strategy="no", max_steps=1)
    trainer.train()
    assert losses(trainer)[1]["rewards/hangs/failed"] == 0.125


def test_a_reward_without_a_timeout_that_does_not_return_is_named(monkeypatch, caplog):
    monkeypatch.setattr(calls, "WARN_AFTER_S", 0.02)

    def slow(completions, **kwargs):
        while caplog.text.count("has not returned") < 2:
            time.sleep(0.001)
        return [0.0]

    with caplog.at_level(logging.WARNING):
        Rewards(slow)(1, completions=["a"])
    assert "reward slow has not returned after 0.02 s; set its timeout to limit the call" in caplog.text
    assert "reward slow has not returned after 0.04 s" in caplog.text


@pytest.mark.parametrize("name", ["on_save_error", "on_bad_sample", "on_nonfinite"])
def test_unknown_choices_raise(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be one of raise, skip, got 'ignore'"):
        build(tmp_path, **{name: "ignore"})
