"""The files that a run writes to its output_dir, and the metrics in them."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support import tiny
from support.recorded_runs import build, complete_run, log_entries
from support.training import config, length_reward, lora
from transformers import TrainerControl, TrainerState

from vlmkernels import grpo_loss
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import LOSSES
from vlmkernels.record import completions
from vlmkernels.record.callback import RunRecord, json_line, json_value
from vlmkernels.record.metrics import METRICS, PHASES, describe, is_summary, markdown
from vlmkernels.record.progress import RewardProgress
from vlmkernels.train import GRPOConfig, GRPOTrainer, mismatch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    return complete_run(folder), folder


def test_metrics_equal_the_log(run):
    trainer, folder = run
    found = log_entries(folder)
    assert "eval_reward" in found[0]  # logged before training, which resets the trainer's own log
    assert found[0]["step"] == 0
    assert found[1:] == json.loads(json.dumps(trainer.state.log_history))
    assert [entry["step"] for entry in found if "loss" in entry] == [1, 2, 3, 4]


def test_run_json(run):
    about = json.loads((run[1] / "run.json").read_text())
    assert (about["from_step"], about["max_steps"], about["processes"]) == (0, 4, 1)
    assert about["model"]["parameters"] == sum(p.numel() for p in tiny.vlm().parameters())
    assert about["model"]["shares prefix"] is True
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"beta", "num_iterations", "learning_rate"} < set(about["changed"])
    assert not {"temperature", "top_p", "hub_token", "accelerator_config", "report_to"} & set(about["changed"])


def test_secrets_are_not_recorded(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), hub_token="hf_secret", model_init_kwargs={"token": "hf_secret"}, use_cpu=True)
    RunRecord().on_train_begin(args, TrainerState(is_world_process_zero=True), TrainerControl(), model=tiny.vlm())
    assert "hf_secret" not in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize(
    ("key", "value", "recorded"),
    [
        ("url", "https://user:pa@ss@judge.example/v1", "https://hidden@judge.example/v1"),
        ("url", "https://judge.example/v1?api_key=abc&n=1", "https://judge.example/v1?api_key=hidden&n=1"),
        ("url", "http://judge.example:80/a@b", "http://judge.example:80/a@b"),
        ("urls", ["https://u:p@h"], ["https://hidden@h"]),
        ("api_key", ["abc"], ["hidden"]),
        ("headers", {"Authorization": "Bearer abc"}, {"Authorization": "hidden"}),
        ("eos_token_id", 3, 3),
    ],
)
def test_secrets_in_values_are_not_recorded(key, value, recorded):
    assert json_value({key: value}) == {key: recorded}


def test_a_resumed_run_has_each_step_once(tmp_path):
    """Entries after the checkpoint are removed, including a half-written line."""
    options = {"save_strategy": "steps", "save_steps": 2, "log_completions": True}
    build(tmp_path, max_steps=3, **options).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 0.1, "st')
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert set(completions.stored_steps(tmp_path / "completions")) == {1, 2, 3}
    resumed = build(tmp_path, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert log_entries(tmp_path) == json.loads(json.dumps(resumed.state.log_history))
    assert [entry["step"] for entry in log_entries(tmp_path) if "loss" in entry] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run.json").read_text())["from_step"] == 2

    assert json.loads((tmp_path / "previous" / "1" / "run.json").read_text())["max_steps"] == 3
    superseded = (tmp_path / "previous" / "1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded[:-1]] == [3, 3]  # the last line is the half-written one
    assert set(completions.stored_steps(tmp_path / "previous" / "1" / "completions")) == {3}


def test_no_start_removes_the_files_of_an_earlier_one(tmp_path):
    """Three runs in one folder, of different numbers of steps."""
    logs = {}
    for steps in (3, 2, 1):
        trainer = build(tmp_path, max_steps=steps, log_completions=True)
        trainer.evaluate()  # writes a line before training begins
        trainer.train()
        logs[steps] = log_entries(tmp_path)
        assert [entry["step"] for entry in logs[steps] if "loss" in entry] == list(range(1, steps + 1))
        assert "eval_reward" in logs[steps][0]
    for number, steps in {"previous/1": 3, "previous/2": 2, ".": 1}.items():
        folder = tmp_path / number
        assert log_entries(folder) == logs[steps]
        assert json.loads((folder / "run.json").read_text())["max_steps"] == steps
        assert list(completions.stored_steps(folder / "completions")) == list(range(1, steps + 1))
        assert len(list((folder / "completions").glob("*.html"))) == steps


def test_starts_that_were_killed_or_resumed_keep_every_line(tmp_path):
    """Evaluations before training are not in the log of a checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 1}
    killed = build(tmp_path, max_steps=2, **options)
    killed.evaluate()
    killed.evaluate()
    killed.train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    build(tmp_path, max_steps=2, **options).evaluate()  # a start that did not train
    resumed = build(tmp_path, max_steps=3, **options)
    resumed.evaluate()
    resumed.train(resume_from_checkpoint=True)
    build(tmp_path, max_steps=1, **options).train()

    def steps(folder):
        return [(entry["step"], "eval_reward" in entry) for entry in log_entries(folder)]

    assert steps(tmp_path / "previous" / "1") == [(0, True), (0, True), (2, False), (2, False), (0, True)]
    assert steps(tmp_path / "previous" / "2") == [(0, True), (1, False), (2, False), (3, False), (3, False)]
    assert steps(tmp_path) == [(1, False), (1, False)]


