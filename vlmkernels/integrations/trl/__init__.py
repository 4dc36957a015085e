"""TRL's GRPO and RLOO trainers with this package's ops beneath them: one line in a script of TRL 1.16.

    from vlmkernels.integrations.trl import patch_trl

    patch_trl()                      # trl.GRPOTrainer and trl.RLOOTrainer built from here on

or, one trainer at a time, ``from vlmkernels.integrations.trl import GRPOTrainer``. Losses, gradients and logged metrics are
TRL's up to rounding. What changes:

- log-probabilities and entropies through ``linear_logps``, the GRPO objective through ``linear_grpo_loss``: no logits;
- rows of a micro-batch with the same prompt and images, in any order, run behind one copy of it, in the policy's forward and
  backward pass as in those of the old and the reference model;
- where ``transformers`` generates, each prompt is run once for all its completions;
- a vision tower that is not trained encodes each image once per generation batch;
- images are prepared by ``FastImageProcessor`` where it applies.
"""

import inspect
from functools import partial, wraps

import torch
import trl
from transformers.utils import logging

from vlmkernels.integrations.trl.generation import generate_of
from vlmkernels.integrations.trl.scoring import Options, Scoring
from vlmkernels.models.head import method_replaced
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.ops.checks import require

try:
    from vlmkernels.integrations.trl.batches import PROMPT, check_regroup, regrouped, window_of
    from vlmkernels.integrations.trl.loss import MEDIA, compute_loss, loss_config
except ImportError as error:
    raise ImportError(f"trl must be 1.16 or have its seams, got {trl.__version__}: {error}") from error

__all__ = ["GRPOTrainer", "RLOOTrainer", "patch_trl"]

logger = logging.get_logger(__name__)

_LOGPS, _LOSS, _GENERATE = "_get_per_token_logps_and_entropies", "_compute_loss", "_generate_single_turn"
_SAMPLE, _PREPARE = "_generate_and_score_completions", "_prepare_inputs"
# What is taken from TRL's trainers, and the arguments that must be there.
_SEAMS = {
    "__init__": ("model", "args"),
    _LOGPS: ("model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy", "compute_aux_loss", *MEDIA),
    _LOSS: ("model", "inputs"),
    _GENERATE: ("prompt_ids", "images"),
    _SAMPLE: ("inputs",),
    _PREPARE: ("generation_batch",),
}
_TRL = {cls: {name: vars(cls).get(name) for name in _SEAMS} for cls in (trl.GRPOTrainer, trl.RLOOTrainer)}
_TESTED = "1.16"
# What TRL's objective calls, which a subclass may override.
_PARTS = {
    name: getattr(trl.GRPOTrainer, name, None) for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")
}


def _check_seams() -> None:
    for cls, methods in _TRL.items():
        for name, arguments in _SEAMS.items():
            found = () if methods[name] is None else inspect.signature(methods[name]).parameters
            if missing := [argument for argument in arguments if argument not in found]:
                raise NotImplementedError(
                    f"trl must be {_TESTED} or have its seams, got {trl.__version__}: {cls.__name__}.{name} "
                    + ("is not there" if methods[name] is None else f"does not take {', '.join(missing)}")
                )
    if not trl.__version__.startswith(f"{_TESTED}."):
        logger.warning_once(f"vlmkernels.integrations.trl is tested with trl {_TESTED}, got {trl.__version__}")


def _trl(trainer, name: str):
    """TRL's own method."""
    return next(_TRL[cls][name] for cls in type(trainer).__mro__ if cls in _TRL)


