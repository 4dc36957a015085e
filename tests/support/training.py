"""Short training runs with fixed completions: what tests of the trainer, of reports and of models share."""

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from support import tiny
from vlmkernels.rollout.base import Engine, Rollout
from vlmkernels.train import GRPOConfig, GRPOTrainer


class Gradients(TrainerCallback):
    """A callback that keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def length_reward(completions, **kwargs):
    return [len(c[0]["content"]) / 4 for c in completions]


def vowel_reward(completions, **kwargs):
    """A reward that is None for some completions."""
    texts = [c[0]["content"] for c in completions]
    return [None if text.startswith("a") else float(sum(letter in "aeiou" for letter in text)) for text in texts]


def config(tmp_path, cls=GRPOConfig, **kwargs):
    """A configuration, of this package or of TRL, for one step of SGD on the CPU without any logging."""
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "shuffle_dataset": False,
    }
    return cls(**{**defaults, **kwargs})


def fixed_completions(num: int, first: int = 0, eos: int | None = None) -> list[list[int]]:
    """Completions of 2 to 6 of the 30 tokens from ``first`` on; every other one ends with the end-of-sequence token."""
    generator = torch.Generator().manual_seed(1)
    eos = tiny.tokenizer().eos_token_id if eos is None else eos
    out = []
    for index in range(num):
        ids = torch.randint(first, first + 30, (2 + index % 5,), generator=generator).tolist()
        out.append([*ids[:-1], eos] if index % 2 else ids)
    return out


class FixedGenerate(Engine):
    """Stands in for sampling: always the same completions."""

    def __init__(self, trainer, first=0):
        self.eos, self.pad, self.first = trainer.tokenizer.eos_token_id, trainer.tokenizer.pad_token_id, first

    def __call__(self, model, prompts, num_generations, temperature, samples=None):
        group = torch.arange(len(prompts.num_images)).repeat_interleave(num_generations)
        completions = fixed_completions(len(group), self.first, self.eos)
        width = max(map(len, completions))
        ids = torch.tensor([c + [self.pad] * (width - len(c)) for c in completions])
        mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in completions]).bool()
        return Rollout(prompts, group, ids, mask, torch.tensor([c[-1] != self.eos for c in completions]))


def perturb(model):
    """Change a reference model so that it differs from the policy."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num())


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def train(trainer, gradients):
    """Train, keep the gradients in the callback, and return the logs of the steps."""
    trainer.add_callback(gradients)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_ours(tmp_path, data, model=None, fixed=True, funcs=(length_reward, vowel_reward), peft_config=None, **options):
    """Train a tiny model. Returns the trainer, the logs of its steps and the gradients of its steps."""
    model = tiny.vlm() if model is None else model
    args = config(tmp_path, **options)
    trainer = GRPOTrainer(model, list(funcs), args, data, processing_class=tiny.processor(), peft_config=peft_config)
    if fixed:
        trainer.engine = FixedGenerate(trainer)
    gradients = Gradients()
    logs = train(trainer, gradients)
    return trainer, logs, gradients.steps
