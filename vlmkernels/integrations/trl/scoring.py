"""Log-probabilities of TRL's micro-batches: prompts and images once per group, no logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.utils import logging

from vlmkernels.integrations.trl.features import Features
from vlmkernels.models import attention
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.models.group import ScoringBatch, pack_groups, pad_completions, prompt_positions, why_not_shared
from vlmkernels.models.head import in_head, logit_arguments, output_head
from vlmkernels.models.image_features import once_per_image, takes_features, why_not_frozen
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require
from vlmkernels.ops.linear_logps import linear_logps

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Options:
    """What ``patch_trl`` and the trainers of this module take beside TRL's own arguments.

    share_prefix: "auto": prompts and images run once for the completions that share them, in models that allow it, with a
        notice where they do not; True: an error there; False: a copy for every completion, as TRL does.
    fast_images: ``FastImageProcessor`` in the place of ``Qwen2VLImageProcessor``.
    regroup: TRL shuffles rows before it cuts them into micro-batches; True brings the rows that one optimiser step adds up into
        the order of their prompts again, so that more of them share one. Losses, gradients and parameters stay TRL's; of the
        metrics, means of micro-batches are of others than TRL's.
    """

    share_prefix: str | bool = "auto"
    fast_images: bool = True
    regroup: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.share_prefix, bool):
            require(self.share_prefix == "auto", "share_prefix", "be 'auto', True or False", repr(self.share_prefix))
        for name in ("fast_images", "regroup"):
            require(isinstance(getattr(self, name), bool), name, "be a bool", repr(getattr(self, name)), TypeError)


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` without adapters."""
    return model.get_base_model() if is_peft_model(model) else model


def _why_not_shared(model: torch.nn.Module) -> str | None:
    """``why_not_shared``, of models without a row in the table of families and other attentions too."""
    try:
        reason = why_not_shared(model)
    except NotImplementedError as error:
        return f"{type(model).__name__}: {error}"
    chosen = model.config.get_text_config()._attn_implementation
    if reason is None and chosen not in ("sdpa", "eager", attention.NAME):
        return f"attn_implementation must be 'sdpa', 'eager' or {attention.NAME!r}, got {chosen!r}"
    return reason


