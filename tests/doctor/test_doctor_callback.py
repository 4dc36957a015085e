"""The rules of the doctor during training."""

import pytest
import trl
from datasets import Dataset
from support import tiny
from support.training import FixedGenerate, config
from transformers import TrainerState, TrainingArguments

from vlmkernels.doctor import NOTE, PROBLEM, Finding, callback
from vlmkernels.doctor.callback import FIRST, LAST, DoctorCallback
from vlmkernels.train import GRPOTrainer


@pytest.fixture
def said(monkeypatch):
    """What the callback logs, with the level."""
    found = []
    for level in ("warning", "info"):
        record = lambda text, *values, level=level: found.append((level, text % values))  # noqa: E731
        monkeypatch.setattr(callback.logger, level, record)
    return found


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def letters(completions, **kwargs):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def trainer_of(folder, reward, **options) -> GRPOTrainer:
    args = config(folder, gradient_accumulation_steps=1, diagnose=True, **options)
    trainer = GRPOTrainer(tiny.vlm(), reward, args, tiny.rows(24), processing_class=tiny.processor())
    trainer.engine = FixedGenerate(trainer)
    return trainer


def test_a_run_warns_once_and_not_again_when_it_resumes(tmp_path, said):
    options = {"save_strategy": "steps", "save_steps": 12}
    trainer_of(tmp_path, constant, max_steps=12, **options).train()
    assert any(level == "warning" and "groups-without-spread" in text for level, text in said)
    assert said[0][1].startswith("step 10: ")
    assert len({text.split(": ")[1] for _, text in said}) == len(said)  # no rule twice
    said.clear()
    trainer_of(tmp_path, constant, max_steps=14, **options).train(resume_from_checkpoint=True)
    assert not said


def test_a_healthy_run_is_silent(tmp_path, said):
    trainer = trainer_of(tmp_path, letters, max_steps=3)
    trainer.train()
    assert not said
    assert [entry["step"] for entry in doctor_of(trainer).run.steps] == [1, 2, 3, 3]  # the last one is the summary
    groups = doctor_of(trainer).run.completions[3]
    assert [len(group["completions"]) for group in groups] == [4]


def doctor_of(trainer) -> DoctorCallback:
    return next(found for found in trainer.callback_handler.callbacks if isinstance(found, DoctorCallback))


def test_trl_runs_are_checked_too(tmp_path, said):
    options = {"gradient_accumulation_steps": 1, "max_steps": 11, "log_completions": True, "use_cpu": True}
    args = config(tmp_path, cls=trl.GRPOConfig, **options)
    doctor, data = DoctorCallback(), Dataset.from_list([{"prompt": "hello", "answer": "x"}] * 24)
    trl.GRPOTrainer(tiny.text_model(), constant, args, data, processing_class=tiny.tokenizer(), callbacks=[doctor]).train()
    assert doctor.found["groups-without-spread"] == 10
    assert any("groups-without-spread" in text for _, text in said)
    assert max(doctor.run.completions) == 11
    assert [len(group["completions"]) for group in doctor.run.completions[11]] == [4]


@pytest.fixture
def logged(tmp_path):
    """A function that logs an entry to a callback, on the main process or another one."""
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(stateful_callbacks=[])

    def log(doctor: DoctorCallback, is_main: bool = True, **metrics) -> TrainerState:
        state.is_world_process_zero, state.global_step = is_main, state.global_step + 1
        state.log_history.append({"loss": 0.0, "step": state.global_step, **metrics})
        doctor.on_log(args, state, None)
        return state

    return log


def test_what_is_said_and_by_whom(logged, said, monkeypatch):
    def finding(rule, severity):
        return Finding(rule, 1, "Evidence.", None, "Remedy.", severity)

    found = [finding("length explodes", NOTE)]
    monkeypatch.setattr(callback, "diagnose", lambda run: found)
    doctor = DoctorCallback()
    logged(doctor, is_main=False)
    assert not said
    logged(doctor)
    found.append(finding("image ignored", PROBLEM))
    state = logged(doctor)
    assert said == [
        ("info", "step 2: length explodes: Evidence. Remedy."),
        ("warning", "step 3: image ignored: Evidence. Remedy."),
    ]
    assert doctor.found == state.stateful_callbacks[callback.STATE_KEY] == {"length explodes": 2, "image ignored": 3}


def test_long_runs_keep_their_first_and_last_logs(logged, monkeypatch):
    monkeypatch.setattr(callback, "diagnose", lambda run: [])
    groups = [{"prompt": "", "images": [], "references": {}, "completions": []}]
    doctor = DoctorCallback(lambda: groups)
    for _ in range(FIRST + LAST + 30):
        logged(doctor)
    last = FIRST + LAST + 30
    assert [entry["step"] for entry in doctor.run.steps] == [*range(1, FIRST + 1), *range(last - LAST + 1, last + 1)]
    assert sorted(doctor.run.completions) == [1, 2, 3, *range(last - callback.LAST_STORED + 1, last + 1)]
