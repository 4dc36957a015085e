"""The configuration of a step, and its numbers of tokens."""

import math
from dataclasses import dataclass

from vlmkernels.ops.checks import require_one_of
from vlmkernels.plan.mixers import Span
from vlmkernels.plan.shape import ModelShape
from vlmkernels.rollout.make import ENGINES

PARALLEL = ("ddp", "fsdp2")
PRECISIONS = {"bf16": 2, "fp32": 4}
# Bytes per weight in 4 bits: with double quantization, blocks of 64 have a scale in 8 bits, and 256 of these one in fp32.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
WEIGHTS = (*PRECISIONS, "nf4")
# Bytes of both moments per parameter; None if they have its dtype. In 8 bits, blocks of 256 have a scale in fp32.
OPTIMIZERS = {"adamw_torch_fused": None, "adamw_8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class Workload:
    """A GRPO step: one generation batch and one optimizer step.

    Args:
        prompts: number of prompts per step, over all GPUs.
        group_size: completions per prompt.
        prompt_tokens: text tokens per prompt.
        completion_tokens: mean number of tokens per completion.
        images: images per prompt.
        width, height: size of each image in pixels.
        image_tokens: tokens of each image; None = computed from its size. Models whose image processor chooses tiles need it.
        gpus: number of training GPUs.
        parallel: data parallelism of the training GPUs: "ddp" or "fsdp2".
        lora_r: rank of LoRA adapters on all linear layers of the decoder; 0 trains the whole model.
        freeze_vision: whether the vision tower is frozen, so that its features are computed once. LoRA freezes it too.
        share_prefix: whether each prompt and its images run once per group.
        reference: whether the loss has a KL term, which needs a forward pass of the reference model.
        old: whether a separate pass computes the old log-probabilities, as for several optimizer steps per generation batch.
        perception_loss_weight: weight of the perception terms of the loss. Above 0, the loss also runs with masked images.
        text_before_images: those of the text tokens that precede the first image. Passes with other images share them.
        image_use_steps: optimizer steps between measurements of image use; None = never. A step has the mean cost.
        teacher_weights: precision of the stored parameters of a teacher.
        checkpointing: whether activation checkpointing is used, which saves only the input of each layer.
        activation_offloading: whether activations are in host memory between the forward and the backward pass.
        optim: the optimizer, with moments of the dtype of the parameters or in 8 bits.
        microbatch_tokens: maximum number of tokens per forward and backward pass; None = no limit.
        engine: rollout engine: "transformers" or "vllm_colocate" on the training GPUs, or a "vllm_server" on ``server_gpus``
            other GPUs.
        server_gpus: number of GPUs of the server.
        precision: precision of matrix products.
        weights: precision of the stored parameters. fp32 weights with bf16 products are mixed precision. With "nf4", the linear
            layers have 4 bits and all other parameters are in bf16 (QLoRA).
        reward_seconds: seconds that the reward functions take for the whole batch.
        logits_bytes: size of the chunk of logits that the fused head computes.
        dlogits_bytes: maximum size of the bf16 gradients of logits that the head keeps for the backward pass.

    Raises:
        ValueError: a value is out of range, or ``prompts`` is not a multiple of ``gpus``.
    """

    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512
    images: int = 1
    width: int = 896
    height: int = 896
    image_tokens: int | None = None
    gpus: int = 1
    parallel: str = "fsdp2"
    lora_r: int = 0
    freeze_vision: bool = False
    share_prefix: bool = True
    reference: bool = False
    old: bool = False
    perception_loss_weight: float = 0.0
    text_before_images: int = 0
    image_use_steps: int | None = None
    teacher_weights: str = "bf16"
    checkpointing: bool = False
    activation_offloading: bool = False
    optim: str = "adamw_torch_fused"
    microbatch_tokens: int | None = None
    engine: str = "transformers"
    server_gpus: int = 0
    precision: str = "bf16"
    weights: str = "fp32"
    reward_seconds: float = 0.0
    logits_bytes: int = 2**30
    dlogits_bytes: int = 2**32

    def __post_init__(self) -> None:
        for name in ("prompts", "completion_tokens", "width", "height", "gpus", "logits_bytes", "dlogits_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(f"group_size must be >= 2, to compare completions, got {self.group_size}")
        for name in (
            *("prompt_tokens", "images", "lora_r", "reward_seconds", "server_gpus"),
            *("perception_loss_weight", "text_before_images"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if self.prompts % self.gpus:
            raise ValueError(
                f"prompts must be a multiple of gpus = {self.gpus}, because groups are not split, got {self.prompts}"
            )
        require_one_of("engine", self.engine, ENGINES)
        require_one_of("parallel", self.parallel, PARALLEL)
        require_one_of("precision", self.precision, PRECISIONS)
        require_one_of("weights", self.weights, WEIGHTS)
        require_one_of("teacher_weights", self.teacher_weights, PRECISIONS)
        require_one_of("optim", self.optim, OPTIMIZERS)
        if self.weights == "nf4" and (
            not self.lora_r or (self.gpus > 1 and self.parallel != "ddp") or self.engine != ENGINES[0]
        ):
            raise ValueError(
                "weights must not be nf4 without LoRA, with fsdp2 or with a vLLM engine, "
                f"got lora_r = {self.lora_r}, parallel = {self.parallel} and engine = {self.engine}"
            )
        if self.activation_offloading and self.gpus > 1 and self.parallel != "ddp":
            raise ValueError(f"activation_offloading must be false with fsdp2 on {self.gpus} GPUs, got true")
        if (self.engine == "vllm_server") != (self.server_gpus > 0):
            raise ValueError(f"server_gpus must be >= 1 with engine = vllm_server, else 0, got {self.server_gpus}")
        for name in ("microbatch_tokens", "image_tokens", "image_use_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.text_before_images > self.prompt_tokens:
            raise ValueError(
                f"text_before_images must be <= prompt_tokens = {self.prompt_tokens}, got {self.text_before_images}"
            )
        for name in ("perception_loss_weight", "image_use_steps"):
            if not self.images and (value := getattr(self, name)):
                raise ValueError(f"{name} must be {'None' if name == 'image_use_steps' else '0'} without images, got {value}")

    @property
    def frozen_vision(self) -> bool:
        """Whether the vision tower is frozen, by ``freeze_vision`` or by LoRA."""
        return self.freeze_vision or self.lora_r > 0

    @property
    def local_prompts(self) -> int:
        """Number of prompts per GPU."""
        return self.prompts // self.gpus

    @property
    def completions(self) -> int:
        """Number of completions per GPU."""
        return self.local_prompts * self.group_size


@dataclass(frozen=True)
class StepTokens:
    """Numbers of tokens of a step on one GPU. A pass runs the whole batch of the GPU through the model.

    Attributes:
        prompt: tokens of a prompt, including its image tokens.
        passed: tokens that run through the decoder in a pass.
        pairs: pairs of tokens that attend to each other in a pass, in a layer without a window.
        patches: image patches that run through the vision tower in a pass.
        image_tokens: tokens that the patches are merged into.
        vision_pairs: pairs of patches that attend to each other, summed over the layers of the vision tower.
        packs: number of forward passes (micro-batches) that a pass is split into.
        spans: the passed tokens.
    """

    prompt: int
    passed: int
    pairs: float
    patches: int
    image_tokens: int
    vision_pairs: float
    packs: int
    spans: tuple[Span, ...]

    @classmethod
    def from_workload(
        cls, shape: ModelShape, work: Workload, *, branches: bool = False, cut_branches: bool = False
    ) -> "StepTokens":
        """Count the tokens of a workload, for a shape with its ``image_tokens``.

        Args:
            branches: whether a pass also runs the prompts and their completions with other images. They share the tokens of a
                prompt before its first image if ``share_prefix``.
            cut_branches: whether the pass is split as one with ``branches``, although it has none itself.

        Raises:
            ValueError: ``microbatch_tokens`` is too small for one completion, or the number of tokens of an image is unknown.
        """
        vision = shape.vision if work.images else None
        per_image = vision.image_tokens(work.width, work.height) if vision else 0
        prompt, length = work.prompt_tokens + work.images * per_image, work.completion_tokens
        before = work.text_before_images if work.share_prefix else 0
        sizes = prompt, length
        if branches or cut_branches:
            sizes = 2 * prompt - before, 2 * length
        runs, packs = _prompt_runs(work, *sizes)
        times = 2 if branches else 1
        spans = (
            Span(runs, 0, before),
            Span(times * runs, before, prompt),
            Span(times * work.completions, prompt, prompt + length),
        )
        passed = int(sum(span.tokens for span in spans))
        pairs = sum(span.pairs() for span in spans)
        images = times * runs * work.images if vision else 0
        patches = vision.patches(work.width, work.height) if vision else 0
        vision_pairs = 0.0
        if vision:
            windowed = vision.stack.layers - vision.full_layers
            vision_pairs = images * patches * (vision.full_layers * patches + windowed * min(vision.window or 0, patches))
        return cls(prompt, passed, pairs, images * patches, images * per_image, vision_pairs, packs, spans)


def _prompt_runs(work: Workload, prompt: int, length: int) -> tuple[int, int]:
    """Return how many prompts a pass runs, and its ``packs``, if prompts and completions take this many tokens of a pack."""
    prompts, count, budget = work.local_prompts, work.completions, work.microbatch_tokens
    if budget is not None and budget < prompt + length:
        raise ValueError(
            f"microbatch_tokens must be >= {prompt + length}, a prompt of {prompt} tokens and a completion of {length}, "
            f"got {budget}"
        )
    if not work.share_prefix:
        return count, 1 if budget is None else -(-count // (budget // (prompt + length)))
    group = prompt + work.group_size * length
    if budget is None:
        return prompts, 1
    if group <= budget:
        return prompts, -(-prompts // (budget // group))
    packs = prompts * -(-work.group_size // ((budget - prompt) // length))
    return packs, packs  # if a group is split, each part repeats the prompt