@dataclass(frozen=True)
class Micro:
    """A micro-batch as the model runs it.

    batch: its tokens. order: (B,) int64, the rows of TRL's in the order in which they are run. tokens: (B, C) bool, in that
    order, which of their completions' positions the batch scores.
    """

    batch: ScoringBatch
    order: torch.Tensor
    tokens: torch.Tensor

    def of(self, counts: torch.Tensor) -> "Micro":
        """With some of the tokens alone; counts: (B, C) bool, in TRL's order."""
        counts = counts[self.order] & self.tokens
        return replace(self, batch=self.batch.of(counts[self.tokens]), tokens=counts)

    def unpacked(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C) in TRL's order, 0 where there is no token, of values (N,) of the batch's tokens."""
        rows = torch.zeros_like(self.tokens, dtype=values.dtype).masked_scatter(self.tokens, values)
        return rows[self.order.argsort()]


class Scoring:
    """How the models of one of TRL's trainers are scored.

    shares: whether prompts run once for the completions that share them. features: of the policy's images, where its vision
    tower is frozen.
    """

    features: Features | None = None

    def __init__(self, trainer, options: Options) -> None:
        self._unwrap, self._autocast = trainer.accelerator.unwrap_model, trainer.accelerator.autocast
        model = self._unwrap(trainer.model)
        self._arguments = logit_arguments(model, output_head(model)) | {"temperature": trainer.temperature}
        self._fp32_head = getattr(trainer.args, "cast_lm_head_to_fp32", False)
        reason = _why_not_shared(base_of(model))
        if reason is None and trainer.aux_loss_enabled:
            reason = "the router's loss counts the tokens of every copy of a prompt; router_aux_loss_coef=0 leaves it out"
        if reason is None and trainer.use_transformers_continuous_batching:
            reason = "use_transformers_continuous_batching sets an attention of its own"
        require(options.share_prefix is not True or reason is None, "share_prefix", f"be 'auto' or False: {reason}", True)
        if options.share_prefix and reason is not None:
            logger.warning_once(f"Prompts and images run once per completion, as TRL runs them: {reason}")
        self.shares = bool(options.share_prefix) and reason is None
        if self.shares:
            self._family = family_of(base_of(model).config)
            for each in filter(None, (model, trainer.ref_model)):
                attention.use_group_attention(base_of(self._unwrap(each)))
            # Under FSDP2 the tower runs within the whole model alone.
            if self._family is not TEXT and why_not_frozen(base_of(model)) is None and not trainer.is_fsdp_enabled:
                self.features = Features(base_of(model))

    def micro(self, model: torch.nn.Module, inputs: dict, width: int, num_images: list[int] | None) -> Micro:
        """TRL's inputs of a model, whose last ``width`` tokens are completions, as the model is to run them."""
        tokens = inputs["attention_mask"][:, -width:].bool()
        completions = inputs["input_ids"][:, -width:]
        if not self.shares or self._has_images(completions):
            return Micro(pad_completions(inputs, tokens), torch.arange(len(tokens), device=tokens.device), tokens)
        axis = self._family.axis
        prompts = {name: x[:, :-width] if axis(name) == "token" else x for name, x in inputs.items()}
        base = base_of(self._unwrap(model))
        prompts, group = self.groups(base, prompts, num_images)
        order = group.argsort(stable=True)
        group, order = group[order], order.to(tokens.device)
        positions = prompt_positions(base, prompts.inputs)
        inputs = once_per_image(prompts) if takes_features(base) else prompts.inputs
        return Micro(pack_groups(inputs, positions, group, completions[order], tokens[order]), order, tokens[order])

    def groups(self, base: torch.nn.Module, inputs: dict, num_images: list[int] | None) -> tuple[Batch, torch.Tensor]:
        """The prompts among a model's inputs, each once, in the order in which they first come; the prompt (B,) of each row."""
        counts = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64) if num_images is None else torch.tensor(num_images)
        prompts = Batch.of(inputs, self._family, counts)
        first, group = prompts.originals().unique(return_inverse=True)
        prompts = prompts.select(first)
        if self.features is not None and self.features.model is base:
            with self._autocast():
                return self.features.of(prompts), group
        return replace(prompts, image_keys=prompts.equal_images()), group

    def _has_images(self, completions: torch.Tensor) -> bool:
        """As tools put them there."""
        image = self._family.image_token_id
        return image is not None and bool((completions == image).any())

    def run(self, model: torch.nn.Module, micro: Micro, function: Callable) -> tuple[Any, Any]:
        """See ``in_head``."""
        function = partial(function, **self._arguments)
        head = output_head(self._unwrap(model))
        return in_head(model, micro.batch, head, _in_fp32(function) if self._fp32_head else function)

    def logps(self, model: torch.nn.Module, micro: Micro, return_entropy: bool) -> tuple:
        """(log-probabilities, entropies or None, the model's output), each (B, C)."""
        result, output = self.run(model, micro, partial(linear_logps, return_entropy=return_entropy))
        logps, entropy = result if return_entropy else (result, None)
        return micro.unpacked(logps), None if entropy is None else micro.unpacked(entropy), output

    def in_place_of(self, model: torch.nn.Module, width: int, num_images: list[int] | None, score: Callable) -> Callable:
        """What ``_get_per_token_logps_and_entropies`` calls as its model, batch by batch: it makes the inputs, ``score`` of
        a ``Micro`` returns what ``logps`` does."""
        remaining = iter(num_images or ())

        def forward(*, labels, fused_lm_head, **inputs):
            images = list(islice(remaining, len(inputs["input_ids"]))) if num_images else None
            logps, entropy, output = score(self.micro(model, inputs, width, images))
            return SimpleNamespace(log_probs=logps, entropy=entropy, aux_loss=output.get("aux_loss"))

        return forward


def _in_fp32(function: Callable) -> Callable:
    """``function``, for ``in_head``, of operands in fp32 whatever autocast says (cast_lm_head_to_fp32)."""

    def wrapped(hidden, weight, *args, bias, **kwargs):
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden.float(), weight.float(), *args, bias=None if bias is None else bias.float(), **kwargs)

    return wrapped
