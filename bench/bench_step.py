"""GRPO steps of a Qwen2.5-VL with our trainer and TRL's GRPOTrainer, on the same weights, prompts, images, lengths and rewards.

``test_step`` measures whole steps of a small model on the CPU, sampling included. Every measurement is a process of its own, so
that its peak memory is its own. The parts of a step are the times inside the models' calls; what is left of it is the backward
pass and the optimiser.

``test_training`` measures steps on given completions, sampling excluded, of the models in ``MODELS`` with random weights.

    python bench/bench_step.py --model 0.5b      # test_training of one model; 3b; tiny
    python bench/bench_step.py --sweep           # writes bench/results/step-sweep-<device>.json and .png
"""

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

# Two prompts of eight completions of 64 tokens, an image of 448 x 448 each.
SETTING = {"prompts": 2, "generations": 8, "tokens": 64, "side": 448}
STEPS = 3
NO_PARTS = ("step", "peak_mib", "grad_norm")  # of a result
SIZES = {"width": 256, "layers": 6, "depth": 4, "vocab": 32000}

# Of test_training. The 3B model has the shape of Qwen2.5-VL-3B.
MODELS = {
    "tiny": {
        "text": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "intermediate_size": 128, "vocab_size": 512},
        "vision": {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1]},
        "work": {"generations": 4, "tokens": 16, "side": 112},
    },
    "0.5b": {
        "text": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                 "intermediate_size": 4864, "vocab_size": 151936},
        "vision": {"hidden_size": 1280, "depth": 8, "num_heads": 16, "intermediate_size": 3420, "fullatt_block_indexes": [7]},
        "work": {"generations": 8, "tokens": 256, "side": 980},
    },
    "3b": {
        "text": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                 "intermediate_size": 11008, "vocab_size": 151936},
        "vision": {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
        "work": {"generations": 8, "tokens": 256, "side": 980},
    },
}  # fmt: skip


def make_model(width, layers, depth, vocab):
    from support import tiny
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = tiny.vlm().config.to_dict()
    head = 64 if width < 2048 else 128
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    config["text_config"] |= {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // head,
        "num_key_value_heads": max(1, width // head // 2), "vocab_size": vocab, "max_position_embeddings": 8192,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    }  # fmt: skip
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": max(2, width // 80)}
    config["vision_config"] |= vision | {"out_hidden_size": width, "fullatt_block_indexes": [depth - 1]}
    if width % vision["num_heads"]:
        config["vision_config"]["num_heads"] = 4
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(harness.DEVICE)


def make_processor(side):
    from support import tiny

    processor = tiny.processor()
    processor.image_processor.min_pixels = processor.image_processor.max_pixels = side * side
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    return processor


class Clock:
    """Time spent inside calls, by name; a call inside another one counts for the outer. now: seconds."""

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


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if harness.GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(provider: str, setting: dict) -> dict:
    """Median seconds of a step and its parts, peak bytes above those with the model loaded, the last step's gradient norm."""
    num_steps = setting.get("steps", STEPS)
    from support import tiny
    from transformers import TrainerCallback

    folder, processor = tempfile.mkdtemp(), make_processor(setting["side"])
    model = make_model(**SIZES)
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder, dtype=torch.float32).to(harness.DEVICE)  # TRL loads the reference by this path
    rows = [
        {
            "prompt": [{"role": "user", "content": "what do you see?"}],
            "images": [tiny.image(k, setting["side"], setting["side"])],
        }
        for k in range(setting["prompts"])
    ]
    common = {
        "output_dir": folder, "per_device_train_batch_size": setting["prompts"] * setting["generations"],
        "num_generations": setting["generations"], "max_completion_length": setting["tokens"], "beta": 0.04,
        "max_steps": num_steps + 1, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "bf16": harness.GPU, "gradient_checkpointing": False, "generation_kwargs": {"min_new_tokens": setting["tokens"]},
        "logging_steps": 1, "use_bias_correction_kl": False,
    }  # fmt: skip
    reward = lambda completions, **_: [float(len(c[0]["content"])) for c in completions]  # noqa: E731
    if provider.startswith("trl"):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        if provider == "trl patched":
            from vlmkernels.integrations.trl import patch_trl

            patch_trl()
        data = Dataset.from_list(rows * (num_steps + 1))
    else:
        from vlmkernels.train import GRPOConfig, GRPOTrainer

        common["share_prefix"] = "false" if provider == "unshared" else "auto"
        data = rows * (num_steps + 1)
    trainer = GRPOTrainer(model, reward, args=GRPOConfig(**common), train_dataset=data, processing_class=processor)
    clock = Clock()
    clock.watch(trainer, "_generate_single_turn" if provider.startswith("trl") else "generate", "rollout")
    clock.watch(trainer.ref_model, "forward", "reference")
    clock.watch(model, "forward", "policy forward")
    steps, before = [], peak_bytes()

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()
            clock.spent.clear()

        def on_step_end(self, args, state, control, **kwargs):
            if harness.GPU:
                torch.cuda.synchronize()
            steps.append({"step": time.perf_counter() - self.start, **clock.spent})

    trainer.add_callback(Steps())
    trainer.train()
    parts = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[-1]}
    parts["backward and rest"] = parts["step"] - sum(value for name, value in parts.items() if name != "step")
    whole = {"peak_mib": round((peak_bytes() - before) / 2**20, 1), "grad_norm": trainer.state.log_history[-2]["grad_norm"]}
    return {**{name: round(value, 3) for name, value in parts.items()}, **whole}