def test_run_json_describes_data_rewards_and_adapters(tmp_path):
    rewards = [{"name": "soft_overlong", "weight": 0.5, "max_length": 6, "cache": 2}, length_reward]
    arguments = {"processing_class": tiny.processor(), "peft_config": lora()}
    GRPOTrainer(tiny.vlm(), rewards, config(tmp_path), Dataset.from_list(tiny.rows(6, "none")), **arguments).train()
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["dataset"]["rows"] == 6
    assert about["dataset"]["fingerprint"]
    assert about["eval_dataset"] is None
    assert [(reward["name"], reward["weight"]) for reward in about["rewards"]] == [
        ("soft_overlong", 0.5),
        ("length_reward", 1.0),
    ]
    assert about["rewards"][0]["options"] == {"max_length": 6, "cache": 2}
    assert about["rewards"][1]["function"] == "support.training:length_reward"
    assert about["adapters"]["default"]["r"] == 4
    assert about["adapters"]["default"]["target_modules"] == ["q_proj", "v_proj"]


def test_lines_are_json_whatever_is_logged():
    entry = {"step": 3, "loss": math.nan, "grad_norm": math.inf, "text": 'a"\nü', "none": None}
    assert json.loads(json_line(entry), parse_constant=pytest.fail) == entry | {"loss": "NaN", "grad_norm": "Infinity"}
    assert json_line(entry).count("\n") == 1


def test_every_metric_is_described(run):
    names = {name for entry in log_entries(run[1]) for name in entry} - {"step"}
    assert [name for name in names if describe(name) is None and not is_summary(name)] == []
    assert {f"time/{name}" for name in PHASES} < names
    assert describe("eval_easy_rewards/cer/mean").name == "rewards/*/mean"
    assert describe("eval_loss") is None
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_metrics_of_every_objective_are_described(loss_type):
    logps, advantages = -torch.rand(2, 3), torch.tensor([1.0, -1.0])
    known = GRPOLossConfig(loss_type=loss_type, beta=0.1, rollout_correction="token_mask", max_completion_length=3)
    others = {"old_logps": logps - 0.1, "ref_logps": logps, "rollout_logps": logps, "entropy": -logps}
    names = [*grpo_loss(logps, advantages, **others, config=known).metrics]
    names += mismatch.metrics(dict.fromkeys(mismatch.COLUMNS, 1.0), known)
    assert {"ratio/mean", "kl", "entropy", "sampling/kept_mass/min", "sampling/effective_sample_size"} < set(names)
    assert [name for name in names if describe(name) is None] == []


def test_documentation_has_the_metrics():
    text = (ROOT / "docs" / "observability.md").read_text()
    shown = re.search(r"<!-- table: metrics -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)[1]
    assert shown.splitlines() == markdown(), "run: python bench/tables.py"


def test_progress_shows_reward_and_speed(capsys):
    bar, shown = RewardProgress(), []
    bar.training_bar, bar.shown = SimpleNamespace(set_postfix=lambda values: shown.append(dict(values))), {}
    bar.on_log(None, None, None, logs={"reward": 0.5, "tokens_per_second": 12345.6, "loss": 1.0, "kl": None})
    bar.on_log(None, None, None, logs={"eval_reward": 0.75})
    assert shown[-1] == {"reward": "0.5", "tok/s": "12,346", "eval": "0.75"}
