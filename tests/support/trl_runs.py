"""Short runs of TRL's trainers with tiny models, started as in a training script."""

import contextlib
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

from support import tiny_families

STEPS = 6  # two generation batches
TIMES = ("step_time", "runtime", "per_second")


@dataclass
class Run:
    """A finished run: TRL's logs without times, and the trained parameters."""

    trainer: trl.GRPOTrainer | trl.RLOOTrainer
    logs: list[dict]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.trainer.model.named_parameters() if p.requires_grad}


def spread(completions, **_) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def length(completions, **_) -> list[float | None]:
    """A reward that is None for some completions."""
    sizes = [len(completion[0]["content"]) for completion in completions]
    return [None if size % 5 == 4 else float(size) for size in sizes]


def rows(num: int, sizes: list[list[tuple[int, int]]]) -> list[dict]:
    """Rows with images of the given sizes (row k has ``sizes[k % len(sizes)]``). Rows with images share one text."""
    result = []
    for index in range(num):
        noise, chosen = np.random.default_rng(index), sizes[index % len(sizes)]
        images = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in chosen]
        text = "why?" if images else "why?" * (1 + index % 3)
        result.append({"prompt": [{"role": "user", "content": text}]} | ({"images": images} if images else {}))
    return result


def _template(image: str) -> str:
    part = "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
    parts = "{% for part in message.content %}" + part + "{% endfor %}"
    content = "{% if message.content is string %}{{ message.content }}{% else %}" + parts + "{% endif %}"
    return "{% for message in messages %}" + content + "{% endfor %}"


def tiny_model(name: str):
    """(model, processor) of ``tiny_families``. Many tokens end a completion, so that lengths differ."""
    if name == "moe":
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(**tiny_families.TEXT, **tiny_families.EXPERTS, decoder_sparse_step=1)
        model, processor, image = transformers.Qwen3MoeForCausalLM(config), tiny_families.tokenizer(), ""
    else:
        case = tiny_families.case(name)
        model, processor, image = case.model, case.processor, case.image
    processor.chat_template = _template(image)
    model.generation_config.eos_token_id = [2, *range(100, 140)]
    return model, processor


class FixedEngine:
    """Stands in for vLLM: completions and log-probabilities from a fixed seed, one log-probability missing."""

    def __init__(self, **_):
        self.rng = np.random.default_rng(0)

    def sync_weights(self) -> None: ...

    def generate(self, prompts, images, num_generations, profiler):
        ids = [self.rng.integers(150, 250, self.rng.integers(2, 7)).tolist() for _ in prompts]
        logps = [[[-5.5 + 0.3 * self.rng.standard_normal()] for _ in completion] for completion in ids]
        logps[1][0] = [None]
        return None, ids, logps, None


def build(path, trainer, model, processor, data, *, config=trl.GRPOConfig, peft_config=None, **options):
    """``trainer(...)`` that trains a copy of ``model``.

    It uses SGD: AdamW takes full steps even for gradients that are only rounding errors.
    """
    model.save_pretrained(path / "model")  # TRL reads the reference model by its path
    model = type(model).from_pretrained(path / "model", dtype=torch.float32)
    defaults = {
        "output_dir": str(path), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "num_iterations": 3, "max_steps": STEPS, "optim": "sgd", "learning_rate": 0.05, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return trainer(
        model,
        [spread, length],
        args=config(**defaults | options),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data[:2]) if "eval_strategy" in options else None,
        processing_class=processor,
        peft_config=peft_config,
    )


def train(trainer) -> Run:
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    logs = [{k: v for k, v in log.items() if not k.endswith(TIMES)} for log in trainer.state.log_history]
    return Run(trainer, logs)
