"""Whole GRPO steps of a small Qwen2.5-VL, ours beside TRL's GRPOTrainer: same weights, prompts, images, lengths and rewards.

Every measurement is a process of its own, so that its peak memory is its own. The parts of a step are the times inside the
models' calls; what is left of it is the backward pass and the optimiser.

    python bench/bench_step.py --sweep      # writes bench/results/step-sweep-<device>.json and .png
"""

import argparse
import functools
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

# Two prompts of eight completions of 64 tokens, an image of 448 x 448 each.
SETTING = {"prompts": 2, "generations": 8, "tokens": 64, "side": 448}
STEPS = 3
NO_PARTS = ("step", "peak_mib", "grad_norm")  # of a result
SIZES = {"width": 256, "layers": 6, "depth": 4, "vocab": 32000}
if harness.GPU:
    SETTING = {"prompts": 4, "generations": 8, "tokens": 256, "side": 896}
    SIZES = {"width": 2048, "layers": 36, "depth": 32, "vocab": 151936}  # the shape of Qwen2.5-VL-3B


def make_model(width, layers, depth, vocab):
    import tiny
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
    import tiny

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
    import tiny
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


def in_process(provider: str, **changes) -> dict:
    command = [sys.executable, __file__, "--provider", provider, "--setting", json.dumps(SETTING | changes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
    else:
        print(json.dumps(measure(arguments.provider, arguments.setting)))
