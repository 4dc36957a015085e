"""What of a model decides its cost, read from its configuration."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlmkernels.models.families import TEXT, family_of, why_not_share_prefix
from vlmkernels.ops.checks import require

# Published configurations, as far as they decide shapes.
MODELS = {
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "qwen3-vl-32b": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 5120,
            "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip

# Of a vision tower's modules those that run once per image token, not once per patch.
_AFTER_MERGE = re.compile(r"merger|projector|connector|multi_modal")


@dataclass(frozen=True)
class Stack:
    """Transformer layers. linear: elements of weights that a token is multiplied by, in all layers (of experts, those it is
    routed to); ports: inputs and outputs of the linear layers, summed. params: all of theirs. gated: whether the MLP has a
    gate; qk_norm: whether queries and keys are normalised."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    linear: int
    ports: int
    params: int
    gated: bool = True
    qk_norm: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Vision:
    """A tower. merger: elements of weights that an image token is multiplied by. patch, merge: pixels of a patch's side,
    patches of an image token's. side: pixels that every image is resized to; None: any size. window: patches that a patch of
    a windowed layer sees; full_layers: those where it sees all."""

    stack: Stack
    merger: int
    patch: int
    merge: int
    side: int | None
    tokens: int | None
    window: int | None
    full_layers: int

    def patches(self, width: int, height: int) -> int:
        """Of an image, after its resize."""
        if self.side is not None:
            return (self.side // self.patch) ** 2
        unit = self.patch * self.merge
        return max(1, round(width / unit)) * max(1, round(height / unit)) * self.merge**2

    def image_tokens(self, width: int, height: int) -> int:
        return self.tokens or self.patches(width, height) // self.merge**2


@dataclass(frozen=True)
class ModelShape:
    """params: all. head: elements of the language-model head; tied: it is the embedding too. unshared: why completions cannot
    share a prompt; None where they can."""

    name: str
    decoder: Stack
    vision: Vision | None
    vocab: int
    tied: bool
    params: int
    unshared: str | None = None

    @property
    def head(self) -> int:
        return self.vocab * self.decoder.hidden

    @property
    def vision_params(self) -> int:
        return self.vision.stack.params if self.vision else 0

    @classmethod
    def named(cls, name: str) -> "ModelShape":
        """Of a row of ``MODELS``, or of the configuration at a path (a file, or the folder of a model)."""
        from transformers import AutoConfig

        if name in MODELS:
            content = MODELS[name]
            return cls.of(AutoConfig.for_model(**content), name)
        rule = f"be {', '.join(MODELS)} or the path of a configuration"
        require(Path(name).exists(), "model", rule, name)
        return cls.of(AutoConfig.from_pretrained(name, trust_remote_code=False), name)

    @classmethod
    def of(cls, config, name: str = "model") -> "ModelShape":
        """Of a configuration of any family of ``vlmkernels.models.families``: its model is made without memory, on the device
        "meta", and its modules are counted."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        family = family_of(config)
        auto = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config), attn_implementation="eager")
        text, base = config.get_text_config(), model.base_model
        decoder = base if family is TEXT else base.get_decoder()
        stack = _stack(decoder.layers, text)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        params = sum(p.numel() for p in model.parameters())
        vision = None
        if family is not TEXT:
            inside = {*decoder.modules()}
            tower = {n: m for n, m in base.named_modules() if m not in inside and m is not base}
            vision = _vision(tower, config)
        return cls(name, stack, vision, text.vocab_size, embedding is head, params, why_not_share_prefix(config))


def _first(config, *names: str, default=None):
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _of_linear(module: nn.Module) -> int:
    """Elements of weights that one input is multiplied by."""
    is_product = isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    return module.weight.numel() if is_product else 0


def _stack(layers: nn.ModuleList, config) -> Stack:
    linear = sum(_of_linear(module) for module in layers.modules())
    routed = _first(config, "num_experts_per_tok", default=1) / _first(config, "num_experts", "n_routed_experts", default=1)
    linear += int(sum(p.numel() for p in layers.parameters() if p.dim() == 3) * routed)
    heads = _first(config, "num_attention_heads", "num_heads")
    width = config.hidden_size
    return Stack(
        layers=len(layers),
        hidden=width,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=_first(config, "num_key_value_heads", default=heads),
        head_dim=_first(config, "head_dim", default=width // heads),
        linear=linear,
        ports=sum(sum(module.weight.shape) for module in layers.modules() if isinstance(module, nn.Linear)),
        params=sum(p.numel() for p in layers.parameters()),
        qk_norm=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
    )


def _vision(tower: dict[str, nn.Module], config) -> Vision:
    own = config.vision_config
    products = {name: _of_linear(module) for name, module in tower.items()}
    merger = sum(count for name, count in products.items() if _AFTER_MERGE.search(name))
    width, heads = _first(own, "embed_dim", "hidden_size"), _first(own, "num_heads", "num_attention_heads")
    if own.model_type == "qwen2_5_vl_vision" or not hasattr(own, "embed_dim"):
        width = own.hidden_size
    owners = {id(p): p for module in tower.values() for p in module.parameters()}
    depth = _first(own, "depth", "num_hidden_layers")
    stack = Stack(
        layers=depth,
        hidden=width,
        intermediate=_first(own, "intermediate_size", default=int(width * _first(own, "mlp_ratio", default=4))),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        linear=sum(products.values()) - merger,
        ports=0,
        gated=any(name.endswith("gate_proj") for name in tower),
        params=sum(p.numel() for p in owners.values()),
    )
    any_size = {"image_patch"} & {x.axis for x in family_of(config).inputs.values()} or own.model_type == "pixtral"
    side = None if any_size else own.image_size
    side = side[0] if isinstance(side, (list, tuple)) else side
    merge = _first(own, "spatial_merge_size", default=_first(config, "spatial_merge_size", "scale_factor", default=1))
    if ratio := _first(config, "downsample_ratio"):
        merge = round(1 / ratio)
    patch = own.patch_size[0] if isinstance(own.patch_size, (list, tuple)) else own.patch_size
    window = _first(own, "window_size") if hasattr(own, "fullatt_block_indexes") else None
    return Vision(
        stack,
        merger,
        patch,
        merge,
        side,
        tokens=_first(config, "mm_tokens_per_image"),
        window=(window // patch // merge * merge) ** 2 if window else None,
        full_layers=len(own.fullatt_block_indexes) if window else depth,
    )
