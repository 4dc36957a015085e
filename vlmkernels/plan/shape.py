"""The sizes of a model that determine its cost, read from its configuration."""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from vlmkernels.models.families import TEXT, family_of, prefix_sharing_unsupported
from vlmkernels.plan.mixers import Mixer, first, full_attention, mixers_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_QWEN2_5_TOWER = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
# Published configurations, reduced to the fields that determine sizes.
MODELS = {
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        "vision_config": {**_QWEN2_5_TOWER, "out_hidden_size": 2048},
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        },
        "vision_config": {**_QWEN2_5_TOWER, "out_hidden_size": 3584},
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

# Names on the hub, which differ from those above in their case and their endings.
HUB = {name: f"Qwen/{name.title().replace('Vl', 'VL')}-Instruct" for name in MODELS}


def published(name: str) -> str | None:
    """Return the key of ``MODELS`` that a name means, or None. The name may have any case, and be that on the hub."""
    if Path(name).exists():
        return None
    plain = name.lower().rpartition("/")[2].removesuffix("-instruct")
    return plain if plain in MODELS else None


# Modules of a vision tower that run once per image token, not once per patch.
_AFTER_MERGE = re.compile(r"(?<!vit_)merger|projector|connector|multi_modal|resampler")
# MiniCPM-V also merges 2 x 2 patches within its tower, after layer insert_layer_id, except in downsample mode 4x. The MLP of
# this merger and the layers after it run once per 2 x 2 patches.
_AFTER_VIT_MERGER = re.compile(r"vit_merger\.linear|layers\.(\d+)\.")
# What the image processor of a model chooses, so that the configuration does not tell how many tokens an image has.
_TILES, _SIZE = "the tiles of an image", "the size of an image"
_CHOSEN = {
    **dict.fromkeys(("aya_vision", "idefics3", "internvl", "lfm2_vl", "llava_next", "llava_onevision", "minicpmv4_7"), _TILES),
    **dict.fromkeys(("molmo2", "ovis2", "smolvlm"), _TILES),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _SIZE),
}
# Patches along a side of an image token, by model_type or downsample_mode, for models without the attributes in ``_merge``.
_MERGES = {"molmo2": 2, "gemma4_unified": 1, "4x": 2, "16x": 4}
# Maximum number of patches of a tile, from published processors. Of other models with tiles, all have the size of the tower.
_TILE_PATCHES = {"lfm2_vl": 1024, "minicpmv4_7": 1024}
# Image tokens besides those of patches: per row of image tokens, and per image.
_EXTRA_TOKENS = {"hunyuan_vl": (1, 2)}


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
        mixers: what the layers of a decoder mix tokens with. ``heads``, ``kv_heads`` and ``head_dim`` are those of most layers.
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
    mixers: tuple[Mixer, ...] = ()

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
        side: side in pixels to which every image or tile is resized; None = images keep their size.
        tokens: number of tokens of every image, if it is fixed.
        window: number of patches in an attention window or a tile; None = no windows.
        full_layers: number of layers without windows.
        extra: number of further tokens per row of image tokens, and per image.
        chosen: what the image processor chooses, so that the number of tokens is unknown; None if it is known.
        given: number of tokens of every image in the workload, which overrides all of these.
    """

    stack: Stack
    merger: int
    patch: int
    merge: int
    side: int | None
    tokens: int | None
    window: int | None
    full_layers: int
    extra: tuple[int, int] = (0, 0)
    chosen: str | None = None
    given: int | None = None

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of an image in units of ``merge`` patches, after resizing."""
        unit = self.patch * self.merge
        return max(1, round(height / unit)), max(1, round(width / unit))

    def patches(self, width: int, height: int) -> int:
        """Return the number of patches of an image with this size in pixels, after resizing. Raises as ``image_tokens``."""
        of_side = None if self.side is None else (self.side // self.patch) ** 2
        if self.given is not None:
            return round(self.given * (of_side / self.tokens if of_side and self.tokens else self.merge**2))
        self._check_known()
        rows, columns = self._grid(width, height)
        return of_side or rows * columns * self.merge**2

    def image_tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of an image with this size in pixels.

        Raises:
            ValueError: the image processor chooses it, and it is not given.
        """
        if self.given is not None:
            return self.given
        self._check_known()
        rows, _ = self._grid(width, height)
        per_row, per_image = self.extra
        return self.tokens or self.patches(width, height) // self.merge**2 + rows * per_row + per_image

    def _check_known(self) -> None:
        if self.chosen is not None:
            raise ValueError(
                f"image_tokens must be given for this model, because its image processor chooses {self.chosen}, got None"
            )


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
        quantizable: number of weights that bitsandbytes stores in 4 bits: those of linear layers, without the head.
        adapted: a regular expression of the names of the decoder's linear layers, as ``target_modules`` of LoRA.
    """

    name: str
    decoder: Stack
    vision: Vision | None
    vocab: int
    tied: bool
    params: int
    unshared: str | None = None
    quantizable: int = 0
    adapted: str = ""

    @property
    def head(self) -> int:
        """Number of weights of the language model head."""
        return self.vocab * self.decoder.hidden

    @property
    def vision_params(self) -> int:
        """Number of parameters of the vision tower."""
        return self.vision.stack.params if self.vision else 0

    def with_image_tokens(self, given: int | None) -> "ModelShape":
        """Return the shape with this number of tokens for every image; None = computed from the image's size."""
        return self if self.vision is None else replace(self, vision=replace(self.vision, given=given))

    @classmethod
    def from_name(cls, name: str) -> "ModelShape":
        """Return the shape of a model: a name in ``MODELS`` or on the hub (see ``published``), or a path of a model or of its
        configuration file.
        """
        from transformers import AutoConfig

        if (known := published(name)) is not None:
            return cls.from_config(AutoConfig.for_model(**MODELS[known]), known)
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
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is not head}
        inside = {*decoder.layers.modules()}
        ports = sorted({n.rpartition(".")[2] for n, m in linear.items() if m in inside})
        where = next(n for n, m in model.named_modules() if m is decoder.layers)
        return cls(
            name,
            stack,
            vision,
            text.vocab_size,
            embedding is head,
            params,
            prefix_sharing_unsupported(config),
            quantizable=sum(m.weight.numel() for m in linear.values()),
            adapted=rf".*{re.escape(where)}\..*\.({'|'.join(ports)})",
        )


