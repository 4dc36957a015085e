"""This package's ops in the GRPO and RLOO trainers of TRL 1.16, by one line in a script that uses TRL::

    from vlmkernels.integrations.trl import patch_trl

    patch_trl()  # changes all trl.GRPOTrainer and trl.RLOOTrainer objects that are created afterwards

To change a single trainer, use ``vlmkernels.integrations.trl.GRPOTrainer`` or ``RLOOTrainer``. Losses, gradients and logged
metrics equal TRL's up to rounding. What changes:

- ``linear_logps`` computes log-probabilities and entropies, ``linear_grpo_loss`` the GRPO objective, without storing logits.
- Rows of a micro-batch with the same prompt and images, in any order, share one copy of them in every pass of the policy, the
  old policy and the reference model; with tools also of turns and results that they have in common.
- Generation with transformers runs each prompt once for all its completions, and with tools each turn and result once, unless
  the model overrides ``generate``.
- A frozen vision tower encodes each image once per generation batch.
- ``FastImageProcessor`` prepares the images, for models that it supports.
- With ``perception_loss_weight``, the objective has the terms of PAPO.

``_REPLACED`` lists the methods of TRL that the trainers here override and ``patch_trl`` replaces.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any

import torch
import trl
from transformers.utils import logging

from vlmkernels.integrations.patch import Library, Patch
from vlmkernels.integrations.trl.generation import grouped_generate, sampling_unsupported
from vlmkernels.integrations.trl.masks import check_masks
from vlmkernels.integrations.trl.scoring import Options, Scorer
from vlmkernels.models.head import replaced_method
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.masked_images import MASK_RATIO
from vlmkernels.rollout.generate import report_prefix_sharing

_LIBRARY = Library("vlmkernels.integrations.trl", "trl", ("1.16.",))

try:
    from vlmkernels.integrations.trl.batches import PROMPT, check_regroup, micro_batches_per_step, regroup
    from vlmkernels.integrations.trl.loss import MEDIA, compute_loss, loss_config
except ImportError as error:
    raise ImportError(str(_LIBRARY.error(trl.__version__, str(error)))) from error

__all__ = ["GRPOTrainer", "RLOOTrainer", "patch_trl"]

logger = logging.get_logger(__name__)

_LOGPS, _LOSS = "_get_per_token_logps_and_entropies", "_compute_loss"
_GENERATE, _GENERATE_TURN = "_generate", "_generate_single_turn"
_SAMPLE, _PREPARE = "_generate_and_score_completions", "_prepare_inputs"
# The methods of TRL's trainers that are replaced, and the arguments that they must have.
_REPLACED = {
    "__init__": ("model", "args"),
    _LOGPS: ("model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy", "compute_aux_loss", *MEDIA),
    _LOSS: ("model", "inputs"),
    _GENERATE: ("prompts",),
    _GENERATE_TURN: ("prompt_ids", "images"),
    _SAMPLE: ("inputs",),
    _PREPARE: ("generation_batch",),
}
_ORIGINAL = {cls: {name: vars(cls).get(name) for name in _REPLACED} for cls in (trl.GRPOTrainer, trl.RLOOTrainer)}
# Methods of TRL's objective that a user's subclass may override.
_OVERRIDABLE = {
    name: getattr(trl.GRPOTrainer, name, None) for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")
}


def _check_trl() -> None:
    """Check that TRL has the methods in ``_REPLACED``; log a warning for a version that is not tested.

    Raises:
        NotImplementedError: a method is missing or does not accept an argument.
    """
    for cls, methods in _ORIGINAL.items():
        for name, arguments in _REPLACED.items():
            if methods[name] is None:
                raise _LIBRARY.error(trl.__version__, f"{cls.__name__}.{name} is missing")
            found = inspect.signature(methods[name]).parameters
            if missing := [argument for argument in arguments if argument not in found]:
                raise _LIBRARY.error(trl.__version__, f"{cls.__name__}.{name} does not accept {', '.join(missing)}")
    if not trl.__version__.startswith(_LIBRARY.versions):
        logger.warning_once(f"vlmkernels.integrations.trl is tested with trl 1.16, got {trl.__version__}")


def _original(trainer: Any, name: str) -> Callable:
    """Return TRL's own method ``name`` for a trainer."""
    return next(_ORIGINAL[cls][name] for cls in type(trainer).__mro__ if cls in _ORIGINAL)