def parts_of(result: dict) -> str:
    return ", ".join(f"{part} {value:.2f} s" for part, value in result.items() if part not in NO_PARTS)


def environment() -> dict[str, str]:
    """Of a process that imports vlmkernels, installed or not."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_itself(*arguments: str) -> str:
    """The last line that this script prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def in_process(provider: str, **changes) -> dict:
    return json.loads(run_itself("--provider", provider, "--setting", json.dumps(SETTING | changes)))


def random_model(name: str):
    """One of MODELS, built where it runs; bf16 on a GPU, fp32 on the CPU."""
    from support import tiny
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = MODELS[name]
    config = tiny.vlm().config.to_dict()
    text = config["text_config"] | sizes["text"]
    head = text["hidden_size"] // text["num_attention_heads"]
    text |= {
        "max_position_embeddings": 8192, "layer_types": ["full_attention"] * text["num_hidden_layers"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
        },
    }  # fmt: skip
    config["text_config"] = text
    config["vision_config"] |= sizes["vision"] | {"out_hidden_size": text["hidden_size"]}
    torch.manual_seed(0)
    with torch.device(harness.DEVICE):
        dtype = torch.bfloat16 if harness.GPU else torch.float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**config), dtype=dtype)
    model.generation_config.eos_token_id = tiny.tokenizer().eos_token_id
    return model


class Spans:
    """Seconds spent in calls, by name. Time in a nested call counts for that call only. On a GPU each call is synchronised."""

    def __init__(self):
        self.spent: Counter = Counter()
        self.names: list[str] = []
        self.last = 0.0

    def mark(self) -> None:
        """Count the time since the last mark for the innermost call."""
        if harness.GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.names:
            self.spent[self.names[-1]] += now - self.last
        self.last = now

    def watch(self, owner, attribute: str, name) -> None:
        """name: of the span, or a function that returns it."""
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


