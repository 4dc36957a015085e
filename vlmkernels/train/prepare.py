"""How a model of a run runs, the policy or its teacher: with shared prefixes or copies, from features or pixels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PreTrainedModel

from vlmkernels.data.resolution import Resolution
from vlmkernels.data.samples import Sample, SampleError, encode, read_sample
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.deterministic import use_deterministic
from vlmkernels.models.families import TEXT, Family, family_of, prefix_sharing_unsupported
from vlmkernels.models.head import logit_arguments, output_head
from vlmkernels.models.image_features import accepts_image_features, feature_reuse_unsupported, use_image_features
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.offload import use_activation_offloading
from vlmkernels.models.router_replay import use_router_replay
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import gathered_zero3, prepare_head, requires_lockstep


@dataclass(frozen=True)
class PreparedModel:
    """A model as the trainer runs it: the policy, its reference or its teacher.

    Args:
        model: the model without its PEFT wrapper.
        family: the model's family.
        head: the language-model head, perhaps with LoRA.
        logit_arguments: see ``vlmkernels.models.head.logit_arguments``.
        processor_arguments: arguments of every call of the processor; see ``use_vision_ops``.
        copies_reason: why each completion of a group runs after its own copy of the prompt, or None if they share one.
        reuses_image_features: whether images are encoded once per generation batch. Needs shared prefixes and a frozen vision
            tower.
        idle_media: by kind, a small image or video on which a rank runs its vision tower if its micro-batch has none; see
            ``vlmkernels.models.image_features``. None if ranks need not run in lockstep.
    """

    model: PreTrainedModel
    family: Family
    head: torch.nn.Module
    logit_arguments: dict[str, float]
    processor_arguments: dict[str, dict]
    copies_reason: str | None
    reuses_image_features: bool
    idle_media: dict[str, dict[str, torch.Tensor]] | None = None

    def encoding_arguments(self, processor: Any, resolution: Resolution | None) -> dict[str, dict]:
        """Return the arguments of a call of the processor, with the limits of image sizes if there is a schedule."""
        if resolution is None:
            return self.processor_arguments
        size = {"size": resolution.size(processor)}
        return self.processor_arguments | {"images_kwargs": self.processor_arguments.get("images_kwargs", {}) | size}

    @property
    def shares_prefix(self) -> bool:
        """Whether the completions of a group run after one shared copy of their prompt."""
        return self.copies_reason is None


def prepare_model(
    model: PreTrainedModel,
    processor: Any,
    args: GRPOConfig,
    accelerator: Accelerator,
    media: set[str],
    *,
    is_teacher: bool = False,
) -> PreparedModel:
    """Let a model use the ops of this package and choose how it runs. Changes the model in place.

    Args:
        model: the policy or a teacher, perhaps with adapters, before it is wrapped.
        processor: the policy's processor or tokenizer.
        media: the kinds of media that training can have.
        is_teacher: whether the model is a teacher, which always reads pixels, and does not replay routers.
    """
    plain, head = base_model(model), output_head(model)
    family = family_of(plain.config)
    prepare_head(accelerator, head)
    with gathered_zero3(model):
        arguments = logit_arguments(model, head)
    processor_arguments = use_vision_ops(plain, processor) if media or not is_teacher else {}  # it may have another family
    copies_reason = _choose_prefix_sharing(plain, args)
    if args.router_replay and not is_teacher:
        use_router_replay(plain)
    if args.deterministic:
        use_deterministic(plain)
    if args.activation_offloading:
        use_activation_offloading(plain)
    can_reuse = copies_reason is None and family is not TEXT and feature_reuse_unsupported(plain) is None
    reuses_features = can_reuse and not is_teacher
    use_image_features(plain)  # even if this run reuses no features, because a checkpoint's generation batch may hold some
    prepared = PreparedModel(plain, family, head, arguments, processor_arguments, copies_reason, reuses_features)
    kinds = media - {"image"} if reuses_features else media
    if not requires_lockstep(accelerator) or family is TEXT or not kinds:
        return prepared
    if not accepts_image_features(plain):
        name = type(plain).__name__
        raise ValueError(f"FSDP2 and ZeRO need a {name} that accepts mm_encoder_outputs (transformers >= 5.18); use DDP")
    idle_media = {kind: encode_prompts([_idle_sample(kind)], processor, prepared, args).inputs for kind in sorted(kinds)}
    return replace(prepared, idle_media=idle_media)


def _choose_prefix_sharing(model: PreTrainedModel, args: GRPOConfig) -> str | None:
    """Prepare the model for packs, or return why completions run after copies of their prompt."""
    reason = prefix_sharing_unsupported(model)
    if args.share_prefix is True and reason is not None:
        raise ValueError(f"share_prefix must be 'auto' or False: {reason}, got True")
    if args.share_prefix is False:
        return "share_prefix is False"
    if reason is None:
        use_tree_attention(model)
    return reason


def _idle_sample(kind: str) -> Sample:
    """Return a sample with one small image or video."""
    image = Image.new("RGB", (64, 64))
    media = {"images": [image]} if kind == "image" else {"videos": [[image, image]]}
    return read_sample({"prompt": [{"role": "user", "content": "?"}], **media}, 0)


def encode_prompts(
    samples: list[Sample],
    processor: Any,
    prepared: PreparedModel,
    args: GRPOConfig,
    arguments: dict[str, dict] | None = None,
) -> ModelInputs:
    """Return the model inputs of the samples' prompts on the device of the run.

    Args:
        arguments: the processor's arguments; by default those of ``prepared``.

    Raises:
        SampleError: a sample cannot be encoded, or is longer than ``max_prompt_length``.
    """
    arguments = prepared.processor_arguments if arguments is None else arguments
    prompts = encode(samples, processor, prepared.family, args.chat_template_kwargs, **arguments)
    lengths = prompts.inputs["attention_mask"].sum(1).tolist()
    for sample, length in zip(samples, lengths, strict=True):
        if args.max_prompt_length is not None and length > args.max_prompt_length:
            raise SampleError(
                sample, f"the prompt must have at most max_prompt_length = {args.max_prompt_length} tokens, got {length}"
            )
    return prompts.to(args.device)
