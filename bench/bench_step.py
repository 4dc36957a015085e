"""GRPO steps with this trainer and with TRL's, on the same weights, prompts, images, lengths and rewards.

``test_step`` measures whole steps of small models on the CPU, including sampling. Every measurement runs in its own process,
which gives it its own peak memory. The parts of a step are the times in calls of the models; the rest is the backward pass and
the optimizer.

``test_training`` measures steps on given completions, without sampling, for the models of Qwen2.5-VL in step_models.py.

    python bench/bench_step.py --model 0.5b      # test_training of one model: 0.5b, 3b or tiny; --tokens 1024
    python bench/bench_step.py --sweep           # writes bench/results/step-sweep-<device>.json and .png
"""

import argparse
import functools
import gc
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch
from step_models import MODELS, SIZES, make_model, make_processor, random_model
from support import tiny
from support.paths import environment
from torch.autograd import DeviceType
from transformers import PrinterCallback, Trainer, TrainerCallback

# Two prompts with one image of 448 x 448 and eight completions of 64 tokens each.
SETTING = {"prompts": 2, "generations": 8, "tokens": 64, "side": 448}
STEPS = 3
NO_PARTS = ("step", "peak_mib", "grad_norm")  # entries of a result that are not parts of a step


class Clock:
    """Seconds spent in watched calls, by name. A call inside another watched call counts only for the outer one."""

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.spent: dict[str, float] = {}
        self.inside = False

    def watch(self, owner, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        @functools.wraps(function)  # ``generate`` reads the signature
        def timed(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                if harness.GPU:
                    torch.cuda.synchronize()
                self.inside = False
                self.spent[name] = self.spent.get(name, 0.0) + self.now() - start

        setattr(owner, attribute, timed)


class StepTimes(TrainerCallback):
    """Records the seconds of each step, and of the calls that a clock watches."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        self.clock.spent.clear()

    def on_step_end(self, args, state, control, **kwargs):
        if harness.GPU:
            torch.cuda.synchronize()
        self.steps.append({"step": time.perf_counter() - self.start, **self.clock.spent})

    def medians(self) -> dict[str, float]:
        """The median of each part. If there are several steps, the first is a warm-up."""
        timed = self.steps[1:] or self.steps
        return {name: statistics.median(step[name] for step in timed) for name in timed[-1]}


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if harness.GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trl_trainer_class(patched: bool):
    """(GRPOTrainer, GRPOConfig) of TRL, which ``patch_trl`` changes for the rest of the process."""
    from trl import GRPOConfig, GRPOTrainer

    if patched:
        from vlmkernels.integrations.trl import patch_trl

        patch_trl()
    return GRPOTrainer, GRPOConfig


def make_trainer(provider: str, setting: dict, steps: int) -> Trainer:
    """The trainer of one provider: "trl", "trl patched", "unshared" (no shared prefixes) or "vlmkernels"."""
    folder, processor = tempfile.mkdtemp(), make_processor(setting["side"])
    model = make_model(**SIZES, family=setting.get("family", "qwen2_5_vl"))
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32).to(harness.DEVICE)  # TRL loads the reference by this path
    images = [tiny.image(k, setting["side"], setting["side"]) for k in range(setting["prompts"])]
    data = [{"prompt": [{"role": "user", "content": "what do you see?"}], "images": [image]} for image in images] * steps
    options = {
        "output_dir": folder, "per_device_train_batch_size": setting["prompts"] * setting["generations"],
        "num_generations": setting["generations"], "max_completion_length": setting["tokens"], "beta": 0.04,
        "max_steps": steps, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "bf16": harness.GPU, "gradient_checkpointing": False, "generation_kwargs": {"min_new_tokens": setting["tokens"]},
        "logging_steps": 1, "use_bias_correction_kl": False,
    }  # fmt: skip

    def length(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    if provider.startswith("trl"):
        from datasets import Dataset

        trainer_class, config_class = trl_trainer_class(provider == "trl patched")
        data = Dataset.from_list(data)
    else:
        from vlmkernels.train import GRPOConfig as config_class
        from vlmkernels.train import GRPOTrainer as trainer_class

        options["share_prefix"] = "false" if provider == "unshared" else "auto"
    return trainer_class(model, length, args=config_class(**options), train_dataset=data, processing_class=processor)


def measure(provider: str, setting: dict) -> dict:
    """Median seconds of a step and its parts, peak memory above the loaded model, the gradient norm of the last step."""
    trainer = make_trainer(provider, setting, setting.get("steps", STEPS) + 1)
    clock = Clock()
    if provider.startswith("trl"):
        clock.watch(trainer, "_generate_single_turn", "rollout")
    else:
        clock.watch(type(trainer.engine), "__call__", "rollout")
    clock.watch(trainer.ref_model, "forward", "reference")
    clock.watch(trainer.model, "forward", "policy forward")
    timer, before = StepTimes(clock), peak_bytes()
    trainer.add_callback(timer)
    trainer.train()
    parts = timer.medians()
    parts["backward and rest"] = parts["step"] - sum(value for name, value in parts.items() if name != "step")
    whole = {"peak_mib": round((peak_bytes() - before) / 2**20, 1), "grad_norm": trainer.state.log_history[-2]["grad_norm"]}
    return {**{name: round(value, 3) for name, value in parts.items()}, **whole}


def parts_of(result: dict) -> str:
    return ", ".join(f"{part} {value:.2f} s" for part, value in result.items() if part not in NO_PARTS)


def run_itself(*arguments: str) -> str:
    """Run this script in another process and return the last line that it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def in_process(provider: str, **changes) -> dict:
    return json.loads(run_itself("--provider", provider, "--setting", json.dumps(SETTING | changes)))


class Spans:
    """Seconds spent in watched calls, by name. Nested calls count only for themselves. Each call synchronizes a GPU."""

    def __init__(self):
        self.spent: Counter = Counter()
        self.names: list[str] = []
        self.last = 0.0

    def mark(self) -> None:
        """Add the time since the last mark to the innermost call."""
        if harness.GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.names:
            self.spent[self.names[-1]] += now - self.last
        self.last = now

    def watch(self, owner, attribute: str, name) -> None:
        """name: the name of the span, or a function that returns it."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.mark()
            self.names.append(name() if callable(name) else name)
            try:
                return function(*args, **kwargs)
            finally:
                self.mark()
                self.names.pop()

        setattr(owner, attribute, timed)


@dataclass
class TrainingCase:
    """Training steps of a model of MODELS with given completions and rewards."""

    model_name: str
    beta: float = 0.0
    checkpointing: bool = False

    def __post_init__(self):
        work, rng = MODELS[self.model_name]["work"], torch.Generator().manual_seed(0)
        self.generations, self.side = work["generations"], work["side"]
        vocab = MODELS[self.model_name]["text"]["vocab_size"]
        self.ids = torch.randint(64, vocab, (self.generations, work["tokens"]), generator=rng)  # no special tokens
        self.rewards = torch.rand(self.generations, generator=rng).tolist()
        self.steps = STEPS + 1 + 2 * harness.GPU  # the first warms up; for the last two on a GPU see StepRecorder

    def options(self) -> dict:
        return {
            "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": self.generations,
            "num_generations": self.generations, "max_completion_length": self.ids.shape[1], "beta": self.beta,
            "max_steps": self.steps, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "bf16": harness.GPU, "gradient_checkpointing": self.checkpointing, "logging_steps": 1,
            "optim": "adamw_torch_fused", "use_bias_correction_kl": False,
        }  # fmt: skip

    def data(self) -> list[dict]:
        image = tiny.image(0, self.side, self.side)
        return [{"prompt": [{"role": "user", "content": "what do you see?"}], "images": [image]}] * self.steps

    def reward(self, completions, **_) -> list[float]:
        return self.rewards[: len(completions)]


def trl_training(case: TrainingCase, spans: Spans, patched: bool) -> Trainer:
    """TRL's trainer, which "samples" the given completions."""
    import trl.trainer.grpo_trainer as module
    from datasets import Dataset

    trainer_class, config_class = trl_trainer_class(patched)
    reference = random_model(case.model_name) if case.beta else None
    # TRL would load the reference from the hub; fingerprints pickle the data, which some versions of pyarrow and dill cannot.
    with (
        mock.patch.object(module, "create_model_from_path", return_value=reference),
        mock.patch("datasets.arrow_dataset.generate_fingerprint", return_value="0" * 16),
    ):
        model, processor = random_model(case.model_name), make_processor(case.side)
        data, args = Dataset.from_list(case.data()), config_class(**case.options())
        trainer = trainer_class(model, case.reward, args, data, processing_class=processor)
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (case.ids.tolist(), None)
    spans.watch(trainer, "_generate_and_score_completions", "data")
    logps = "_get_per_token_logps_and_entropies"
    spans.watch(trainer, logps, lambda: "forward" if torch.is_grad_enabled() else "reference")
    return trainer


def our_training(case: TrainingCase, spans: Spans) -> Trainer:
    """This package's trainer, which "samples" the given completions."""
    from vlmkernels.rollout.base import Engine, Rollout
    from vlmkernels.train import GRPOConfig, GRPOTrainer

    model, processor = random_model(case.model_name), make_processor(case.side)
    trainer = GRPOTrainer(model, case.reward, GRPOConfig(**case.options()), case.data(), processing_class=processor)
    ids = case.ids.to(harness.DEVICE)
    mask, truncated = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids[:, 0], dtype=torch.bool)

    class GivenCompletions(Engine):
        def __call__(self, model, prompts, num_generations, temperature, samples=None):
            group = torch.arange(len(prompts)).repeat_interleave(num_generations)
            return Rollout(prompts, group, ids, mask, truncated)

    trainer.engine = GivenCompletions()
    spans.watch(trainer, "_new_experience", "data")
    spans.watch(trainer.objective, "add_fixed_logps", "reference")
    return trainer


def merged_length(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Calls by which PyTorch waits for results; an asynchronous copy to memory that is not pinned is one, too. The benchmark itself
# waits by cudaDeviceSynchronize.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpyAsync")


def gpu_activity(events: Iterable) -> dict[str, float]:
    """From the events of a profile: milliseconds in which a kernel or copy runs, and in which the host waits for results."""
    events = [e for e in events if not e.is_user_annotation]  # such as the range of an optimizer step
    on_gpu = ((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    waits = (e.time_range.elapsed_us() for e in events if e.device_type == DeviceType.CPU and e.name in WAITS)
    return {"kernels": round(merged_length(on_gpu) / 1e3, 2), "waits": round(sum(waits) / 1e3, 2)}


class StepRecorder(TrainerCallback):
    """Records the parts and the peak memory of each step.

    On a GPU the last step counts host synchronizations instead, and the one before it is profiled.
    """

    def __init__(self, spans: Spans, steps: int):
        self.spans, self.steps = spans, steps
        self.measured: list[dict] = []
        self.peaks: list[int] = []
        self.waits: Counter = Counter()
        self.activity: dict[str, float] = {}
        self.profile = self.catcher = None

    def stop(self) -> None:
        """Stop profiling and counting, also after an error."""
        if self.profile:
            self.profile.stop()
        if self.catcher:
            torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(None, None, None)
        self.profile = self.catcher = None

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.spans.watch(optimizer, "step", "optimizer")

    def on_step_begin(self, args, state, control, **kwargs):
        if harness.GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if harness.GPU else peak_bytes()
        if harness.GPU and state.global_step == self.steps - 2:
            self.profile = torch.profiler.profile()
            self.profile.start()
        if harness.GPU and state.global_step == self.steps - 1:
            self.catcher = warnings.catch_warnings(record=True)
            self.warned = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        self.spans.spent.clear()
        self.spans.last = self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.spans.mark()
        whole, spent = time.perf_counter() - self.start, self.spans.spent
        if self.catcher:
            found = (w for w in self.warned if "synchronizing CUDA operation" in str(w.message))
            self.waits.update(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)
        elif self.profile:
            profile = self.profile
            self.stop()
            self.activity = gpu_activity(profile.events())
        else:
            self.measured.append({**spent, "other": whole - sum(spent.values()), "training": whole - spent["data"]})
            self.peaks.append(peak_bytes() - self.before)


def training_steps(provider: str, case: TrainingCase) -> dict:
    """Milliseconds of each part of a step, peak MiB above weights and optimizer states, and the first gradient norm.

    On a GPU also how often and how long the host waits for the device in a step, and how long kernels run.
    """
    spans = Spans()
    if provider.startswith("trl"):
        trainer = trl_training(case, spans, patched=provider == "trl patched")
    else:
        trainer = our_training(case, spans)
    trainer.remove_callback(PrinterCallback)
    spans.watch(trainer, "compute_loss", "forward")
    spans.watch(trainer.accelerator, "backward", "backward")
    spans.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    recorder = StepRecorder(spans, case.steps)
    trainer.add_callback(recorder)
    try:
        trainer.train()
    finally:
        recorder.stop()
    counted = recorder.measured[1:]
    parts = {part: statistics.median(step.get(part, 0.0) for step in counted) for part in sorted({*counted[0]})}
    result = {
        "ms": {part: round(1e3 * seconds, 2) for part, seconds in parts.items()},
        "peak_mib": round(max(recorder.peaks[1:]) / 2**20, 1),
        "grad_norm": next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry),
        "parameters": sum(x.numel() for x in trainer.model.parameters()),
    }
    if harness.GPU:
        waits = recorder.waits
        result |= {"host_syncs": sum(waits.values()), "host_syncs_at": dict(waits.most_common(20)), "gpu_ms": recorder.activity}
    return result


PROVIDERS = {"vlmkernels": "vlmkernels", "TRL GRPOTrainer": "trl", "TRL GRPOTrainer, patch_trl()": "trl patched"}


def training_title(name: str, beta: float = 0.0, checkpointing: bool = False) -> str:
    work = MODELS[name]["work"]
    image = (work["side"] // 28) ** 2
    tokens = f"1 x {work['generations']} completions of {work['tokens']} tokens, an image of {image}"
    options = (f", beta {beta}" if beta else "") + (", gradient checkpointing" if checkpointing else "")
    return f"training step {name}, {tokens}{options}"


def training_row(label: str, case: TrainingCase) -> dict:
    """The row of a provider, or the reason why it was not measured."""
    begin, failed = time.perf_counter(), None
    try:
        result = training_steps(PROVIDERS[label], case)
    except Exception as error:
        failed = harness.reason(error)
        if failed != "out of memory":
            traceback.print_exc()
    harness.release()
    if failed:
        return {"provider": label, "parts": "", "error": f"not measured: {failed}"}
    text = ", ".join(f"{part} {value:.1f} ms" for part, value in result["ms"].items() if part != "training")
    if "host_syncs" in result:
        activity = result["gpu_ms"]
        text += f"; with data: kernels {activity['kernels']:.1f} ms,"
        text += f" {result['host_syncs']} host syncs of {activity['waits']:.1f} ms"
    return {
        "provider": label, "ms": result["ms"]["training"], "rounds": STEPS, "ratio_to_ours": None,
        "peak_mib": result["peak_mib"], "parts": f"{text}; gradient norm {result['grad_norm']:.4g}", "detail": result,
        "process_s": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def set_ratios(rows: list[dict]) -> None:
    """Divide each time by ours."""
    ours = next((row["ms"] for row in rows if row["provider"] == "vlmkernels" and "ms" in row), None)
    for row in rows:
        if "ms" in row and ours:
            row["ratio_to_ours"] = round(row["ms"] / ours, 2)


def mark_wrong(rows: list[dict]) -> None:
    """Mark the rows whose first gradient norm differs from that of the first row."""
    norms = {row["provider"]: row["detail"]["grad_norm"] for row in rows if "detail" in row}
    first, tolerance = next(iter(norms.values()), math.nan), 0.05 if harness.GPU else 1e-3
    for row in rows:
        norm = norms.get(row["provider"])
        if norm is not None and not math.isclose(norm, first, rel_tol=tolerance):
            row["parts"] += f"; WRONG: differs from {first:.4g}"


def training(name: str, providers: list[str], beta: float = 0.0, checkpointing: bool = False) -> list[dict]:
    """A row per provider, recorded as it comes. ``patch_trl`` changes TRL for the rest of the process, so it comes last."""
    rows, title = [], training_title(name, beta, checkpointing)
    for label in sorted(providers, key=lambda label: "patch_trl" in label):
        rows.append(training_row(label, TrainingCase(name, beta, checkpointing)))
        set_ratios(rows)
        harness.record(title, rows)
        print(rows[-1], file=sys.stderr, flush=True)
        gc.collect()
    mark_wrong(rows)
    harness.record(title, rows)
    return rows


# Without gradient checkpointing TRL needs more than 140 GiB for the model "3b".
TRAINED = {"tiny": ("tiny", [])}
if harness.GPU:
    TRAINED = {"0.5b": ("0.5b", []), "3b, activations kept": ("3b", []), "3b, checkpointing": ("3b", ["--checkpointing"])}


@pytest.mark.parametrize(("name", "options"), TRAINED.values(), ids=TRAINED)
def test_training(benchmark, name, options):
    rows = json.loads(run_itself("--model", name, *options))
    harness.record(training_title(name, checkpointing=bool(options)), rows)
    benchmark.pedantic(lambda: None)  # measured above, in another process
    assert all("ms" in row or "out of memory" in row["error"] for row in rows), rows
    assert not any("WRONG" in row["parts"] for row in rows), rows


@pytest.mark.skipif(harness.GPU, reason="measured on the CPU; on a GPU, test_training")
@pytest.mark.parametrize(("family", "title"), [("qwen2_5_vl", "step "), ("qwen3_5", "step Qwen3.5, ")])
def test_step(benchmark, family, title):
    providers = {"vlmkernels": "vlmkernels", "vlmkernels, share_prefix off": "unshared"}
    if importlib.util.find_spec("trl"):
        providers["TRL GRPOTrainer"] = "trl"
    results = {name: in_process(provider, family=family) for name, provider in providers.items()}
    ours = results["vlmkernels"]["step"]
    rows = []
    for name, result in results.items():
        rows.append({
            "provider": name, "ms": 1e3 * result["step"], "rounds": STEPS, "ratio_to_ours": round(result["step"] / ours, 2),
            "peak_mib": result["peak_mib"], "parts": parts_of(result),
        })  # fmt: skip
    title += ", ".join(f"{name} {value}" for name, value in SETTING.items())
    harness.record(title, rows)
    benchmark.pedantic(lambda: None)  # measured above, in other processes


def sweep() -> None:
    """Measure our step for different group sizes and image sizes, and plot it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {"generations": [2, 4, 8, 16], "side": [224, 448, 672, 896]}
    largest = {"generations": 8, "side": 448}  # without shared prefixes, larger ones take minutes
    rows = []
    for name, values in series.items():
        for provider in ("vlmkernels", "unshared"):
            for value in values if provider == "vlmkernels" else [v for v in values if v <= largest[name]]:
                result = in_process(provider, steps=1, **{name: value})
                rows.append({"provider": provider, "series": name, "value": value, **result})
                print(rows[-1], flush=True)
    stem = harness.RESULTS / f"step-sweep-{harness.slug(harness.device_name())}"
    content = {"device": harness.device_name(), **harness.provenance(), "setting": SETTING, "sizes": SIZES, "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    labels = {"generations": "completions per prompt, G", "side": "side of the image, pixels"}
    for axis, name in zip(axes, series, strict=True):
        for provider, label in (("vlmkernels", "prompt and image once per group"), ("unshared", "a copy per completion")):
            chosen = [row for row in rows if row["series"] == name and row["provider"] == provider]
            axis.plot([row["value"] for row in chosen], [row["step"] for row in chosen], marker="o", label=label)
        axis.set_xlabel(labels[name])
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per step")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--provider")
    parser.add_argument("--setting", type=json.loads)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--model", choices=MODELS, help="measure training steps on given completions")
    parser.add_argument("--providers", nargs="*", choices=PROVIDERS, help="with --model; default: all that are installed")
    parser.add_argument("--beta", type=float, default=0.0, help="with --model")
    parser.add_argument("--checkpointing", action="store_true", help="with --model")
    parser.add_argument("--tokens", type=int, help="with --model: tokens of a completion")
    arguments = parser.parse_args()
    if arguments.model:
        if arguments.tokens:
            MODELS[arguments.model]["work"]["tokens"] = arguments.tokens
        installed = [label for label in PROVIDERS if label == "vlmkernels" or importlib.util.find_spec("trl")]
        rows = training(arguments.model, arguments.providers or installed, arguments.beta, arguments.checkpointing)
        print(*harness.table(rows), sep="\n", file=sys.stderr)
        print(json.dumps(rows))
    elif arguments.sweep:
        sweep()
    else:
        print(json.dumps(measure(arguments.provider, arguments.setting)))
