"""On-policy distillation: the teacher of a run, and what the policy and its teacher must have in common.

The policy samples. In each micro-batch the teacher runs on the same tokens without gradients, up to its head, and the head of
the policy computes the divergence from both models' hidden states (``vlmkernels.models.distillation``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from vlmkernels.data.samples import tokenizer_of
from vlmkernels.models.distillation import divergence_term, teacher_output
from vlmkernels.models.families import family_of
from vlmkernels.models.head import Term
from vlmkernels.models.loading import embedding_rows, load_config, load_model, load_processor
from vlmkernels.ops.grpo_loss.config import PERCEPTION_WEIGHTS
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.base import Rollout
from vlmkernels.rollout.generate import report_prefix_sharing
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.micro_batches import Split
from vlmkernels.train.parallel import is_zero3_sharded, prepare_reference, zero_stage
from vlmkernels.train.passes import Passes, teacher_view
from vlmkernels.train.prepare import PreparedModel, prepare_model
from vlmkernels.train.token_counts import TokenCounts

logger = logging.get_logger(__name__)

FIELDS = ("teacher_model_init_kwargs", "distillation_coef", "distillation_beta", "distillation_top_k")
# Fields of parts of the GRPO loss, and the values that turn the parts off.
WITHOUT_REWARDS = {
    "beta": 0.0,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "rollout_correction": None,
    "off_policy_mask_threshold": None,
    "dynamic_sampling": False,
    "oversampling": 1.0,
    **dict.fromkeys(PERCEPTION_WEIGHTS, 0.0),
}
# Settings that must be equal for the pixels and image tokens of one model to be those of the other.
_CONFIG = ("image_seq_length", "image_grid_pinpoints", "vision_feature_select_strategy", "mm_tokens_per_image")
_CONFIG += ("downsample_ratio", "downsample_factor", "scale_factor")
_VISION_CONFIG = ("patch_size", "temporal_patch_size", "spatial_merge_size", "image_size")
_IMAGE_PROCESSOR = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def check_arguments(teacher: Any, model: Any, rewards: Rewards, args: GRPOConfig) -> None:
    """Check the arguments of a run with or without a teacher.

    Raises:
        TypeError: the teacher is neither a model nor a path.
        ValueError: an argument does not fit to the teacher, or to a run without reward functions.
    """
    if rewards and args.num_generations < 2:
        raise ValueError(f"num_generations must be >= 2, to compare completions, got {args.num_generations}")
    if teacher is None:
        defaults = {field.name: field.default for field in fields(args)}
        for name in FIELDS:
            if getattr(args, name) != defaults[name]:
                raise ValueError(f"{name} must be {defaults[name]} without a teacher, got {getattr(args, name)!r}")
        return
    if not isinstance(teacher, str):
        _check_given(teacher, model, args)
    if not rewards:
        _check_without_rewards(args)


def _check_given(teacher: Any, model: Any, args: GRPOConfig) -> None:
    """Check a teacher that is given as a model."""
    if not isinstance(teacher, torch.nn.Module) or not hasattr(teacher, "config"):
        raise TypeError(f"teacher must be a model of transformers or its path, got {type(teacher).__name__}")
    if (kwargs := args.teacher_model_init_kwargs) is not None:
        raise ValueError(f"teacher_model_init_kwargs must be None for a teacher that is given as a model, got {kwargs!r}")
    own = set() if isinstance(model, str) else {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in teacher.parameters()):
        raise ValueError("teacher must not share parameters with model, which training changes, got shared parameters")


def _check_without_rewards(args: GRPOConfig) -> None:
    """Check that no setting belongs to the GRPO loss or to rewards."""
    for name, value in WITHOUT_REWARDS.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} must be {value} without reward functions, because there is no GRPO loss, got {getattr(args, name)!r}"
            )
    if args.load_best_model_at_end and args.metric_for_best_model == "eval_reward":
        raise ValueError("metric_for_best_model must be another metric than eval_reward without reward functions, got it")


# What the teacher and the policy have in common


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher before it is prepared.

    Args:
        model: the teacher, frozen and in evaluation mode.
        about: what ``run.json`` says about it. Its "notes" say how it was compared with the policy, where that is not obvious.
    """

    model: PreTrainedModel
    about: dict[str, Any]