def training_steps(provider: str, name: str, beta: float = 0.0, checkpointing: bool = False) -> dict:
    """Steps of one provider on given completions: milliseconds of each part, peak MiB above weights and optimiser states, the
    gradient norm of the first step, and how often the host waits for the device in a step."""
    from support import tiny
    from transformers import PrinterCallback, TrainerCallback

    work = MODELS[name]["work"]
    generations, length, side = work["generations"], work["tokens"], work["side"]
    model, processor = random_model(name), make_processor(side)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(64, MODELS[name]["text"]["vocab_size"], (generations, length), generator=rng)  # letters and no others
    rewards = torch.rand(generations, generator=rng).tolist()
    reward = lambda completions, **_: rewards[: len(completions)]  # noqa: E731
    steps = STEPS + 1 + harness.GPU  # the first warms up; on a GPU the last counts synchronisations
    row = {"prompt": [{"role": "user", "content": "what do you see?"}], "images": [tiny.image(0, side, side)]}
    common = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": generations, "num_generations": generations,
        "max_completion_length": length, "beta": beta, "max_steps": steps, "learning_rate": 1e-6, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "bf16": harness.GPU, "gradient_checkpointing": checkpointing,
        "logging_steps": 1, "optim": "adamw_torch_fused", "use_bias_correction_kl": False,
    }  # fmt: skip
    spans = Spans()
    if provider.startswith("trl"):
        import trl.trainer.grpo_trainer as module
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        if provider == "trl patched":
            from vlmkernels.integrations.trl import patch_trl

            patch_trl()
        reference = random_model(name) if beta else None  # TRL would load it from the hub
        load, module.create_model_from_path = module.create_model_from_path, lambda *args, **kwargs: reference
        try:
            # Fingerprints pickle the data, which fails with some versions of pyarrow and dill.
            with mock.patch("datasets.arrow_dataset.generate_fingerprint", return_value="0" * 16):
                data = Dataset.from_list([row] * steps)
            trainer = GRPOTrainer(model, reward, GRPOConfig(**common), data, processing_class=processor)
        finally:
            module.create_model_from_path = load
        trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (ids.tolist(), None)
        spans.watch(trainer, "_generate_and_score_completions", "data")
        inner = lambda: "forward" if torch.is_grad_enabled() else "reference"  # noqa: E731
        spans.watch(trainer, "_get_per_token_logps_and_entropies", inner)
    else:
        from vlmkernels.rollout.generate import Rollout
        from vlmkernels.train import GRPOConfig, GRPOTrainer

        trainer = GRPOTrainer(model, reward, GRPOConfig(**common), [row] * steps, processing_class=processor)
        on_device = ids.to(harness.DEVICE)
        mask, truncated = torch.ones_like(on_device, dtype=torch.bool), torch.ones_like(on_device[:, 0], dtype=torch.bool)

        def given(model, prompts, num_generations, temperature):
            group = torch.arange(len(prompts)).repeat_interleave(num_generations)
            return Rollout(prompts, group, on_device, mask, truncated)

        trainer.generate = given
        spans.watch(trainer, "_new_experience", "data")
        spans.watch(trainer, "_add_fixed_logps", "reference")
    trainer.remove_callback(PrinterCallback)
    spans.watch(trainer, "compute_loss", "forward")
    spans.watch(trainer.accelerator, "backward", "backward")
    spans.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    measured, peaks, waits, caught = [], [], Counter(), []

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            spans.watch(optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, **kwargs):
            if harness.GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() if harness.GPU else peak_bytes()
            self.counts = harness.GPU and state.global_step == steps - 1
            if self.counts:
                caught.append(warnings.catch_warnings(record=True))
                self.warned = caught[0].__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            spans.spent.clear()
            spans.last = self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            spans.mark()
            whole = time.perf_counter() - self.start
            if self.counts:
                torch.cuda.set_sync_debug_mode("default")
                caught[0].__exit__(None, None, None)
                found = (w for w in self.warned if "synchronizing CUDA operation" in str(w.message))
                waits.update(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)
            else:
                other = whole - sum(spans.spent.values())
                measured.append({**spans.spent, "other": other, "training": whole - spans.spent["data"]})
                peaks.append(peak_bytes() - self.before)

    trainer.add_callback(Steps())
    trainer.train()
    counted = measured[1:]
    parts = {part: statistics.median(step.get(part, 0.0) for step in counted) for part in sorted({*counted[0]})}
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    result = {
        "ms": {part: round(1e3 * seconds, 2) for part, seconds in parts.items()},
        "peak_mib": round(max(peaks[1:]) / 2**20, 1),
        "grad_norm": norms[0],
        "parameters": sum(x.numel() for x in model.parameters()),
    }
    if harness.GPU:
        result |= {"host_syncs": sum(waits.values()), "host_syncs_at": dict(waits.most_common(20))}
    return result


PROVIDERS = {"vlmkernels": "vlmkernels", "TRL GRPOTrainer": "trl", "TRL GRPOTrainer, patch_trl()": "trl patched"}


