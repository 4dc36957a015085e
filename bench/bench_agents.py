"""GRPO steps with a tool that returns images: this trainer, TRL's, and TRL's with ``patch_trl()``, each in its own process.

Two prompts with an image, eight trajectories each, of three turns; each of the first two zooms into one of nine regions, which
is an image of the size of the first. The model is random except for its embedding and head, which make every turn a chain of
random words and a call with a random argument. So no two trajectories share more than their prompt and images. With
``--regions 10`` nearly all images differ.

First, all take one step on the same trajectories (greedy decoding), and their losses and gradient norms must agree.

    python bench/bench_agents.py        # prints what pytest records
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise

import harness
import numpy as np
import pytest
import torch
from bench_step import Clock, StepTimes, peak_bytes, trl_trainer_class
from PIL import Image
from step_models import make_model, make_processor
from support.paths import environment
from support.tool_models import END, HEADER, RESPONSE, TEMPLATE

SETTING = {"prompts": 2, "generations": 8, "turns": 3, "side": 448}
SIZES = {"width": 256, "layers": 6, "depth": 4, "vocab": 32000}
REGIONS = 3  # rows and columns
WORDS, CHOICES = 24, 4  # of a turn; between which each is chosen
CALL, CLOSE = '<tool_call>\n{"name": "zoom", "arguments": {"index": ', "}}\n</tool_call>"
STEPS = 2
PROVIDERS = {"vlmkernels": "vlmkernels", "TRL GRPOTrainer, patch_trl()": "trl patched", "TRL GRPOTrainer": "trl"}


def picture(index: int) -> Image.Image:
    side = SETTING["side"]
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8))


class Magnifier:
    """An environment whose tool shows a region of the prompt's image at the size of the whole."""

    def reset(self, images: list, **row) -> None:
        self.image = images[0]

    def zoom(self, index: int) -> list:
        """Return a region of the image.

        Args:
            index: which region, row by row.
        """
        row, column = divmod(index, REGIONS)
        width, height = self.image.width // REGIONS, self.image.height // REGIONS
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        return [{"type": "image", "image": self.image.crop(box).resize(self.image.size)}]


def chain() -> list[list[str]]:
    """The tokens between which the model chooses, one place after another, from the header of its turn to its end."""
    words = [[f"w{place}.{choice} " for choice in range(CHOICES)] for place in range(WORDS)]
    return [[HEADER], *words, [CALL], [str(index) for index in range(REGIONS**2)], [CLOSE], [END]]