def load_teacher(
    teacher: str | PreTrainedModel, model: PreTrainedModel, processor: Any, media: set[str], args: GRPOConfig
) -> LoadedTeacher:
    """Compare the vocabulary and the images of a teacher with those of the policy, and load it.

    A teacher that is given as a model is frozen and put into evaluation mode.

    Args:
        teacher: the teacher or its path.
        model: the policy.
        processor: the policy's processor or tokenizer.
        media: the kinds of media that training can have.

    Raises:
        ValueError: the teacher cannot be loaded, or has another vocabulary, or processes images in another way.
    """
    given = isinstance(teacher, torch.nn.Module)
    try:
        config = teacher.config if given else load_config(teacher, args.teacher_model_init_kwargs)
    except ValueError as error:
        raise ValueError(f"teacher cannot be loaded: {error}") from error
    path = config._name_or_path if given else teacher
    own, reason = _processor_at(path, args)
    rows = embedding_rows(model), embedding_rows(teacher if given else config)
    notes = compare_vocabularies(rows, tokenizer_of(processor), None if own is None else tokenizer_of(own), reason)
    if media:
        compare_images(model.config, config, media)
        if hasattr(own, "image_processor"):
            _compare("image processor", processor.image_processor, own.image_processor, _IMAGE_PROCESSOR)
    if not given:
        teacher = load_model(teacher, {"dtype": "auto"} | (args.teacher_model_init_kwargs or {}))
    return LoadedTeacher(teacher.requires_grad_(False).eval(), _describe(teacher, path, notes))


def _describe(model: PreTrainedModel, path: str, notes: list[str]) -> dict[str, Any]:
    """Return the section "teacher" of ``run.json``."""
    # transformers knows how many numbers a quantized parameter holds, but not how many one that ZeRO-3 sharded.
    size = sum(p.ds_numel for p in model.parameters()) if is_zero3_sharded(model) else model.num_parameters()
    return {
        "path": path or None,
        "model type": model.config.model_type,
        "parameters": size,
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "adapters": is_peft_model(model),
        "notes": notes,
    }


def _processor_at(path: str, args: GRPOConfig) -> tuple[Any, str]:
    """Load the processor or the tokenizer at a path. Returns None, and the reason, if there is none."""
    folder, reason = Path(path), ""
    if not path:
        return None, "the teacher has no path"
    # Without files, transformers returns an empty tokenizer. The tokenizer of adapters is that of their base model.
    if folder.is_dir() and not [*folder.glob("*token*"), *folder.glob("adapter_config.json")]:
        return None, f"no tokenizer in {path}"
    for auto in (AutoProcessor, AutoTokenizer):
        try:
            return load_processor(path, args.teacher_model_init_kwargs, auto=auto), ""
        except (ValueError, OSError, ImportError) as error:
            reason = str(error.__cause__ or error).partition(". ")[0]
    return None, reason


def compare_vocabularies(
    rows: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    reason: str = "",
) -> list[str]:
    """Check that each token id means the same for the policy and the teacher.

    Heads can have more rows than their tokenizer has tokens. The first rows, as many as both heads have, are compared then.

    Args:
        rows: the rows of the embeddings of the policy and of the teacher.
        teacher_tokenizer: None if it cannot be loaded, for ``reason``. Then the rows must be equal.

    Returns:
        Notes about what is compared.

    Raises:
        ValueError: a token differs, or a tokenizer is missing and the rows differ, or a head has no row for a token.
    """
    common = min(rows)
    if teacher_tokenizer is None:
        if rows[0] != rows[1]:
            raise ValueError(
                f"teacher must have the {rows[0]} rows of the vocabulary of model, or a tokenizer that shows which rows have "
                f"no token, got {rows[1]} rows and no tokenizer ({reason})"
            )
        return [f"only the sizes of the vocabularies were compared, {common} rows, without a tokenizer ({reason})"]
    tokens, others = ({index: token for token, index in t.get_vocab().items()} for t in (tokenizer, teacher_tokenizer))
    for index in sorted(tokens.keys() | others.keys()):
        if tokens.get(index) != others.get(index):
            raise ValueError(
                f"teacher must have the vocabulary of model, {len(tokens)} tokens and {rows[0]} rows, got {len(others)} tokens "
                f"and {rows[1]} rows: token {index} is {others.get(index)!r}, not {tokens.get(index)!r}"
            )
    if max(tokens) >= common:
        raise ValueError(f"teacher must have a row for each of the {max(tokens) + 1} token ids of model, got {common} rows")
    if rows[0] == rows[1]:
        return []
    return [f"the first {common} rows of the heads are compared, because the others, up to {max(rows)}, have no token"]


