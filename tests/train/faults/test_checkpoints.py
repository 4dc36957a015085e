"""Checkpoints are complete whatever happens while they are written, and a resumed run equals an uninterrupted run."""

import filecmp
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import forks, tiny
from support.faults import runs
from support.faults.runs import build, losses
from transformers.trainer_utils import EvalLoopOutput

from vlmkernels.train.checkpoint import is_complete, last_complete_checkpoint, load_weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps that nothing interrupts, with checkpoints at steps 3, 6 and 9."""
    trainer = build(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def folders(run) -> list[str]:
    """Return the names of all checkpoint folders, including hidden ones."""
    return sorted(path.name for path in Path(run).iterdir() if "checkpoint" in path.name)


def weights(folder) -> dict[str, torch.Tensor]:
    model = tiny.vlm(seed=1)
    load_weights(model, folder)
    return model.state_dict()


def assert_same_run(resumed, whole, steps=range(1, 10)):
    one, other = losses(resumed), losses(whole)
    assert list(one) == list(steps)
    for step in steps:
        assert one[step] == pytest.approx(other[step], rel=1e-5, abs=1e-7)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_killed_at_every_file(server, tmp_path, whole):
    """The checkpoint of step 6 is written mid-batch. Until it is complete, the checkpoint of step 3 loads.

    While the checkpoint of step 6 is written again, one of step 6 loads at every moment.
    """
    assert forks.ended(forks.start(server, runs.seen_at_every_file, tmp_path), 120) == [0], (tmp_path / "output-0").read_text()
    first, again = json.loads((tmp_path / "events.json").read_text())
    files = ("model.safetensors", "optimizer.pt", "rng_state.pth", "experience_0.pt", "trainer_state.json", "vlmkernels.json")
    for name in (*files, "os.rename", "os.rmdir"):
        assert any(name in event for event in first), name
        assert any(name in event for event in again), name
    found = []
    for folder in [*(f"1-{event}" for event in range(len(first))), *(f"2-{event}" for event in range(len(again)))]:
        checkpoint = Path(last_complete_checkpoint(tmp_path / folder))
        found.append(int(checkpoint.name.rpartition("-")[2]))
        saved = Path(whole.args.output_dir, checkpoint.name)
        assert filecmp.cmp(checkpoint / "model.safetensors", saved / "model.safetensors", shallow=False)
    sealed = found.index(6)  # the last file is written, but the folder is not renamed yet
    assert "vlmkernels.json" in first[sealed - 1]
    assert found == [3] * sealed + [6] * (len(found) - sealed)
    for folder in ("1-0", f"1-{sealed}", f"2-{len(again) - 1}"):
        resumed = build(tmp_path / folder)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)
        assert not any(name.startswith(".") for name in folders(tmp_path / folder))


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (60_000, "SafetensorError: .*File too large"),  # writing the weights
        (600_000, "RuntimeError: .*"),  # torch.save of the optimizer state
    ],
)
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, whole, size, error):
    trainer = build(tmp_path)
    runs.limit_files(trainer, size)
    with pytest.raises(OSError, match=rf"checkpoint-6 could not be written \(({error}).* GiB are free\); .*checkpoint-3$"):
        trainer.train()
    assert folders(tmp_path) == ["checkpoint-3"]
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_a_full_disk_skips_one_checkpoint(tmp_path, whole):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    trainer = build(tmp_path, eval_data=tiny.rows(2), on_save_error="skip", **best)
    runs.limit_files(trainer, 60_000)
    rewards = iter([0.1, 0.9, 0.2])
    trainer.evaluation_loop = lambda *_, **__: EvalLoopOutput(None, None, {"eval_reward": next(rewards)}, 2)
    trainer.train()
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-9"]
    assert list(losses(trainer)) == list(range(1, 10))
    # The checkpoint of step 6 would have been the best.
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    for name, value in weights(tmp_path / "checkpoint-3").items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value)


def test_a_disk_that_is_full(tmp_path, whole):
    """A mounted disk of 2 MB, if this process may mount one; each checkpoint takes more than half of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in Path(whole.args.output_dir, "checkpoint-3").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        trainer = build(disk)
        with pytest.raises(OSError, match=r"checkpoint-6 could not be written .* 0.0 GiB are free\); .*checkpoint-3$"):
            trainer.train()
        assert folders(disk) == ["checkpoint-3"]
        assert is_complete(disk / "checkpoint-3")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_incomplete_checkpoints_do_not_count(tmp_path, whole):
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="resume_from_checkpoint must find a complete checkpoint in output_dir, got none in"):
        build(tmp_path).train(resume_from_checkpoint=True)
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "rng_state.pth").touch()
    (folder / "trainer_state.json").write_text('{"global_step": 7, "log_his')
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must be a complete checkpoint, got .*checkpoint-7"):
        build(tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / "trainer_state.json").write_text('{"global_step": 7}')  # as transformers.Trainer writes it
    assert last_complete_checkpoint(tmp_path) == str(folder)
    shutil.copytree(Path(whole.args.output_dir, "checkpoint-9"), tmp_path / "checkpoint-9")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    os.truncate(tmp_path / "checkpoint-9" / "optimizer.pt", 1000)
    assert last_complete_checkpoint(tmp_path) == str(folder)