def make_agent_model():
    """The processor and the model, whose next token depends on the last one only, up to the noise of its layers."""
    processor = make_processor(SETTING["side"])
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens(
        {"eos_token": END, "extra_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.add_tokens([token for place in chain() for token in place if token != END])
    processor.chat_template = tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.response_template = RESPONSE
    model = make_model(**SIZES)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    head = torch.nn.Parameter(0.02 * torch.randn(SIZES["vocab"], SIZES["width"], device=harness.DEVICE))
    model.lm_head.weight = head
    places = [tokenizer.convert_tokens_to_ids(place) for place in chain()]
    ids = [token for place in places for token in place]
    directions = dict(zip(ids, torch.linalg.qr(torch.randn(SIZES["width"], len(ids)))[0].T, strict=True))
    with torch.no_grad():
        for token, direction in directions.items():
            model.get_input_embeddings().weight[token] = 10 * SIZES["width"] ** 0.5 * direction
        for before, after in pairwise(places):
            head[after] += 2 * torch.stack([directions[token] for token in before]).sum(0).to(head.device)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id = tokenizer.eos_token_id
    return model, processor


def reward(completions, **_) -> list[float]:
    """Different for equal trajectories."""
    return [len(completion) + k * k % 7 / 3 for k, completion in enumerate(completions)]


def make_trainer(provider: str, steps: int, greedy: bool, budget: int | None = None):
    model, processor = make_agent_model()
    size, turns = SETTING["generations"], SETTING["turns"]
    image_tokens = (SETTING["side"] // 28) ** 2
    rows = [{"prompt": [{"role": "user", "content": "w?"}], "images": [picture(k)]} for k in range(SETTING["prompts"])]
    options = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": SETTING["prompts"] * size, "num_generations": size,
        "max_completion_length": turns * (WORDS + 32) + (turns - 1) * (image_tokens + 16), "max_steps": steps, "beta": 0.0,
        "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": harness.GPU,
        "gradient_checkpointing": False, "logging_steps": 1, "max_tool_calling_iterations": turns - 1,
        **({"top_k": 1, "entropy_coef": 0.1} if greedy else {}),  # without it, equal trajectories have no gradient
    }  # fmt: skip
    if provider.startswith("trl"):
        from datasets import Dataset

        trainer_class, config_class = trl_trainer_class(provider == "trl patched")
        rows = Dataset.from_list(rows * steps)
    else:
        from vlmkernels.train import GRPOConfig as config_class
        from vlmkernels.train import GRPOTrainer as trainer_class

        rows, options["max_tokens_per_microbatch"] = rows * steps, budget
    return trainer_class(
        model, reward, config_class(**options), rows, processing_class=processor, environment_factory=Magnifier
    )


def measure(provider: str, steps: int, greedy: bool, budget: int | None = None) -> dict:
    """Median seconds of a step and of its rollout, peak memory above the loaded model, and what the last step logged."""
    trainer, clock = make_trainer(provider, steps + 1, greedy, budget), Clock()
    if provider.startswith("trl"):
        clock.watch(trainer, "_generate", "rollout")
    else:
        clock.watch(type(trainer.engine), "__call__", "rollout")
    timer, before = StepTimes(clock), peak_bytes()
    trainer.add_callback(timer)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = timer.medians()
    parts["training"] = parts["step"] - parts["rollout"]
    peak = {"peak_mib": round((peak_bytes() - before) / 2**20, 1), "grad_norm": log["grad_norm"]}
    kept = ("loss", "tools/call_frequency", "completions/mean_length")
    return {**{name: round(value, 3) for name, value in parts.items()}, **peak, **{name: log[name] for name in kept}}


def in_process(provider: str, *options: str) -> dict:
    command = [sys.executable, __file__, "--provider", provider, "--regions", str(REGIONS), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> list[dict]:
    """A row per provider, after all have taken the same step."""
    checks = {name: in_process(provider, "--greedy", "--steps", "0") for name, provider in PROVIDERS.items()}
    for name in ("loss", "grad_norm", "tools/call_frequency", "completions/mean_length"):
        values = [check[name] for check in checks.values()]
        assert values == pytest.approx([values[-1]] * len(values), rel=1e-3, abs=1e-5), (name, values)
    results = {name: in_process(provider) for name, provider in PROVIDERS.items()}
    ours = results["vlmkernels"]
    return [
        {
            "provider": name, "ms": 1e3 * result["step"], "rounds": STEPS,
            "ratio_to_ours": round(result["step"] / ours["step"], 2), "peak_mib": result["peak_mib"],
            "parts": f"rollout {result['rollout']:.2f} s, training {result['training']:.2f} s; "
            f"{result['tools/call_frequency']:.1f} calls per trajectory; peak memory "
            f"{result['peak_mib'] / ours['peak_mib']:.2f} times ours",
        }
        for name, result in results.items()
    ]  # fmt: skip


def test_step_with_tools(benchmark):
    pytest.importorskip("trl")
    harness.record("step with a tool, " + ", ".join(f"{name} {value}" for name, value in SETTING.items()), rows())
    benchmark.pedantic(lambda: None)  # measured above, in other processes


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--provider")
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--regions", type=int, default=REGIONS, help="rows and columns of regions")
    parser.add_argument("--budget", type=int, help="max_tokens_per_microbatch of this trainer")
    args = parser.parse_args()
    REGIONS = args.regions
    if args.provider:
        print(json.dumps(measure(args.provider, args.steps, args.greedy, args.budget)))
    else:
        print("\n".join(harness.table(rows())))
