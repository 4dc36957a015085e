"""The trainer of this package, whose completions share the prompt of their group, or run after copies of it."""

import tempfile
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch

from vlmkernels.conformance import Adapter, Documented, Sample, Sampled, pad, tiny
from vlmkernels.conformance.models import captured_positions
from vlmkernels.data.samples import read_sample
from vlmkernels.models.families import family_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.positions import prompt_positions
from vlmkernels.rollout.base import Rollout
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.prepare import encode_prompts


def _no_reward(completions: list, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def _kind_of(processor: Any) -> str:
    return {"Qwen2_5_VLProcessor": "qwen2_5_vl", "LlavaProcessor": "llava"}.get(type(processor).__name__, "text")


class _Trainer(Adapter):
    packages = ("vlmkernels",)
    models = ("text", "qwen2_5_vl", "llava")
    documented = (
        Documented(
            "process/images[qwen2_5_vl-*]",
            "Pixels stay uint8, each frame once, and their normalization is folded into the patch embedding",
            "docs/trainer.md, and the docstring of vlmkernels.models.vision.use_vision_ops",
        ),
    )
    share_prefix: ClassVar[bool]

    def _trainer(self, model: Any, processor: Any, samples: Sequence[Sample], **options: Any) -> GRPOTrainer:
        rows = [{"prompt": [{"role": "user", "content": sample.text}], "images": sample.pictures} for sample in samples]
        args = GRPOConfig(
            output_dir=tempfile.gettempdir(),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            max_steps=1,
            gradient_accumulation_steps=1,
            share_prefix=self.share_prefix,
            **options,
        )
        return GRPOTrainer(model, _no_reward, args, rows, processing_class=processor)

    def _prompts(self, trainer: GRPOTrainer, samples: Sequence[Sample]) -> ModelInputs:
        rows = [trainer.train_dataset[index] for index in range(len(samples))]
        read = [read_sample(row, index) for index, row in enumerate(rows)]
        return encode_prompts(read, trainer.processing_class, trainer.prepared, trainer.args)

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        groups = [[*group] for _, group in groupby(samples, key=lambda sample: (sample.text, sample.images))]
        prompts = [group[0] for group in groups]
        size = max(2, len(samples))  # of a micro-batch; the last may hold fewer completions
        trainer = self._trainer(
            model, processor, prompts, temperature=temperature, per_device_train_batch_size=size, num_generations=size
        )
        rows = [torch.tensor(sample.completion_ids) for sample in samples]
        rollout = Rollout(
            self._prompts(trainer, prompts),
            torch.arange(len(groups)).repeat_interleave(torch.tensor([*map(len, groups)])),
            completion_ids=pad(rows, trainer.tokenizer.pad_token_id),
            completion_mask=pad([torch.ones_like(row) for row in rows]).bool(),
            truncated=torch.zeros(len(rows), dtype=torch.bool),
        )
        models = trainer.objective.models
        logps = models.policy.logps(trainer.model, rollout, models.micro_batches.splits(rollout, 0))
        return [row[: len(ids)] for row, ids in zip(logps, rows, strict=True)]

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        trainer = self._trainer(
            tiny(_kind_of(processor))[0], processor, samples, per_device_train_batch_size=2, num_generations=2
        )
        return self._prompts(trainer, samples).inputs

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        kind = "qwen2_5_vl" if "mm_token_type_ids" in inputs else "llava" if "pixel_values" in inputs else "text"
        batch = ModelInputs.from_processor(inputs, family_of(tiny(kind)[0].config), torch.tensor([*num_images]))
        return [chunk.inputs for chunk in batch.split([len(batch) // num_chunks] * num_chunks)]

    def sample(
        self, model: Any, processor: Any, samples: Sequence[Sample], num_generations: int, max_tokens: int, temperature: float
    ) -> list[Sampled]:
        trainer = self._trainer(
            model,
            processor,
            samples,
            temperature=temperature,
            max_completion_length=max_tokens,
            per_device_train_batch_size=len(samples) * num_generations,
            num_generations=num_generations,
        )
        rows = trainer.samples.__getitems__([*range(len(samples))])
        _, rollout, _ = trainer._sample(trainer.samples, rows, num_generations, temperature)
        models = trainer.objective.models
        (split,) = models.micro_batches.splits(rollout, 0)
        targets = models.policy.scoring_batch(rollout, split).targets
        trained = targets.split(rollout.sampled_mask.sum(1).tolist())
        return [Sampled(ids, row.tolist()) for ids, row in zip(rollout.token_ids(), trained, strict=True)]


class SharedPrefix(_Trainer):
    name = "vlmkernels trainer, shared prefixes"
    share_prefix = True

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return prompt_positions(model, inputs)


class Copies(_Trainer):
    name = "vlmkernels trainer, copies of prompts"
    share_prefix = False

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return captured_positions(model, inputs)
