"""The sizes of a model that determine its cost, read from its configuration."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmkernels.models.families import TEXT, family_of, prefix_sharing_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Published configurations, reduced to the fields that determine sizes.
MODELS = {
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
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
    "qwen3-vl-2b": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
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

# Modules of a vision tower that run once per image token, not once per patch.
_AFTER_MERGE = re.compile(r"merger|projector|connector|multi_modal")


@dataclass(frozen=True)
class Stack:
    """Transformer layers of a decoder or a vision tower.

    Attributes:
        layers: number of layers.
        hidden, intermediate: hidden size, and intermediate size of the MLP.
        heads, kv_heads, head_dim: number of query heads, number of key-value heads, and their width.
        linear: number of weights that one token is multiplied by in all layers; of the experts, only the weights of those that
            the token is routed to.
        ports: sum of in_features + out_features of all linear layers, the number of LoRA parameters per rank.
        params: number of parameters of all layers.
        gated: whether the MLP has a gate.
        qk_norm: whether queries and keys are normalized.
    """

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
        """Total width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Total width of all key heads, or of all value heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Vision:
    """A vision tower.

    Attributes:
        stack: its transformer layers.
        merger: number of weights that one image token is multiplied by after the patches have been merged.
        patch: side of a patch in pixels.
        merge: side of an image token in patches.
        side: side in pixels to which every image is resized; None = images keep their size.
        tokens: number of tokens of every image, if it is fixed.
        window: number of patches in an attention window; None = no windows.
        full_layers: number of layers without windows.
    """

    stack: Stack
    merger: int
    patch: int
    merge: int
    side: int | None
    tokens: int | None
    window: int | None
    full_layers: int

    def patches(self, width: int, height: int) -> int:
        """Return the number of patches of an image with this size in pixels, after resizing."""
        if self.side is not None:
            return (self.side // self.patch) ** 2
        unit = self.patch * self.merge
        return max(1, round(width / unit)) * max(1, round(height / unit)) * self.merge**2

    def image_tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of an image with this size in pixels."""
        return self.tokens or self.patches(width, height) // self.merge**2


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    Attributes:
        name: name in reports.
        decoder: layers of the language model.
        vision: the vision tower; None for a text model.
        vocab: vocabulary size.
        tied: whether the language model head shares its weights with the embedding.
        params: number of parameters.
        unshared: why the completions of a group cannot share one prompt; None if they can.
    """

    name: str
    decoder: Stack
    vision: Vision | None
    vocab: int
    tied: bool
    params: int
    unshared: str | None = None

    @property
    def head(self) -> int:
        """Number of weights of the language model head."""
        return self.vocab * self.decoder.hidden

    @property
    def vision_params(self) -> int:
        """Number of parameters of the vision tower."""
        return self.vision.stack.params if self.vision else 0

    @classmethod
    def from_name(cls, name: str) -> "ModelShape":
        """Return the shape of a model: a name in ``MODELS``, or the path of a model or of its configuration file."""
        from transformers import AutoConfig

        if name in MODELS:
            content = MODELS[name]
            return cls.from_config(AutoConfig.for_model(**content), name)
        if not Path(name).exists():
            raise ValueError(f"model must be {', '.join(MODELS)} or the path of a model or its configuration, got {name}")
        return cls.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False), name)

    @classmethod
    def from_config(cls, config: "PreTrainedConfig", name: str = "model") -> "ModelShape":
        """Return the shape of a model from its configuration, for any family in ``vlmkernels.models.families``.

        Counts the parameters of the model on the meta device, which allocates no memory.
        """
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
        return cls(name, stack, vision, text.vocab_size, embedding is head, params, prefix_sharing_unsupported(config))


def _first(config: "PreTrainedConfig", *names: str, default: Any = None) -> Any:
    """Return the first of the named attributes that exists and is not None, else ``default``."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _product_weights(module: nn.Module) -> int:
    """Return the number of weights of a linear layer or convolution; 0 for other modules."""
    is_product = isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    return module.weight.numel() if is_product else 0


def _stack(layers: nn.ModuleList, config: "PreTrainedConfig") -> Stack:
    linear = sum(_product_weights(module) for module in layers.modules())
    chosen = _first(config, "num_experts_per_tok", "top_k_experts", default=1)
    routed = chosen / _first(config, "num_experts", "n_routed_experts", default=1)
    linear += int(sum(p.numel() for p in layers.parameters() if p.dim() == 3) * routed)
    heads = _first(config, "num_attention_heads", "num_heads")
    width = config.hidden_size
    # Where layers differ in the number and width of their heads, most of them have those of the first: five of six in Gemma 4.
    first = config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config
    return Stack(
        layers=len(layers),
        hidden=width,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=_first(first, "num_key_value_heads", default=heads),
        head_dim=_first(first, "head_dim", default=width // heads),
        linear=linear,
        ports=sum(sum(module.weight.shape) for module in layers.modules() if isinstance(module, nn.Linear)),
        params=sum(p.numel() for p in layers.parameters()),
        qk_norm=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
    )


def _vision(tower: dict[str, nn.Module], config: "PreTrainedConfig") -> Vision:
    own = config.vision_config
    products = {name: _product_weights(module) for name, module in tower.items()}
    merger = sum(count for name, count in products.items() if _AFTER_MERGE.search(name))
    width, heads = _first(own, "embed_dim", "hidden_size"), _first(own, "num_heads", "num_attention_heads", default=1)
    if own.model_type == "qwen2_5_vl_vision":
        width = own.hidden_size
    width = width or own.mm_embed_dim  # Gemma 4 unified, which has no layers
    owners = {id(p): p for module in tower.values() for p in module.parameters()}
    depth = _first(own, "depth", "num_hidden_layers", default=0)
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
    side = None if any_size else _first(own, "image_size")
    side = side[0] if isinstance(side, (list, tuple)) else side
    merges = ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size")
    merge = _first(own, *merges, default=_first(config, "spatial_merge_size", "scale_factor", "downsample_factor", default=1))
    merge = merge[0] if isinstance(merge, (list, tuple)) else merge
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
