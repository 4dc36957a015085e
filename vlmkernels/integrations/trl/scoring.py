"""``Scorer``: log-probabilities of TRL's micro-batches, without logits, with one copy of each prompt and image per group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from vlmkernels.integrations.trl.features import FeatureCache
from vlmkernels.integrations.trl.segments import shared_rows, single_images, split_rows, tokens_per_image
from vlmkernels.models import attention
from vlmkernels.models.branches import pack_branches, pad_branches
from vlmkernels.models.families import TEXT, family_of, missing_token_ids, prefix_sharing_unsupported
from vlmkernels.models.head import call_in_head, logit_arguments, output_head
from vlmkernels.models.hunyuan import number_images_per_sample
from vlmkernels.models.image_features import (
    accepts_image_features,
    deduplicate_images,
    encode_images,
    feature_reuse_unsupported,
)
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.masked_images import (
    BLACK,
    MASK_RATIO,
    check_mask_ratio,
    has_media,
    mask_images,
    patch_size_of,
    uniform_pixels,
)
from vlmkernels.models.packs import ScoringBatch, pack_groups, pad_completions
from vlmkernels.models.positions import prompt_positions
from vlmkernels.models.trajectories import Turns, pack_turns
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import PERCEPTION_WEIGHTS
from vlmkernels.ops.linear_logps import linear_logps

if TYPE_CHECKING:
    from vlmkernels.integrations.trl.sequences import Sequences

logger = logging.get_logger(__name__)

UNKNOWN_IMAGES = "in which it is unknown which images belong to the completions"


@dataclass(frozen=True)
class Options:
    """The options of ``patch_trl``, documented there. Raises ValueError or TypeError for invalid values."""

    share_prefix: str | bool = "auto"
    fast_images: bool = True
    regroup: bool = False
    perception_loss_weight: float = 0.0
    der_loss_weight1: float = 0.0
    der_loss_weight2: float = 0.0
    mask_ratio: float = MASK_RATIO

    def __post_init__(self) -> None:
        if not isinstance(self.share_prefix, bool) and self.share_prefix != "auto":
            raise ValueError(f"share_prefix must be 'auto', True or False, got {self.share_prefix!r}")
        for name in ("fast_images", "regroup"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        GRPOLossConfig(**self.perception_weights)
        check_mask_ratio(self.mask_ratio)

    @property
    def perception_weights(self) -> dict[str, float]:
        """The weights of the terms of masked images, by the names in ``GRPOLossConfig``."""
        return {name: getattr(self, name) for name in PERCEPTION_WEIGHTS}

    @property
    def masks_images(self) -> bool:
        """Whether the loss has terms of masked images."""
        return any(self.perception_weights.values())


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of TRL, converted to the inputs of the model.

    Attributes:
        batch: the model inputs and the tokens to score.
        order: (B,) int64, the index in TRL's micro-batch of each row of ``mask``.
        mask: (B, C) bool, the completion tokens that ``batch`` scores.
        masked: (B,) bool, the rows of ``mask`` whose tokens ``batch`` scores again, with masked images. None: all tokens once.
    """

    batch: ScoringBatch
    order: torch.Tensor
    mask: torch.Tensor
    masked: torch.Tensor | None = None

    def select(self, loss_mask: torch.Tensor) -> "MicroBatch":
        """Score only the tokens in ``loss_mask``, (B, C) bool in TRL's order."""
        mask = loss_mask[self.order] & self.mask
        kept = mask[self.mask]
        if self.masked is not None:
            kept = torch.cat([kept, mask[self.masked][self.mask[self.masked]]])
        return replace(self, batch=self.batch.select(kept), mask=mask)

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
        has_tools: whether completions have several turns, between which tools are called.
        sequences: in sampling with tools, the completions whose next turns may follow.
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
    sequences: "Sequences | None" = None

    def __init__(self, trainer: Any, options: Options) -> None:
        self._unwrap = trainer.accelerator.unwrap_model
        self._autocast = trainer.accelerator.autocast
        model = self._unwrap(trainer.model)
        self._arguments = logit_arguments(model, output_head(model)) | {"temperature": trainer.temperature}
        self.has_tools = bool(getattr(trainer, "tools", None))
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
        if options.masks_images:
            self._family, self._mask_ratio = family_of(base.config), options.mask_ratio
            self._black = uniform_pixels(trainer.processing_class, BLACK)
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
        seed: int | None = None,
    ) -> Callable[..., SimpleNamespace]:
        """Return a function that TRL's ``_get_per_token_logps_and_entropies`` calls as its model.

        TRL's method calls it once per batch with the model inputs that it has built, and reads log-probabilities, entropies and
        the auxiliary loss from the result.

        Args:
            model: the model to run.
            width: C, the number of tokens of a completion with padding.
            num_images: the number of images of each row, or None without images.
            score: a function that scores a batch and returns the same as ``logps``.
            seed: run the completions with masked images too; the seed of the masks.
        """
        remaining: Iterator[int] = iter(num_images or ())

        def forward(*, labels: Any, fused_lm_head: Any, **inputs: torch.Tensor) -> SimpleNamespace:
            images = list(islice(remaining, len(inputs["input_ids"]))) if num_images else None
            convert = self.micro_batch if seed is None else partial(self.branches, seed=seed)
            logps, entropy, output = score(convert(model, inputs, width, images))
            return SimpleNamespace(log_probs=logps, entropy=entropy, aux_loss=output.get("aux_loss"))

        return forward

    def micro_batch(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], width: int, num_images: list[int] | None
    ) -> MicroBatch:
        """Convert the model inputs from TRL, in which the last ``width`` tokens are completions."""
        completion_mask = inputs["attention_mask"][:, -width:].bool()
        options = {name: x for name, x in inputs.items() if not isinstance(x, torch.Tensor)}  # as output_router_logits
        tensors = {name: x for name, x in inputs.items() if name not in options}
        packed = self._pack(base_model(self._unwrap(model)), tensors, width, num_images) if self.shares_prefix else None
        if packed is None:
            order = torch.arange(len(completion_mask), device=completion_mask.device)
            return MicroBatch(pad_completions(inputs, completion_mask), order, completion_mask)
        batch, order = packed
        batch.inputs.update(options)
        order = order.to(completion_mask.device)
        return MicroBatch(batch, order, completion_mask[order])

    def branches(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        width: int,
        num_images: list[int] | None,
        *,
        seed: int,
    ) -> MicroBatch:
        """Convert the model inputs from TRL, and add the completions after prompts with masked images.

        Args:
            seed: the seed of the masks.
        """
        base, axis = base_model(self._unwrap(model)), self._family.axis
        options = {name: x for name, x in inputs.items() if not isinstance(x, torch.Tensor)}
        tensors = self._accepted({name: x for name, x in inputs.items() if name not in options})
        rows = self.rows({name: x[:, :-width] if axis(name) == "token" else x for name, x in tensors.items()}, num_images)
        first, group = rows.originals().unique(return_inverse=True)
        order = group.argsort(stable=True)
        prompts = rows.select(first)
        generator, size = torch.Generator().manual_seed(seed), patch_size_of(base.config)
        masked = mask_images(prompts, self._black, self._mask_ratio, generator=generator, patch_size=size)
        is_masked = has_media(prompts)[group[order]]
        if self.features is not None and self.features.model is base:
            with self._autocast():
                masked = encode_images(base, masked)
        prompts = self.encoded(base, prompts)
        places = order.to(inputs["input_ids"].device)
        ids, mask = inputs["input_ids"][places, -width:], inputs["attention_mask"][places, -width:].bool()
        completions = group[order], ids, mask, mask
        if self.shares_prefix:
            batch = pack_branches(base, prompts, masked, *completions)
        else:
            batch = pad_branches(prompts, masked, *completions)
        batch.inputs.update(options)
        return MicroBatch(batch, places, mask, is_masked.to(places.device))

    def _pack(
        self, base: torch.nn.Module, inputs: dict[str, torch.Tensor], width: int, num_images: list[int] | None
    ) -> tuple[ScoringBatch, torch.Tensor] | None:
        """Return a pack in which each prompt occurs once, and the row (B,) of each of its completions; or None."""
        has_images = self._has_images(inputs["input_ids"][:, -width:])
        packed = self._pack_turns(base, inputs, width, num_images) if self.has_tools or has_images else None
        if packed is None and has_images:
            logger.warning_once(f"Prefix sharing: disabled in training for micro-batches {UNKNOWN_IMAGES}")
            return None
        return self._pack_groups(base, inputs, width, num_images) if packed is None else packed

    def _pack_groups(
        self, base: torch.nn.Module, inputs: dict[str, torch.Tensor], width: int, num_images: list[int] | None
    ) -> tuple[ScoringBatch, torch.Tensor]:
        """Return a pack of completions without images. See ``_pack``."""
        axis = self._family.axis
        prompts = {name: x[:, :-width] if axis(name) == "token" else x for name, x in self._accepted(inputs).items()}
        batch, group = self.groups(base, prompts, num_images)
        order = group.argsort(stable=True)
        ids, mask = (inputs[name][:, -width:][order.to(inputs[name].device)] for name in ("input_ids", "attention_mask"))
        positions = prompt_positions(base, batch.inputs)
        prompts = deduplicate_images(batch) if accepts_image_features(base) else batch.inputs
        return pack_groups(prompts, positions, group[order], ids, mask.bool(), self._family), order

    def _pack_turns(
        self, base: torch.nn.Module, inputs: dict[str, torch.Tensor], width: int, num_images: list[int] | None
    ) -> tuple[ScoringBatch, torch.Tensor] | None:
        """Return a pack in which equal beginnings of the completions of a prompt occur once too. See ``_pack``.

        It is None if it is unknown which images belong to the prompts.
        """
        rows = self.rows(inputs, num_images)
        spans, length = self._family.bidirectional, inputs["input_ids"].shape[1]
        if tokens_per_image(rows) is None or (spans is not None and spans.linked and self._has_images(inputs["input_ids"])):
            return None
        images = single_images(rows)
        if images is None and rows.num_images.any():
            return None
        image_keys = torch.empty(0, dtype=torch.int64) if images is None else images.originals()
        shared = shared_rows(rows, image_keys, length - width)
        ends = (length - width + inputs["attention_mask"][:, -width:].sum(1)).tolist()
        bounds = [[0, length - width, *cuts, end, length] for cuts, end in zip(shared.cuts, ends, strict=True)]
        segments = split_rows(rows, bounds)
        if segments is None:
            return None
        segments = self.encoded(base, replace(segments, image_keys=image_keys))
        counts = torch.tensor([len(bound) - 1 for bound in bounds])
        starts = counts.cumsum(0) - counts
        first, group = shared.group.unique(return_inverse=True)
        turns = torch.cat([torch.arange(start + 1, start + count - 1) for start, count in zip(starts, counts, strict=True)])
        owners = torch.arange(len(counts)).repeat_interleave(counts - 2)
        turns = Turns(segments.select(turns), owners, torch.ones(len(owners), dtype=torch.bool))
        order = group.argsort(stable=True)
        return pack_turns(base, segments.select(starts[first]), group.tolist(), turns, order.tolist()), order

    def groups(
        self, base: torch.nn.Module, inputs: dict[str, torch.Tensor], num_images: list[int] | None
    ) -> tuple[ModelInputs, torch.Tensor]:
        """Return the distinct prompts in model inputs, by first occurrence, and the index (B,) of each row's prompt."""
        prompts = self.rows(inputs, num_images)
        first, group = prompts.originals().unique(return_inverse=True)
        return self.encoded(base, prompts.select(first)), group

    def rows(self, inputs: dict[str, torch.Tensor], num_images: list[int] | None) -> ModelInputs:
        """Return model inputs as ``ModelInputs``."""
        inputs = self._accepted(inputs)
        counts = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64) if num_images is None else torch.tensor(num_images)
        return ModelInputs.from_processor(inputs, self._family, counts)

    def _accepted(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop the token types that TRL adds to inputs with images of tools also for models that do not accept any."""
        return {name: x for name, x in inputs.items() if name != "token_type_ids" or name in self._family.inputs}

    def encoded(self, base: torch.nn.Module, batch: ModelInputs) -> ModelInputs:
        """Return model inputs with image features if the vision tower is frozen, and with the keys of equal images if not."""
        if self.features is not None and self.features.model is base:
            with self._autocast():
                return self.features.encode(batch)
        return replace(batch, image_keys=batch.equal_images()) if batch.image_keys is None else batch

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
