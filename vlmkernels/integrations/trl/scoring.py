"""``Scorer``: log-probabilities of TRL's micro-batches, without logits, with one copy of each prompt and image per group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmkernels.integrations.trl.features import FeatureCache
from vlmkernels.models import attention
from vlmkernels.models.families import TEXT, family_of, missing_token_ids, prefix_sharing_unsupported
from vlmkernels.models.head import call_in_head, logit_arguments, output_head
from vlmkernels.models.hunyuan import number_images_per_sample
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images, feature_reuse_unsupported
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.packs import ScoringBatch, pack_groups, pad_completions
from vlmkernels.models.positions import prompt_positions
from vlmkernels.ops.linear_logps import linear_logps


@dataclass(frozen=True)
class Options:
    """The options of ``patch_trl``, documented there. Raises ValueError or TypeError for invalid values."""

    share_prefix: str | bool = "auto"
    fast_images: bool = True
    regroup: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.share_prefix, bool) and self.share_prefix != "auto":
            raise ValueError(f"share_prefix must be 'auto', True or False, got {self.share_prefix!r}")
        for name in ("fast_images", "regroup"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of TRL, converted to the inputs of the model.

    Attributes:
        batch: the model inputs and the tokens to score.
        order: (B,) int64, the index in TRL's micro-batch of each row of ``mask``.
        mask: (B, C) bool, the completion tokens that ``batch`` scores.
    """

    batch: ScoringBatch
    order: torch.Tensor
    mask: torch.Tensor

    def select(self, loss_mask: torch.Tensor) -> "MicroBatch":
        """Score only the tokens in ``loss_mask``, (B, C) bool in TRL's order."""
        mask = loss_mask[self.order] & self.mask
        return replace(self, batch=self.batch.select(mask[self.mask]), mask=mask)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Return values (N,) of the scored tokens as (B, C) in TRL's order, with 0 elsewhere."""
        rows = torch.zeros_like(self.mask, dtype=values.dtype).masked_scatter(self.mask, values)
        return rows[self.order.argsort()]


def _sharing_unsupported(model: PreTrainedModel, trainer: Any) -> str | None:
    """Return why completions cannot share a prompt in ``model`` under the settings of a TRL trainer, or None if they can."""
    try:
        reason = prefix_sharing_unsupported(model)
    except NotImplementedError as error:  # a model of no family
        return f"{type(model).__name__}: {error}"
    if reason is not None:
        return reason
    if trainer.use_transformers_continuous_batching:
        return "use_transformers_continuous_batching sets its own attention implementation"
    return None


