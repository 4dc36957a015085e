"""What a run records of itself, and the page made of it: whole, running, killed, resumed, and not a run at all."""

import html.parser
import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support import tiny
from test_trainer import FixedGenerate, config, fixed_completions, length_reward, vowel_reward
from transformers import TrainerControl, TrainerState

from vlmkernels import cli, grpo_loss
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import LOSSES
from vlmkernels.record import completions
from vlmkernels.record.callback import RunRecord, line
from vlmkernels.record.completions import Row
from vlmkernels.record.metrics import METRICS, PHASES, describe, is_summary, markdown
from vlmkernels.record.phases import Phases
from vlmkernels.report.curves import MOST_POINTS, Point, curve, thin
from vlmkernels.report.run import read_lines
from vlmkernels.record import phases
from vlmkernels.train import GRPOConfig, GRPOTrainer, mismatch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


def build(folder, images="one", fixed=True, model=None, **options):
    """4 completions a micro-batch, of one prompt; 2 micro-batches a step."""
    args = config(folder, **options)
    data = tiny.rows(6, images)
    trainer = GRPOTrainer(
        model or tiny.vlm(), [length_reward, vowel_reward], args, data, data[:2], processing_class=tiny.processor()
    )
    if fixed:
        trainer.generate = FixedGenerate(trainer)
    return trainer


def lines(folder) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything in it: reference, two iterations, evaluation, checkpoints, completions."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = build(folder, "mixed", save_strategy="steps", log_completions=True, **options)
    trainer.evaluate()
    trainer.train()
    return trainer, folder


class Parser(html.parser.HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "input", "path", "circle", "polyline", "polygon", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(folder, capsys) -> tuple[str, Parser]:
    assert cli.main(["report", str(folder)]) == 0
    output = Path(capsys.readouterr().out.strip())
    assert output == folder / "report.html"
    parser = Parser()
    parser.feed(output.read_text())
    assert parser.open == []
    assert all(value.startswith("data:image/") for value in parser.loads)
    assert "url(" not in output.read_text()
    return output.read_text(), parser


# What a run leaves


def test_metrics_are_those_of_the_log(run):
    trainer, folder = run
    found = lines(folder)
    assert "eval_reward" in found[0]  # before training, which begins the trainer's own log anew
    assert found[0]["step"] == 0
    assert found[1:] == json.loads(json.dumps(trainer.state.log_history))
    assert [entry["step"] for entry in found if "loss" in entry] == [1, 2, 3, 4]


def test_every_metric_is_described(run):
    names = {name for entry in lines(run[1]) for name in entry} - {"step"}
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


def test_about(run):
    about = json.loads((run[1] / "run.json").read_text())
    assert (about["from_step"], about["max_steps"], about["processes"]) == (0, 4, 1)
    assert about["model"]["parameters"] == sum(p.numel() for p in tiny.vlm().parameters())
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"beta", "num_iterations", "learning_rate"} < set(about["changed"])
    assert not {"temperature", "top_p", "hub_token", "accelerator_config", "report_to"} & set(about["changed"])


def test_secrets_are_not_recorded(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), hub_token="hf_secret", model_init_kwargs={"token": "hf_secret"}, use_cpu=True)
    RunRecord().on_train_begin(args, TrainerState(is_world_process_zero=True), TrainerControl(), model=tiny.vlm())
    assert "hf_secret" not in (tmp_path / "run.json").read_text()


def test_a_resumed_run_has_each_step_once(tmp_path):
    """What came after the checkpoint, torn line and all, is gone."""
    options = {"save_strategy": "steps", "save_steps": 2, "log_completions": True}
    build(tmp_path, max_steps=3, **options).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 0.1, "st')
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert set(completions.stored(tmp_path / "completions")) == {1, 2, 3}
    resumed = build(tmp_path, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert lines(tmp_path) == json.loads(json.dumps(resumed.state.log_history))
    assert [entry["step"] for entry in lines(tmp_path) if "loss" in entry] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run.json").read_text())["from_step"] == 2

    before = lines(tmp_path)
    build(tmp_path, max_steps=1, **options).train()  # anew
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 1]
    assert lines(tmp_path / "previous") == before
    assert set(completions.stored(tmp_path / "completions")) == {1}
    assert set(completions.stored(tmp_path / "previous" / "completions")) == {1, 2, 3, 4}