def compare_images(config: PreTrainedConfig, teacher: PreTrainedConfig, media: set[str]) -> None:
    """Check that a teacher can read the images and videos that the policy's processor encodes.

    Args:
        config, teacher: the configurations of the policy and of the teacher.
        media: the kinds of media that training can have.

    Raises:
        ValueError: an input, a placeholder or a size differs.
    """
    family, other = family_of(config), family_of(teacher)
    needed = [name for name, spec in family.inputs.items() if "video" in media or "video" not in name + spec.axis]
    for name in needed:
        if name != "second_per_grid_ts" and other.inputs.get(name) != family.inputs[name]:
            kinds = config.model_type, teacher.model_type
            raise ValueError(f"teacher must have the image inputs of a {kinds[0]}, like model, got a {kinds[1]} without {name}")
    names = [name for name in family.media_tokens if hasattr(config, name)]
    _compare("configuration", config, teacher, (*names, *_CONFIG))
    _compare("vision_config", config.vision_config, teacher.vision_config, _VISION_CONFIG)


def _compare(what: str, own: Any, teacher: Any, names: Iterable[str]) -> None:
    """Raise ValueError if an attribute of the teacher's configuration or processor differs from that of the policy's."""
    for name in names:
        values = [getattr(owner, name, None) for owner in (own, teacher)]
        if _plain(values[0]) != _plain(values[1]):
            raise ValueError(
                f"teacher must process images as model does, with {name} = {values[0]} in its {what}, got {values[1]}"
            )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# The prepared teacher


class Teacher:
    """A teacher as the trainer runs it.

    Args:
        model: the teacher, perhaps wrapped.
        passes: the inputs of its forward passes.
        policy: how the policy runs.
        copies_weight: see ``teacher_output``.

    Attributes:
        prepared: how the teacher runs.
    """

    def __init__(
        self, model: torch.nn.Module, passes: Passes, policy: PreparedModel, args: GRPOConfig, *, copies_weight: bool
    ) -> None:
        self.model, self.prepared = model, passes.prepared
        self._passes, self._args, self._copies_weight = passes, args, copies_weight
        teacher_arguments = {f"teacher_{name}": value for name, value in self.prepared.logit_arguments.items()}
        self._options = {"temperature": args.temperature, **policy.logit_arguments, **teacher_arguments}
        self._options |= {"beta": args.distillation_beta, "top_k": args.distillation_top_k}

    def term(self, rollout: Rollout, split: Split, tokens: torch.Tensor, num_items: float) -> Term:
        """Run the teacher on a split, and return the term of the loss; see ``completion_loss``.

        Each token has the weight ``distillation_coef / num_items``, for every loss type, so that the terms of splits,
        micro-batches and processes add up to the mean over the tokens of an optimizer step.

        Args:
            tokens: (N,) bool, which of the tokens that the policy sampled count in the loss.
            num_items: the number of tokens that count in an optimizer step, averaged over processes.
        """
        batch = self._passes.scoring_batch(rollout, split).select(tokens)
        output = teacher_output(self.model, batch, head=self.prepared.head, copies_weight=self._copies_weight)
        return divergence_term(output, token_weight=self._args.distillation_coef / num_items, **self._options)


def prepare_teacher(
    loaded: LoadedTeacher,
    policy: PreparedModel,
    processor: Any,
    media: set[str],
    args: GRPOConfig,
    accelerator: Accelerator,
    token_counts: TokenCounts,
) -> Teacher:
    """Prepare a teacher as the reference is prepared. Changes the model in place; see ``prepare_model``.

    Args:
        policy: how the policy runs.
        processor, media: see ``load_teacher``.
        token_counts: see ``Passes``.

    Raises:
        NotImplementedError: the teacher cannot read the pixels in the form that the policy reads.
    """
    model = loaded.model
    prepared = prepare_model(model, processor, args, accelerator, media, is_teacher=True)
    if media and prepared.processor_arguments != policy.processor_arguments:
        kind = "uint8" if policy.processor_arguments else "normalized"
        raise NotImplementedError(f"teacher must read {kind} pixels, as model does, got {type(prepared.model).__name__}")
    if not (dtype := prepared.head.weight.dtype).is_floating_point:
        raise ValueError(f"teacher must have a head of floating-point numbers, which is not quantized, got {dtype}")
    if accelerator.is_main_process:
        report_prefix_sharing({"the teacher": prepared.copies_reason})
        for note in loaded.about["notes"]:
            logger.warning("teacher: %s", note)
    passes = Passes(prepared, args, token_counts, partial(teacher_view, family=prepared.family))
    copies_weight = accelerator.is_fsdp2 or zero_stage(accelerator) == 3
    return Teacher(prepare_reference(accelerator, model), passes, policy, args, copies_weight=copies_weight)