class Scorer:
    """Scores the models of one TRL trainer.

    Attributes:
        copies_reason: why each completion of a group is scored after its own copy of the prompt, or None if they share one.
        sampling_reason: the same for sampling with transformers. Set by the trainer.
        features: the image features of the policy, if its vision tower is frozen.
        missing_tokens: ids of the model's vocabulary without a token, which are not sampled.

    Args:
        trainer: a constructed TRL trainer.
        options: the options of this integration.

    Raises:
        ValueError: ``share_prefix`` is True and the model does not support it.
        NotImplementedError: the model changes its logits after the head in an unknown way.
    """

    features: FeatureCache | None = None
    sampling_reason: str | None = None

    def __init__(self, trainer: Any, options: Options) -> None:
        self._unwrap = trainer.accelerator.unwrap_model
        self._autocast = trainer.accelerator.autocast
        model = self._unwrap(trainer.model)
        self._arguments = logit_arguments(model, output_head(model)) | {"temperature": trainer.temperature}
        self._fp32_head = getattr(trainer.args, "cast_lm_head_to_fp32", False)
        base = base_model(model)
        models = [base] if trainer.ref_model is None else [base, base_model(self._unwrap(trainer.ref_model))]
        for each in models:
            number_images_per_sample(each)
        self.missing_tokens = missing_token_ids(base.config, trainer.processing_class)
        reason = _sharing_unsupported(base, trainer)
        if options.share_prefix is True and reason is not None:
            raise ValueError(f"share_prefix must be 'auto' or False: {reason}, got True")
        self.copies_reason = reason if options.share_prefix else "share_prefix is False"
        if self.shares_prefix:
            self._family = family_of(base.config)
            for each in models:
                attention.use_tree_attention(each)
            # FSDP2 gathers the vision tower only within a forward pass of the whole model.
            if self._family is not TEXT and feature_reuse_unsupported(base) is None and not trainer.is_fsdp_enabled:
                self.features = FeatureCache(base)

    @property
    def shares_prefix(self) -> bool:
        """Whether the completions of a group are scored after one shared copy of their prompt."""
        return self.copies_reason is None

    def logps(
        self, model: torch.nn.Module, micro: MicroBatch, return_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Return the log-probabilities (B, C), the entropies (B, C) or None, and the model's output."""
        result, output = self.run(model, micro, partial(linear_logps, return_entropy=return_entropy))
        logps, entropy = result if return_entropy else (result, None)
        return micro.unpack(logps), None if entropy is None else micro.unpack(entropy), output

    def run(self, model: torch.nn.Module, micro: MicroBatch, function: Callable[..., Any]) -> tuple[Any, Any]:
        """Call ``function`` in place of the head of ``model``; see ``call_in_head``."""
        function = partial(function, **self._arguments)
        head = output_head(self._unwrap(model))
        return call_in_head(model, micro.batch, head, _in_fp32(function) if self._fp32_head else function)

    def model_stub(
        self,
        model: torch.nn.Module,
        width: int,
        num_images: list[int] | None,
        score: Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor | None, Any]],
    ) -> Callable[..., SimpleNamespace]:
        """Return a function that TRL's ``_get_per_token_logps_and_entropies`` calls as its model.

        TRL's method calls it once per batch with the model inputs that it has built, and reads log-probabilities, entropies and
        the auxiliary loss from the result.

        Args:
            model: the model to run.
            width: C, the number of tokens of a completion with padding.
            num_images: the number of images of each row, or None without images.
            score: a function that scores a batch and returns the same as ``logps``.
        """
        remaining: Iterator[int] = iter(num_images or ())

        def forward(*, labels: Any, fused_lm_head: Any, **inputs: torch.Tensor) -> SimpleNamespace:
            images = list(islice(remaining, len(inputs["input_ids"]))) if num_images else None
            logps, entropy, output = score(self.micro_batch(model, inputs, width, images))
            return SimpleNamespace(log_probs=logps, entropy=entropy, aux_loss=output.get("aux_loss"))

        return forward

    def micro_batch(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], width: int, num_images: list[int] | None
    ) -> MicroBatch:
        """Convert the model inputs from TRL, in which the last ``width`` tokens are completions."""
        completion_mask = inputs["attention_mask"][:, -width:].bool()
        completion_ids = inputs["input_ids"][:, -width:]
        if not self.shares_prefix or self._has_images(completion_ids):
            order = torch.arange(len(completion_mask), device=completion_mask.device)
            return MicroBatch(pad_completions(inputs, completion_mask), order, completion_mask)
        axis = self._family.axis
        options = {name: x for name, x in inputs.items() if not isinstance(x, torch.Tensor)}  # as output_router_logits
        tensors = {name: x for name, x in inputs.items() if name not in options}
        prompts = {name: x[:, :-width] if axis(name) == "token" else x for name, x in tensors.items()}
        base = base_model(self._unwrap(model))
        prompts, group = self.groups(base, prompts, num_images)
        order = group.argsort(stable=True)
        group, order = group[order], order.to(completion_mask.device)
        positions = prompt_positions(base, prompts.inputs)
        inputs = deduplicate_images(prompts) if accepts_image_features(base) else prompts.inputs
        batch = pack_groups(inputs, positions, group, completion_ids[order], completion_mask[order], self._family)
        batch.inputs.update(options)
        return MicroBatch(batch, order, completion_mask[order])

    def groups(
        self, base: torch.nn.Module, inputs: dict[str, torch.Tensor], num_images: list[int] | None
    ) -> tuple[ModelInputs, torch.Tensor]:
        """Return the distinct prompts in model inputs, by first occurrence, and the index (B,) of each row's prompt."""
        counts = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64) if num_images is None else torch.tensor(num_images)
        prompts = ModelInputs.from_processor(inputs, self._family, counts)
        first, group = prompts.originals().unique(return_inverse=True)
        prompts = prompts.select(first)
        if self.features is not None and self.features.model is base:
            with self._autocast():
                return self.features.encode(prompts), group
        return replace(prompts, image_keys=prompts.equal_images()), group

    def _has_images(self, completion_ids: torch.Tensor) -> bool:
        """Return whether a completion contains image tokens, as results of tools can."""
        image = self._family.image_token_id
        return image is not None and bool((completion_ids == image).any())


def _in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function for ``call_in_head`` run in fp32 and without autocast (cast_lm_head_to_fp32)."""

    def wrapped(hidden: torch.Tensor, weight: torch.Tensor, *args: Any, bias: torch.Tensor | None, **kwargs: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden.float(), weight.float(), *args, bias=None if bias is None else bias.float(), **kwargs)

    return wrapped