def _bind(method: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by their names. An error names the method, as that of the call would."""
    try:
        return inspect.signature(method).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{method.__qualname__}() {error}") from None


class _Trainer:
    """The methods that replace TRL's, in our subclasses or in TRL's own classes.

    A trainer that was constructed before ``patch_trl()`` has no ``_scorer`` and runs TRL's own methods.
    """

    _scorer: Scorer | None = None
    _regroups = False

    def _construct(self, options: Options, args: tuple, kwargs: dict) -> None:
        _check_trl()
        original = _original(self, "__init__")
        config = _bind(original, self, *args, **kwargs).get("args")
        if config is not None:
            if config.torch_compile:
                raise ValueError(
                    "torch_compile must be False: the function that replaces the model's head differs from call to call, "
                    f"got {config.torch_compile}"
                )
            self._make_loss_config(config)
            if options.regroup:
                check_regroup(config)
        original(self, *args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise NotImplementedError("DeepSpeed and FSDP1 are not supported: use FSDP2 (fsdp_config with version: 2)")
        self._make_loss_config(self.args)
        if options.masks_images:
            check_masks(self, options, overrides_loss=self._overrides_loss())
            self._loss_config = self._loss_config.replace(**options.perception_weights)
        if options.fast_images:
            self.processing_class = with_fast_images(self.processing_class)
        self._scorer = Scorer(self, options)
        self._regroups = options.regroup and self._scorer.shares_prefix
        reasons = {"training": self._scorer.copies_reason}
        if not self._has_other_engine():
            unsupported = sampling_unsupported(self, self.accelerator.unwrap_model(self.model))
            reasons["sampling"] = self._scorer.sampling_reason = self._scorer.copies_reason or unsupported
        if self.accelerator.is_main_process:
            report_prefix_sharing(reasons)

    def _has_other_engine(self) -> bool:
        return self.use_vllm or self.use_transformers_continuous_batching

    def _make_loss_config(self, args: Any) -> None:
        if isinstance(self, trl.GRPOTrainer):  # TRL computes RLOO's objective, a few operations on (B,) tensors
            self._loss_config = loss_config(args)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        original, scorer = _original(self, _LOGPS), self._scorer
        if scorer is None:
            logger.warning_once("A trainer built before patch_trl() runs TRL's own code")
            return original(self, model, *args, **kwargs)
        given = _bind(original, self, model, *args, **kwargs)
        score = partial(scorer.logps, model, return_entropy=given.get("compute_entropy", False))
        stub = scorer.model_stub(model, given["logits_to_keep"], given.get("num_images"), score)
        return original(self, stub, *args, **kwargs)

    def _overrides_loss(self) -> bool:
        """Whether a user's subclass overrides the log-probabilities or a method of the objective, and so keeps TRL's loss."""
        overrides = getattr(type(self), _LOGPS) is not _Trainer._get_per_token_logps_and_entropies
        return overrides or any(getattr(type(self), name, None) is not part for name, part in _OVERRIDABLE.items())

    def _compute_loss(self, model, inputs):
        if self._scorer is None or self._overrides_loss() or not isinstance(self, trl.GRPOTrainer):
            return _original(self, _LOSS)(self, model, inputs)
        return compute_loss(self, self._scorer, self._loss_config, _original(self, _LOGPS), model, inputs)

    def _generate(self, prompts, *args, **kwargs):
        try:
            return _original(self, _GENERATE)(self, prompts, *args, **kwargs)
        finally:
            if self._scorer is not None:
                self._scorer.sequences = None  # their keys and values are not needed any more

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        original, scorer = _original(self, _GENERATE_TURN), self._scorer
        if scorer is None or not scorer.shares_prefix or self._has_other_engine():
            return original(self, prompt_ids, images, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        num_images = None if images is None else [len(images_of_row or ()) for images_of_row in images]
        generate = grouped_generate(scorer, model, num_images, sampling_unsupported(self, model))
        with replaced_method(model, "generate", generate):
            return original(self, prompt_ids, images, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        if self._scorer is not None and self._scorer.features is not None:
            self._scorer.features.clear()
        batch = _original(self, _SAMPLE)(self, inputs)
        if self._regroups:
            rows = torch.arange(len(inputs)) + self.accelerator.process_index * len(inputs)
            batch[PROMPT] = (rows // self.num_generations).to(self.accelerator.device)
        return batch

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        batch = _original(self, _PREPARE)(self, generation_batch)
        if self._regroups and self._buffered_inputs is not before:
            self._buffered_inputs = regroup(self._buffered_inputs, micro_batches_per_step(self.args))
            batch = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return batch


class _Subclass(_Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {field.name: kwargs.pop(field.name) for field in fields(Options) if field.name in kwargs}
        self._construct(Options(**options), args, kwargs)


class GRPOTrainer(_Subclass, trl.GRPOTrainer):
    """``trl.GRPOTrainer`` on this package's ops.

    Args:
        kwargs: the options of ``patch_trl``. All other arguments are TRL's.
    """


class RLOOTrainer(_Subclass, trl.RLOOTrainer):
    """``trl.RLOOTrainer`` on this package's ops.

    Args:
        kwargs: the options of ``patch_trl``. All other arguments are TRL's.
    """


_ADDED = ("_scorer", "_regroups", "_construct", "_has_other_engine", "_make_loss_config", "_overrides_loss")


def _constructor(cls: type, options: Options) -> Callable[..., None]:
    @wraps(_ORIGINAL[cls]["__init__"])
    def __init__(self, *args, **kwargs):
        self._construct(options, args, kwargs)

    return __init__


def patch_trl(
    *,
    share_prefix: str | bool = "auto",
    fast_images: bool = True,
    regroup: bool = False,
    perception_loss_weight: float = 0.0,
    der_loss_weight1: float = 0.0,
    der_loss_weight2: float = 0.0,
    mask_ratio: float = MASK_RATIO,
) -> Patch:
    """Run ``trl.GRPOTrainer``, ``trl.RLOOTrainer`` and their subclasses on this package's ops::

        patch_trl()  # until undo() of the result, or for one block:

        with patch_trl():
            trainer = trl.GRPOTrainer(...)
            trainer.train()

    Trainers built before the call run TRL's own code and log a warning. Methods that a subclass overrides are not replaced.
    After ``undo()``, trainers built under the patch continue with TRL's own methods.

    Args:
        share_prefix: whether each prompt and its images run once for all completions. "auto": if the model supports it; else
            log a warning. True: raise an error if the model does not support it. False: run a copy for every completion, as TRL
            does. Sharing replaces the attention implementation of the language model.
        fast_images: use ``FastImageProcessor`` in place of ``Qwen2VLImageProcessor``.
        regroup: sort the rows of each optimizer step by prompt before they are split into micro-batches, so that more rows
            share a prompt. TRL shuffles them. Losses, gradients and parameters stay equal to TRL's; metrics that are means over
            a micro-batch cover other rows.
        perception_loss_weight, der_loss_weight1, der_loss_weight2: add the terms of PAPO to the objective of ``GRPOTrainer``,
            with these weights: the KL divergence from the policy with masked images, which is maximized, and the entropies with
            the images and with masked images, which are minimized (docs/objective.md). Each completion runs twice.
        mask_ratio: the probability with which a patch of an image is masked (black).

    Returns:
        The patch.

    Raises:
        NotImplementedError: the installed TRL lacks a method that this replaces; the message names its version and the method.
            From the constructor of a trainer: FSDP1, DeepSpeed, or a model that does more to its logits than scale or cap them.
        RuntimeError: TRL is patched already.
        ValueError, TypeError: an option has an invalid value. From the constructor of a trainer: an option of TRL that is not
            supported (torch_compile, and options that ``GRPOLossConfig.from_trl`` rejects), share_prefix=True for a model
            that does not support it, or the terms of PAPO for RLOO, with tools or without images.
    """
    weights = perception_loss_weight, der_loss_weight1, der_loss_weight2
    options = Options(share_prefix, fast_images, regroup, *weights, mask_ratio)
    _check_trl()
    attributes = {}
    for cls in _ORIGINAL:
        attributes[cls] = {name: vars(_Trainer)[name] for name in (*_REPLACED, *_ADDED) if name != "__init__"}
        attributes[cls]["__init__"] = _constructor(cls, options)
    return Patch("patch_trl", attributes=attributes)