def _product_weights(module: nn.Module) -> int:
    """Return the number of weights of a linear layer or convolution; 0 for other modules."""
    is_product = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return module.weight.numel() if is_product else 0


def _stack(layers: nn.ModuleList, config: "PreTrainedConfig") -> Stack:
    linear = sum(_product_weights(module) for module in layers.modules())
    chosen = first(config, "num_experts_per_tok", "top_k_experts", default=1)
    routed = chosen / first(config, "num_experts", "n_routed_experts", default=1)
    experts = [m for m in layers.modules() if not isinstance(m, nn.Conv1d)]
    linear += int(sum(p.numel() for m in experts for p in m.parameters(recurse=False) if p.dim() == 3) * routed)
    # Where layers differ in the number and width of their heads, most of them have those of the first: five of six in Gemma 4.
    typical = full_attention(config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config)
    return Stack(
        layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=typical.heads,
        kv_heads=typical.kv_heads,
        head_dim=typical.head_dim,
        linear=linear,
        ports=sum(sum(module.weight.shape) for module in layers.modules() if isinstance(module, nn.Linear)),
        params=sum(p.numel() for p in layers.parameters()),
        qk_norm=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
        mixers=mixers_of(config),
    )


def _merge(config: "PreTrainedConfig") -> int:
    """Return the side of an image token in patches."""
    if (known := _MERGES.get(first(config, "downsample_mode", default=config.model_type))) is not None:
        return known
    if ratio := first(config, "downsample_ratio"):
        return round(1 / ratio)
    of_tower = ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size", "hidden_stride")
    of_model = ("spatial_merge_size", "scale_factor", "downsample_factor")
    merge = first(config.vision_config, *of_tower, default=first(config, *of_model, default=1))
    return merge[0] if isinstance(merge, (list, tuple)) else merge


def _vision(tower: dict[str, nn.Module], config: "PreTrainedConfig") -> Vision:
    own, merge = config.vision_config, _merge(config)
    products = {name: _product_weights(module) for name, module in tower.items()}
    insert = first(own, "insert_layer_id")
    if insert is not None and merge == 2:
        products = {name: weights for name, weights in products.items() if "vit_merger" not in name}  # not used
    merger = sum(count for name, count in products.items() if _AFTER_MERGE.search(name))
    width, heads = first(own, "embed_dim", "hidden_size"), first(own, "num_heads", "num_attention_heads", default=1)
    if own.model_type == "qwen2_5_vl_vision":
        width = own.hidden_size
    width = width or own.mm_embed_dim  # Gemma 4 unified, which has no layers
    owners = {id(p): p for module in tower.values() for p in module.parameters()}
    depth = first(own, "depth", "num_hidden_layers", default=0)
    linear = sum(products.values()) - merger
    if insert is not None and merge == 4:
        found = {name: _AFTER_VIT_MERGER.search(name) for name in products}
        later = sum(products[name] for name, where in found.items() if where and int(where[1] or depth) > insert)
        linear, depth = linear - 3 * later // 4, depth - round(3 * (depth - insert - 1) / 4)
    stack = Stack(
        layers=depth,
        hidden=width,
        intermediate=first(own, "intermediate_size", default=int(width * first(own, "mlp_ratio", default=4))),
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        linear=linear,
        ports=0,
        gated=any(name.endswith("gate_proj") for name in tower),
        params=sum(p.numel() for p in owners.values()),
    )
    any_size = {"image_patch"} & {x.axis for x in family_of(config).inputs.values()} or own.model_type == "pixtral"
    side = None if any_size else first(own, "image_size")
    side = side[0] if isinstance(side, (list, tuple)) else side
    patch = own.patch_size[0] if isinstance(own.patch_size, (list, tuple)) else own.patch_size
    full_layers = depth if (types := first(own, "layer_types")) is None else types.count("full_attention")
    window = _TILE_PATCHES.get(config.model_type) if side is None else (side // patch) ** 2
    if hasattr(own, "fullatt_block_indexes"):
        window, full_layers = (own.window_size // patch // merge * merge) ** 2, len(own.fullatt_block_indexes)
    elif window is not None:
        full_layers = 0
    return Vision(
        stack,
        merger,
        patch,
        merge,
        side,
        tokens=first(config, "mm_tokens_per_image"),
        window=window,
        full_layers=full_layers,
        extra=_EXTRA_TOKENS.get(config.model_type, (0, 0)),
        chosen=_CHOSEN.get(config.model_type),
    )