def training_title(name: str, beta: float = 0.0) -> str:
    work = MODELS[name]["work"]
    image = (work["side"] // 28) ** 2
    tokens = f"1 x {work['generations']} completions of {work['tokens']} tokens, an image of {image}"
    return f"training step {name}, {tokens}" + (f", beta {beta}" if beta else "")


def training(name: str, providers: list[str], beta: float = 0.0) -> list[dict]:
    """A row per provider, recorded as it comes. Where one runs out of memory, all run again with gradient checkpointing.

    ``patch_trl`` changes TRL for the rest of the process, so that provider comes last.
    """
    rows, norms = [], {}
    title = training_title(name, beta)

    def run(label: str, checkpointing: bool) -> bool:
        """Whether there was memory enough."""
        shown = label + (", gradient checkpointing" if checkpointing else "")
        begin, failed = time.perf_counter(), None
        try:
            result = training_steps(PROVIDERS[label], name, beta, checkpointing)
        except Exception as error:
            failed = harness.reason(error)
            if failed != "out of memory":
                import traceback

                traceback.print_exc()
        harness.release()
        if failed:
            rows.append({"provider": shown, "parts": "", "error": f"not measured: {failed}"})
        else:
            norms[shown] = result["grad_norm"]
            ms = result["ms"]
            text = ", ".join(f"{part} {value:.1f} ms" for part, value in ms.items() if part != "training")
            if "host_syncs" in result:
                text += f"; {result['host_syncs']} host syncs"
            rows.append({"provider": shown, "ms": ms["training"], "rounds": STEPS, "ratio_to_ours": None,
                         "peak_mib": result["peak_mib"], "parts": f"{text}; gradient norm {result['grad_norm']:.4g}",
                         "detail": result, "process_s": round(time.perf_counter() - begin, 1)})  # fmt: skip
        ours = {checkpointed: row["ms"] for row in rows if "ms" in row and row["provider"].startswith("vlmkernels")
                for checkpointed in ["checkpointing" in row["provider"]]}  # fmt: skip
        for row in rows:
            if "ms" in row and (reference := ours.get("checkpointing" in row["provider"])):
                row["ratio_to_ours"] = round(row["ms"] / reference, 2)
        harness.record(title, rows)
        print(rows[-1], file=sys.stderr, flush=True)
        gc.collect()
        return failed != "out of memory"

    plain = [label for label in providers if "patch_trl" not in label]
    fits = [run(label, False) for label in plain]
    if not all(fits):
        for label in plain:
            run(label, True)
    for label in providers:
        if label not in plain and (run(label, False) or run(label, True)):
            continue
    first = next(iter(norms.values()), math.nan)
    tolerance = 0.05 if harness.GPU else 1e-3
    for row in rows:
        norm = norms.get(row["provider"])
        if norm is not None and not math.isclose(norm, first, rel_tol=tolerance):
            row["parts"] += f"; WRONG: differs from {first:.4g}"
    harness.record(title, rows)
    return rows


@pytest.mark.parametrize("name", ["0.5b", "3b"] if harness.GPU else ["tiny"])
def test_training(benchmark, name):
    rows = json.loads(run_itself("--model", name))
    harness.record(training_title(name), rows)
    benchmark.pedantic(lambda: None)  # measured above, in a process of its own
    assert all("ms" in row or "out of memory" in row["error"] for row in rows), rows
    assert not any("WRONG" in row["parts"] for row in rows), rows


@pytest.mark.skipif(harness.GPU, reason="measured on the CPU; on a GPU, test_training")
def test_step(benchmark):
    providers = {"vlmkernels": "vlmkernels", "vlmkernels, share_prefix off": "unshared"}
    if importlib.util.find_spec("trl"):
        providers["TRL GRPOTrainer"] = "trl"
    results = {name: in_process(provider) for name, provider in providers.items()}
    ours = results["vlmkernels"]["step"]
    rows = []
    for name, result in results.items():
        rows.append({
            "provider": name, "ms": 1e3 * result["step"], "rounds": STEPS, "ratio_to_ours": round(result["step"] / ours, 2),
            "peak_mib": result["peak_mib"], "parts": parts_of(result),
        })  # fmt: skip
    title = ", ".join(f"{name} {value}" for name, value in SETTING.items())
    harness.record(f"step {title}", rows)
    benchmark.pedantic(lambda: None)  # measured above, in processes of their own


def sweep() -> None:
    """Our step over group sizes and image sizes, with its plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {"generations": [2, 4, 8, 16], "side": [224, 448, 672, 896]}
    largest = {"generations": 8, "side": 448}  # of a copy per completion: more takes minutes
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
    arguments = parser.parse_args()
    if arguments.model:
        installed = [label for label in PROVIDERS if label == "vlmkernels" or importlib.util.find_spec("trl")]
        rows = training(arguments.model, arguments.providers or installed, arguments.beta)
        print(*harness.table(rows), sep="\n", file=sys.stderr)
        print(json.dumps(rows))
    elif arguments.sweep:
        sweep()
    else:
        print(json.dumps(measure(arguments.provider, arguments.setting)))