class _Trainer:
    """What replaces TRL's methods, in a subclass or in TRL's classes themselves.

    A trainer that was not constructed by them has no ``_scoring`` and keeps TRL's own.
    """

    _scoring: Scoring | None = None
    _regroups = False

    def _construct(self, options: Options, args: tuple, kwargs: dict) -> None:
        _check_seams()
        original = _trl(self, "__init__")
        config = inspect.signature(original).bind(self, *args, **kwargs).arguments.get("args")
        if config is not None:
            rule = "be False: what stands in for the model's head differs from call to call"
            require(not config.torch_compile, "torch_compile", rule, config.torch_compile)
            self._make_loss_config(config)
            if options.regroup:
                check_regroup(config)
        original(self, *args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise NotImplementedError("DeepSpeed and FSDP1 are not supported: use FSDP2 (fsdp_config with version: 2)")
        self._make_loss_config(self.args)
        if options.fast_images:
            self.processing_class = with_fast_images(self.processing_class)
        self._scoring = Scoring(self, options)
        self._regroups = options.regroup and self._scoring.shares

    def _make_loss_config(self, args) -> None:
        if isinstance(self, trl.GRPOTrainer):  # RLOO's objective is a few operations on (B,)
            self._loss_config = loss_config(args)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        original, scoring = _trl(self, _LOGPS), self._scoring
        if scoring is None:
            logger.warning_once("A trainer built before patch_trl() runs TRL's own code")
            return original(self, model, *args, **kwargs)
        given = inspect.signature(original).bind(self, model, *args, **kwargs).arguments
        score = partial(scoring.logps, model, return_entropy=given.get("compute_entropy", False))
        stand_in = scoring.in_place_of(model, given["logits_to_keep"], given.get("num_images"), score)
        return original(self, stand_in, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        # A subclass with scores or parts of the objective of its own gets TRL's function of them.
        own = getattr(type(self), _LOGPS) is not _Trainer._get_per_token_logps_and_entropies
        own = own or any(getattr(type(self), name, None) is not part for name, part in _PARTS.items())
        if self._scoring is None or own or not isinstance(self, trl.GRPOTrainer):
            return _trl(self, _LOSS)(self, model, inputs)
        return compute_loss(self, self._scoring, self._loss_config, _trl(self, _LOGPS), model, inputs)

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        original, scoring = _trl(self, _GENERATE), self._scoring
        engine = self.use_vllm or self.use_transformers_continuous_batching
        if scoring is None or not scoring.shares or engine:
            return original(self, prompt_ids, images, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        reason = None
        if self.is_fsdp_enabled:
            reason = "under FSDP2 every process must run the model as often"
        elif isinstance(self, trl.GRPOTrainer) and self.tools:
            reason = "with tools prompts hold completions"
        num_images = None if images is None else [len(of_row or ()) for of_row in images]
        with method_replaced(model, "generate", generate_of(scoring, model, num_images, reason)):
            return original(self, prompt_ids, images, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        if self._scoring is not None and self._scoring.features is not None:
            self._scoring.features.forget()
        batch = _trl(self, _SAMPLE)(self, inputs)
        if self._regroups:
            rows = torch.arange(len(inputs)) + self.accelerator.process_index * len(inputs)
            batch[PROMPT] = (rows // self.num_generations).to(self.accelerator.device)
        return batch

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        batch = _trl(self, _PREPARE)(self, generation_batch)
        if self._regroups and self._buffered_inputs is not before:
            self._buffered_inputs = regrouped(self._buffered_inputs, window_of(self.args))
            batch = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return batch


class GRPOTrainer(_Trainer, trl.GRPOTrainer):
    """``trl.GRPOTrainer``, scored by this package; takes the fields of ``Options`` beside TRL's arguments."""

    def __init__(self, *args, share_prefix: str | bool = "auto", fast_images: bool = True, regroup: bool = False, **kwargs):
        self._construct(Options(share_prefix, fast_images, regroup), args, kwargs)


class RLOOTrainer(_Trainer, trl.RLOOTrainer):
    """``trl.RLOOTrainer``, scored by this package; takes the fields of ``Options`` beside TRL's arguments."""

    def __init__(self, *args, share_prefix: str | bool = "auto", fast_images: bool = True, regroup: bool = False, **kwargs):
        self._construct(Options(share_prefix, fast_images, regroup), args, kwargs)


class Patch:
    """What ``patch_trl`` did. As a context manager it is undone on leaving."""

    active: "Patch | None" = None

    def __init__(self, options: Options) -> None:
        _check_seams()
        rule = "be undone before it is called again"
        require(Patch.active is None, "patch_trl", rule, "a second call", RuntimeError)
        self._replaced = {cls: {name: vars(cls).get(name) for name in (*_SEAMS, *_ADDED)} for cls in _TRL}
        for cls in _TRL:
            for name in (*_SEAMS, *_ADDED):
                setattr(cls, name, _constructor(cls, options) if name == "__init__" else vars(_Trainer)[name])
        Patch.active = self

    def undo(self) -> None:
        """TRL as it was; trainers built meanwhile go on by its own methods. A second time does nothing."""
        if Patch.active is not self:
            return
        for cls, methods in self._replaced.items():
            for name, method in methods.items():
                delattr(cls, name) if method is None else setattr(cls, name, method)
        Patch.active = None

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


_ADDED = ("_scoring", "_regroups", "_construct", "_make_loss_config")


def _constructor(cls: type, options: Options):
    @wraps(_TRL[cls]["__init__"])
    def __init__(self, *args, **kwargs):
        self._construct(options, args, kwargs)

    return __init__


def patch_trl(*, share_prefix: str | bool = "auto", fast_images: bool = True, regroup: bool = False) -> Patch:
    """Let ``trl.GRPOTrainer`` and ``trl.RLOOTrainer``, and their subclasses, score by this package.

    Called as a function it lasts until ``undo()`` of its result; as a context manager, until its end::

        with patch_trl():
            trainer = trl.GRPOTrainer(...)
            trainer.train()

    Trainers built before keep TRL's own code, with a notice. A method that a subclass overrides stays the subclass's.

    Args:
        share_prefix, fast_images, regroup: see ``Options``.

    Raises:
        NotImplementedError: the installed TRL differs where this one takes hold of it; the message names its version and what
            is missing. By a trainer's constructor: FSDP1, DeepSpeed, a model whose head does more than scale and cap.
        RuntimeError: TRL is patched already.
        ValueError: by a trainer's constructor: an option of TRL's that cannot be honoured, by name (torch_compile; what
            ``GRPOLossConfig.from_trl`` refuses; share_prefix=True for a model that does not allow it).
    """
    return Patch(Options(share_prefix, fast_images, regroup))
