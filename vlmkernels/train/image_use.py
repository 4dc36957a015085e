"""How much the predictions of a model depend on its images: their KL divergence from those with the images greyed."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmkernels.models.branches import pad_branches
from vlmkernels.models.head import call_in_head, logit_arguments, output_head
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import inference
from vlmkernels.models.masked_images import GREY, exchange_images, has_media, mask_images, media_of, uniform_pixels
from vlmkernels.models.packs import ScoringBatch
from vlmkernels.ops.linear_kl import linear_kl
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.prepare import PreparedModel

DEFAULT_STEPS = 10  # between measurements with diagnose
MAX_PROMPTS, MAX_COMPLETIONS = 4, 8  # prompts and completions of a generation batch that are measured
Measure = Callable[[torch.nn.Module, Rollout], dict[str, float]]  # of a model and a rollout: returns metrics


def image_use(
    model: PreTrainedModel,
    processor: Any,
    prompts: ModelInputs,
    group: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    exchange: bool = False,
) -> torch.Tensor:
    """Measure how much a model's predictions of completion tokens depend on the images of the prompts.

    Args:
        model: a transformers model, perhaps with adapters.
        processor: its processor.
        prompts: the model inputs of P prompts, from ``vlmkernels.data.samples.encode``, with pixels.
        group: (n,) int64 on the CPU, the prompt of each completion, ascending.
        completion_ids, completion_mask: (n, C), right-padded completions and their tokens, bool.
        temperature: divides the logits.
        exchange: compare with the images of other prompts in place of grey images; see ``exchange_images``.

    Returns:
        (N,) fp32, for each token of the completions whose prompt has an image or video (with ``exchange``: has other images),
        the KL divergence in nats from the next-token distribution with the images to that with grey images in their place, over
        the whole vocabulary. An image that is ignored gives 0.
    """
    if exchange:
        others, differs = exchange_images(prompts)
    else:
        others, differs = mask_images(prompts, uniform_pixels(processor, GREY, media_of(prompts))), has_media(prompts)
    chosen = differs[group]
    if not chosen.any():
        return torch.zeros(0, device=completion_ids.device)
    completions = group[chosen], *(x[chosen.to(x.device)] for x in (completion_ids, completion_mask.bool()))
    head = output_head(model)
    batch = pad_branches(prompts, others, *completions, completions[-1])
    with inference(model):
        return _divergence(model, batch, head, logit_arguments(model, head), temperature)


def steps_between(args: GRPOConfig, media: set[str], *, has_tools: bool) -> int | None:
    """Return how many optimizer steps are between measurements; None: never.

    Args:
        media: the kinds of media that training can have.
    """
    if args.image_use_steps is None and args.diagnose and media and not has_tools:
        return DEFAULT_STEPS
    return args.image_use_steps


class ImageUse:
    """Measures the divergence of ``image_use`` in training, on a few completions of a generation batch.

    Both branches run in one forward pass without gradients, and share what they can. No random state changes.

    Args:
        processor: the processor of the policy.
        policy: how the policy runs.
        media: the kinds of media that training can have.
        every: optimizer steps between measurements.
    """

    def __init__(self, processor: Any, policy: PreparedModel, args: GRPOConfig, media: set[str], every: int) -> None:
        self._policy, self._args, self._every = policy, args, every
        self._prepared_at: int | None = None
        self._grey = uniform_pixels(processor, GREY, media, policy.processor_arguments)

    def is_due(self, step: int) -> bool:
        """Whether to measure the generation batch that is sampled after ``step`` optimizer steps."""
        args = self._args
        steps = max(args.steps_per_rollout // args.gradient_accumulation_steps, 1)  # that train on the batch
        return -step % self._every < steps

    def prepare(self, prompts: ModelInputs, step: int) -> Measure | None:
        """Return a function that measures the completions of ``prompts``, or None if it is not time to.

        A step is measured once: dynamic sampling samples several times for a batch.

        Args:
            prompts: the prompts of a generation batch, with pixels.
            step: number of optimizer steps done.
        """
        if step == self._prepared_at or not self.is_due(step):
            return None
        self._prepared_at = step
        chosen = has_media(prompts).nonzero()[:MAX_PROMPTS, 0]
        return partial(self._measure, chosen, mask_images(prompts.select(chosen), self._grey))

    def _measure(self, chosen: torch.Tensor, grey: ModelInputs, model: torch.nn.Module, rollout: Rollout) -> dict[str, float]:
        """Return the metrics. ``chosen`` are the prompts with images, ``grey`` their inputs with grey images."""
        if not len(chosen):
            return {"image_use/kl": math.nan}
        policy, args, number = self._policy, self._args, MAX_COMPLETIONS // len(chosen)
        members = [(rollout.group == prompt).nonzero()[:number, 0] for prompt in chosen.tolist()]
        samples = torch.cat(members)
        part = Rollout(
            rollout.prompts.select(chosen),
            torch.arange(len(chosen)).repeat_interleave(torch.tensor([*map(len, members)])),
            rollout.completion_ids[samples],
            rollout.completion_mask[samples],
            rollout.truncated[samples],
            masked_prompts=grey,
        )
        if policy.reuses_image_features:
            part = part.with_image_features(policy.model)
        shared, size = policy.model if policy.shares_prefix else None, policy.model.config.get_text_config().hidden_size
        options = {"shared": policy.shares_prefix, "hidden_size": size, "branches": True}
        found = []
        with inference(model):
            for some in part.parts(slice(None), args.max_tokens_per_microbatch, **options):
                batch = part.branches(some, shared, part.completion_mask[some])
                found.append(_divergence(model, batch, policy.head, policy.logit_arguments, args.temperature))
        return {"image_use/kl": float(torch.cat(found).mean())}


def _divergence(
    model: torch.nn.Module, batch: ScoringBatch, head: torch.nn.Module, arguments: dict[str, float], temperature: float
) -> torch.Tensor:
    """Return the divergence, (N,), of the tokens of a batch whose second half scores the same tokens with other images."""
    others = {f"teacher_{name}": value for name, value in arguments.items()}

    def divergence(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, rows: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        images, other = rows.split(len(targets) // 2) if len(targets) else (rows, rows)
        options = {"rows": images, "teacher_rows": other, "bias": bias, "teacher_bias": bias, "temperature": temperature}
        return linear_kl(hidden, weight, hidden, weight, beta=1.0, **options, **arguments, **others)

    return call_in_head(model, batch, head, divergence)[0]
