"""What is asked of a step, and the tokens that follow from it."""

from dataclasses import dataclass

from vlmkernels.ops.checks import require, require_one_of
from vlmkernels.plan.shape import ModelShape

ENGINES = ("transformers", "vllm", "server")
PARALLEL = ("ddp", "fsdp2")
PRECISIONS = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Workload:
    """A GRPO step: one generation batch, one optimiser step.

    Args:
        prompts: of all GPUs. group_size: completions of each.
        prompt_tokens: of the text of a prompt. completion_tokens: of a completion, on average.
        images: of each prompt. width, height: of each image, in pixels.
        gpus: that train. parallel: how they share it, where there are several.
        lora_r: rank of adapters on all linear layers of the decoder; 0 trains the model.
        freeze_vision: the tower is not trained, and its features serve all passes. LoRA freezes it too.
        share_prefix: a prompt and its images run once for its group.
        reference: a KL term, hence a pass of the reference. old: a pass for the old log-probabilities, needed where several
            steps are taken from a generation batch.
        checkpointing: activations are computed again in the backward pass, all but each layer's input.
        microbatch_tokens: the most tokens of a forward and backward pass; None: all.
        engine: what samples: transformers or vllm on the GPUs that train, or a vllm server on ``server_gpus`` others.
        precision: of the GEMMs. weights: of the parameters as they are kept; fp32 under bf16 is mixed precision.
        reward_seconds: of the reward functions, for the whole batch.
        logits_bytes: of the chunk of logits that the head holds. dlogits_bytes: of the bf16 gradients by logits that it keeps
            for the backward pass.

    Raises:
        ValueError: a value is out of range, or groups do not divide among the GPUs.
    """

    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512
    images: int = 1
    width: int = 896
    height: int = 896
    gpus: int = 1
    parallel: str = "fsdp2"
    lora_r: int = 0
    freeze_vision: bool = False
    share_prefix: bool = True
    reference: bool = False
    old: bool = False
    checkpointing: bool = False
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
            require(getattr(self, name) >= 1, name, "be >= 1", getattr(self, name))
        require(self.group_size >= 2, "group_size", "be >= 2, to compare completions", self.group_size)
        for name in ("prompt_tokens", "images", "lora_r", "reward_seconds", "server_gpus"):
            require(getattr(self, name) >= 0, name, "be >= 0", getattr(self, name))
        require(self.prompts % self.gpus == 0, "prompts", f"be a multiple of gpus, {self.gpus}: groups are whole", self.prompts)
        require_one_of("engine", self.engine, ENGINES)
        require_one_of("parallel", self.parallel, PARALLEL)
        for name in ("precision", "weights"):
            require_one_of(name, getattr(self, name), PRECISIONS)
        rule = "be >= 1 with engine server, else 0"
        require((self.engine == "server") == (self.server_gpus > 0), "server_gpus", rule, self.server_gpus)
        budget = self.microbatch_tokens
        require(budget is None or budget >= 1, "microbatch_tokens", "be >= 1", budget)

    @property
    def frozen_vision(self) -> bool:
        return self.freeze_vision or self.lora_r > 0

    @property
    def local_prompts(self) -> int:
        return self.prompts // self.gpus

    @property
    def completions(self) -> int:
        """Of one GPU."""
        return self.local_prompts * self.group_size


@dataclass(frozen=True)
class Tokens:
    """Of one GPU. prompt: of a prompt, images and all. passed: through the decoder in a pass over the batch; pairs: that
    attend to one another in it. patches: through the tower in a pass, image_tokens out of it; vision_pairs: summed over its
    layers. packs: passes that it takes."""

    prompt: int
    passed: int
    pairs: float
    patches: int
    image_tokens: int
    vision_pairs: float
    packs: int

    @classmethod
    def of(cls, shape: ModelShape, work: Workload) -> "Tokens":
        vision = shape.vision if work.images else None
        per_image = vision.image_tokens(work.width, work.height) if vision else 0
        prompt, length = work.prompt_tokens + work.images * per_image, work.completion_tokens
        prompts, count = work.local_prompts, work.completions
        if work.share_prefix:
            group = prompt + work.group_size * length
            passed = prompts * group
            pairs = prompts * prompt**2 / 2 + count * (prompt * length + length**2 / 2)
        else:
            group = prompt + length
            passed = count * group
            pairs = count * group**2 / 2
        budget, packs = work.microbatch_tokens, 1
        if budget is not None:
            rule = f"be at least {prompt + length}, a prompt of {prompt} tokens and a completion of {length}"
            require(budget >= prompt + length, "microbatch_tokens", rule, budget)
            if work.share_prefix and group > budget:  # a group that is cut repeats its prompt
                at_a_time = (budget - prompt) // length
                packs = prompts * -(-work.group_size // at_a_time)
                passed, pairs = packs * prompt + count * length, pairs + (packs - prompts) * prompt**2 / 2
            else:
                packs = -(-(prompts if work.share_prefix else count) // (budget // group))
        images = (prompts if work.share_prefix else count) * work.images if vision else 0
        patches = vision.patches(work.width, work.height) if vision else 0
        vision_pairs = 0.0
        if vision:
            windowed = vision.stack.layers - vision.full_layers
            vision_pairs = images * patches * (vision.full_layers * patches + windowed * min(vision.window or 0, patches))
        return cls(prompt, passed, pairs, images * patches, images * per_image, vision_pairs, packs)