def test_lines_are_json_whatever_is_logged():
    entry = {"step": 3, "loss": math.nan, "grad_norm": math.inf, "text": 'a"\nü', "none": None}
    assert json.loads(line(entry), parse_constant=pytest.fail) == entry | {"loss": "NaN", "grad_norm": "Infinity"}
    assert line(entry).count("\n") == 1


# Time


class Ticks(phases._Clock):
    """A clock of ticks that a device has passed only up to ``done``."""

    def __init__(self):
        self.now, self.done, self.waits = 0, math.inf, 0

    def mark(self):
        return self.now

    def passed(self, mark):
        return mark <= self.done

    def wait(self, mark):
        self.waits += 1
        self.done = max(self.done, mark)


@pytest.fixture
def clock(monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(phases, "_Clock", lambda: ticks)
    return ticks


def test_phases_add_up(clock):
    """A phase within another counts alone, those within an evaluation are its own, and steps end in the optimiser."""
    timer = Phases(torch.device("cpu"))

    def spend(ticks, name=None):
        if name is None:
            clock.now += ticks
        else:
            with timer(name):
                clock.now += ticks

    spend(1)
    with timer("backward"):
        spend(2)
        spend(4, "forward")
        spend(8)
    timer.between_steps("optimizer")
    spend(16)
    timer.on_step_end(None, None, None)
    spend(32)
    with timer("evaluate"):
        spend(64, "generate")
    with pytest.raises(TypeError):
        spend("an error", "save")
    spend(128, "save")
    spend(256)
    seconds, steps = timer.take()
    expected = {"other": 1 + 32 + 256, "backward": 2 + 8, "forward": 4, "optimizer": 16, "evaluate": 64, "save": 128}
    assert {name: value for name, value in seconds.items() if value} == expected
    assert (sum(seconds.values()), steps) == (clock.now, 1)
    spend(5, "log")
    assert {name: value for name, value in timer.take()[0].items() if value} == {"log": 5}


def test_marks_are_waited_for_when_taken_alone(clock):
    timer, clock.done = Phases(torch.device("cpu")), 100
    for _ in range(3000):
        with timer("forward"):
            clock.now += 1
    assert clock.waits == 0
    assert timer.take()[0]["forward"] == 3000
    assert clock.waits == 1
    clock.done = math.inf
    for _ in range(3000):
        with timer("forward"):
            clock.now += 1
    assert len(timer._marks) < 2000  # read as they pass, where nobody takes them
    assert (timer.take()[0]["forward"], clock.waits) == (3000, 2)


@pytest.mark.gpu
def test_phases_of_a_gpu():
    timer = Phases(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    with timer("forward"):
        for _ in range(50):
            x @ x
    with timer("backward"):
        pass
    seconds, _ = timer.take()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        x @ x
    end.record()
    end.synchronize()
    assert seconds["forward"] > 0.2 * start.elapsed_time(end) / 1e3  # of the device, not of the launches
    assert seconds["backward"] < seconds["forward"]


# Tokens


@pytest.mark.parametrize("share", ["auto", False])
def test_tokens_and_images_by_hand(tmp_path, share):
    """One step of two micro-batches of one group each, sampled together: sampling, the reference, the policy."""
    frozen, passes = tiny.vlm(), 3
    frozen.model.visual.requires_grad_(False)
    for model, name in ((tiny.vlm(), "trained"), (frozen, "frozen")):
        trainer = build(tmp_path / name, model=model, beta=0.1, share_prefix=share)
        trainer.generate.by_groups = share == "auto"
        trainer.train()
        P = trainer._experience.rollout.prompts.inputs["attention_mask"].sum(1).tolist()
        C = list(map(len, fixed_completions(8)))
        log = trainer.state.log_history[0]
        assert log["tokens_if_unshared"] == passes * (4 * sum(P) + sum(C))
        assert log["images_if_unshared"] == passes * 8
        if share == "auto":
            assert log["tokens_run"] == passes * (sum(P) + sum(C))
            assert log["images_run"] == (2 if name == "frozen" else passes * 2)
        else:
            micro_batches = sum(4 * (p + max(c)) for p, c in zip(P, (C[:4], C[4:]), strict=True))
            assert log["tokens_run"] == 8 * (max(P) + max(C)) + 2 * micro_batches
            assert log["images_run"] == passes * 8


# Loggers


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_loggers_get_completions_with_images(tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    if name != "tensorboard":
        module, tables = importlib.import_module(name), []
        make = module.Table.__init__
        record = lambda table, *args, **kwargs: (tables.append(table), make(table, *args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(module.Table, "__init__", record)
    build(tmp_path / "run", log_completions=True, report_to=name).train()
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "run" / "runs").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        assert events.Tags()["images"] == [f"completions/prompt {k}, image 1" for k in (1, 2)]
        text = events.Tensors("completions/prompt 1/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.count("\n|") == 2 + 4
        assert "train/tokens_run" in events.Tags()["scalars"]
        return
    if name == "wandb":
        module.finish()
    (made,) = tables
    rows = made.data if name == "wandb" else [list(row.values()) for row in made.data]
    columns = made.columns if name == "wandb" else list(made.data[0])
    assert columns == ["step", "image 1", "prompt", "completion", "length_reward", "vowel_reward", "advantage"]
    assert len(rows) == 8
    assert len({id(row[1]) for row in rows}) == 2  # an image for each prompt
    assert list(tmp_path.rglob("completions_*.table.json" if name == "wandb" else "media/**/*.png"))


# Completions


def rows_of(text="x", reward=0.5) -> list[list[Row]]:
    image = Image.new("RGB", (8, 4), "red")
    return [[Row("what?", [image], f"{text} {k}", {"a": reward, "<b>": math.nan}, k - 0.5) for k in range(2)]]


def test_steps_of_completions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MOST_STEPS", 10)
    for step in range(1, 200):
        completions.save(tmp_path, step, rows_of())
    steps = list(completions.stored(tmp_path))
    assert len(steps) <= 10
    assert (steps[0], steps[-1]) == (1, 199)
    assert len(list(tmp_path.iterdir())) == 2 * len(steps)  # nothing else is left


def test_stored_completions(tmp_path):
    completions.save(tmp_path, 7, rows_of("</pre><script>"))
    content = completions.load(tmp_path / "step-000007.json")
    assert [row["rewards"] for row in content["groups"][0]["completions"]] == [{"a": 0.5, "<b>": None}] * 2
    shown = (tmp_path / "step-000007.html").read_text()
    assert "<script>" not in shown
    assert "&lt;b&gt;" in shown
    for broken in ("{", '{"groups": [{}]}', json.dumps(content).replace("data:image/", "https://x.org/"), "[]"):
        (tmp_path / "step-000007.json").write_text(broken)
        with pytest.raises(ValueError, match=r"step-000007.json must be completions as the trainer stores them, got"):
            completions.load(tmp_path / "step-000007.json")


# The page


def test_page_of_a_run(run, capsys):
    text, parser = page(run[1], capsys)
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "step 4 of 4, finished" in text
    for heading in ("Rewards", "Evaluation", "Time ", "Tokens and images per step", "Completions", "Policy", "Samples"):
        assert f"<h2>{heading}" in text
    assert "Other</h2>" not in text
    assert parser.tags.count("img") == text.count("data:image/png;base64,") > 0
    assert [name for name in PHASES if f"<td>{name}</td>" in text] == [name for name in PHASES if name != "old_logps"]
    assert all(f'value="{step}"' in text for step in (1, 2, 3, 4))
    assert "learning_rate" in text
    assert torch.__version__.split("+")[0] in text


def test_page_of_a_run_that_goes_on(run, tmp_path, capsys):
    """Its last line half written; and of one that a checkpoint alone is left of, or nothing but a beginning."""
    text = (run[1] / "metrics.jsonl").read_text()
    upto = text.index('"step": 3}')
    (tmp_path / "metrics.jsonl").write_text(text[: upto - 20])
    shown, _ = page(tmp_path, capsys)
    assert "step 2, not finished; the last log was" in shown
    assert "there is no run.json" in shown

    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text((run[1] / "checkpoint-2" / "trainer_state.json").read_text())
    shown, _ = page(tmp_path, capsys)
    assert "step 2, not finished" in shown
    assert "from trainer_state.json" in shown

    (tmp_path / "metrics.jsonl").touch()
    assert "Nothing has been logged yet" in page(tmp_path, capsys)[0]


def test_page_says_what_is_no_number(tmp_path, capsys):
    entries = [{"step": s, "loss": 1.0 / s if s < 5 else math.nan, "reward": 1.0, "new": s} for s in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(line, entries)))
    text, _ = page(tmp_path, capsys)
    assert "loss is nan since step 5" in text
    assert "Constant: reward 1" in text
    assert "<h2>Other</h2>" in text


def test_a_folder_is_no_page(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path), "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--output must be a file, got the folder {tmp_path}" in capsys.readouterr().err
    assert not list(tmp_path.parent.glob(".*.part"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "RUN must be an existing folder, got "),
        ({}, "RUN must be the output_dir of a training run, with metrics.jsonl, .* which is empty"),
        ({"latest_checkpointed_iteration.txt": "10"}, r"RUN must be .* with latest_checkpointed_iteration.txt"),
        ({"metrics.jsonl": '{"step": 1}\nloss=3\n{"step": 2}\n'}, "line 2 of .* must be JSON, got 'loss=3'"),
        ({"metrics.jsonl": '{"loss": 1}\n'}, 'line 1 of .* must be an object with a whole number step, got {"loss": 1}'),
        ({"metrics.jsonl": "[1]\n"}, r"must be an object with a whole number step, got \[1\]"),
        ({"trainer_state.json": "{}"}, "log must be a trainer_state.json with log_history, got "),
        ({"trainer_state.json": '{"log_history": {}}'}, "log_history must be a list, got dict"),
        ({"metrics.jsonl": "", "run.json": "[]"}, "run.json must be an object, got list"),
        ({"metrics.jsonl": "", "run.json": "{"}, "run.json must be JSON, got "),
    ],
)
def test_what_is_no_run_is_named(tmp_path, capsys, files, message):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(folder)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "report.html").exists()


# Curves


def test_curves_of_many_points_are_thinned():
    points = [Point(step, step % 7) for step in range(10_000)]
    few = thin(points)
    assert len(few) <= MOST_POINTS
    assert few[-1].step == 9_999
    assert all(p.low <= p.value <= p.high for p in few)
    assert min(p.low for p in few) == 0
    assert max(p.high for p in few) == 6
    assert len(curve("x", points)) < 40_000
    assert curve("x", [Point(1, 2.0), Point(2, 2.0)]) == curve("x", []) == curve("x", [Point(1, math.nan)]) == ""


def test_progress_shows_reward_and_speed(capsys):
    from vlmkernels.record.progress import RewardProgress

    bar, shown = RewardProgress(), []
    bar.training_bar, bar.shown = SimpleNamespace(set_postfix=lambda values: shown.append(dict(values))), {}
    bar.on_log(None, None, None, logs={"reward": 0.5, "tokens_per_second": 12345.6, "loss": 1.0, "kl": None})
    bar.on_log(None, None, None, logs={"eval_reward": 0.75})
    assert shown[-1] == {"reward": "0.5", "tok/s": "12,346", "eval": "0.75"}


def test_read_lines_passes_over_a_last_line_that_is_torn(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "NaN"}\n{"step": 2, "text": "\xc3')
    (entry,) = read_lines(tmp_path / "metrics.jsonl")
    assert math.isnan(entry["loss"])