def test_the_checkpoint_written_last_counts(tmp_path, whole, monkeypatch):
    """A higher step of an earlier run does not count. Another process may rename the folder at the same time."""
    for step in (9, 3):
        shutil.copytree(Path(whole.args.output_dir, f"checkpoint-{step}"), tmp_path / f"checkpoint-{step}")
    manifest = json.loads((tmp_path / "checkpoint-3" / "vlmkernels.json").read_text())
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    later = json.dumps(manifest | {"time": manifest["time"] + 3600})
    (tmp_path / "checkpoint-3" / "vlmkernels.json").write_text(later)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")

    partial = (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.partial")

    def meanwhile(folder):
        complete = is_complete(folder)
        if folder == partial and complete:  # another process renames it first
            folder.rename(tmp_path / "checkpoint-3")
        return complete

    monkeypatch.setattr("vlmkernels.train.checkpoint.is_complete", meanwhile)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_finished_run_takes_no_step(tmp_path, whole):
    shutil.copytree(Path(whole.args.output_dir, "checkpoint-9"), tmp_path / "checkpoint-9")
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    assert folders(tmp_path) == ["checkpoint-9"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size \* steps_per_generation must be 8, .*, got 4"),
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 4},
            "per_device_train_batch_size must be 4, .*, got 2",
        ),
        ({"temperature": 0.5}, "temperature must be 1.0, as when its batch was sampled, got 0.5"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must divide 2, .*, got 4"),
        ({"num_iterations": 1}, r"steps_per_generation \* num_iterations must be greater than 2, .*, got 2"),
    ],
)
def test_a_generation_batch_of_other_arguments_is_named(tmp_path, whole, options, message):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint .* was saved mid-batch: {message}"):
        build(tmp_path, **options).train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-6")))


def test_the_newest_and_the_best_are_kept(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 5, "load_best_model_at_end": True}
    trainer = build(tmp_path, eval_data=tiny.rows(2), save_total_limit=2, **best)
    rewards, kept = iter([0.1, 0.9, 0.2, 0.3, 0.4]), []
    trainer.evaluation_loop = lambda *_, **__: EvalLoopOutput(None, None, {"eval_reward": next(rewards)}, 2)
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *a: (save(*a), kept.append([name[-1] for name in folders(tmp_path)]))
    trainer.train()
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["2", "4"], ["2", "5"]]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")  # not the temporary folder


def test_lora_counts_once(tmp_path):
    from peft import LoraConfig

    options = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    whole = build(tmp_path / "whole", **options, max_steps=4, save_steps=2)
    names = [name for name, _ in whole.model.named_parameters()]
    whole.train()
    resumed = build(tmp_path / "whole", **options, max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [name for name, _ in resumed.model.named_parameters()] == names
    assert resumed.model.active_adapters == ["default"]
    assert_same_run(resumed, whole, range(1, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": 3, "vlmkernels": "9.0"},
            r"must have a format that vlmkernels .* can read, at most 2, got 3, written by vlmkernels 9.0",
        ),
        (
            {"format": 1, "vlmkernels": "0.0"},
            "was saved mid-batch in format 1 by vlmkernels 0.0: resume with that version, got .* batches of format 2",
        ),
        ({"model_type": "qwen3_vl"}, "must hold a model of type qwen2_5_vl, like the trained model, got qwen3_vl"),
    ],
)
def test_checkpoints_of_others_are_named(tmp_path, whole, change, message):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(Path(whole.args.output_dir, "checkpoint-3"), folder)
    manifest = json.loads((folder / "vlmkernels.json").read_text())
    (folder / "vlmkernels.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint .*checkpoint-3 {message}"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_that_do_not_fit_are_named(tmp_path, whole):
    from peft import LoraConfig

    folder = str(Path(whole.args.output_dir, "checkpoint-6"))

    def adapted(r):
        return build(tmp_path, peft_config=LoraConfig(r=r, target_modules=["q_proj"]), max_steps=3)

    with pytest.raises(ValueError, match="must hold LoRA adapters, like the trained model, got a checkpoint of a whole model"):
        adapted(4).train(resume_from_checkpoint=folder)
    adapted(4).train()
    with pytest.raises(ValueError, match=r"must have a parameter base_model.*lora_A.weight of shape \(8, 32\), got \(4, 32\)"):
        adapted(8).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="must hold a whole model, like the trained model, got a checkpoint of LoRA adapters"):
        build(tmp_path).train(resume_from_checkpoint=True)
    wider = build(tmp_path)
    wider.model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"must have a parameter lm_head.weight of shape \(60, 32\), got \(\d+, 32\)"):
        wider.train(resume_from_checkpoint=folder)
    for process in (1, 2):
        copy = tmp_path / f"of-{process + 1}"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        shutil.copy(copy / "experience_0.pt", copy / f"experience_{process}.pt")
    (copy / "vlmkernels.json").unlink()
    with pytest.raises(ValueError, match="was saved mid-batch by 2 processes: resume with 2, got 1"):
        build(tmp_path).train(resume_from_checkpoint=str(copy))
