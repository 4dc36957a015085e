"""What the layers of a decoder mix tokens with: attention, also with a sliding window, or a recurrence. See ``_MIXERS``."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Mixer:
    """Equal layers of a decoder. Attention has heads, a recurrence has a state.

    Attributes:
        heads, kv_heads, head_dim: number of query heads, number of key-value heads, and their width. If keys and values differ
            in width, their mean.
        window: number of tokens that a token attends to, itself included; None = all tokens before it.
        reused: whether keys and values are those of an earlier layer.
        latent: number of elements per token from which keys and values are computed, if a cache stores these instead.
        state: number of elements of the state of a sequence.
        recurrence: operations per token of a forward pass, without projections, divided by 4 (as the query width of attention).
        layers: number of layers.
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    reused: bool = False
    latent: int = 0
    state: int = 0
    recurrence: int = 0
    layers: int = 1

    @property
    def query_width(self) -> int:
        """Total width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Total width of all key heads, or of all value heads."""
        return self.kv_heads * self.head_dim


class Span(NamedTuple):
    """Tokens at the positions ``start`` to ``stop`` of their sequences. They attend to all tokens before them.

    Attributes:
        copies: number of such sequences.
        start, stop: positions.
    """

    copies: float
    start: int
    stop: int

    @property
    def tokens(self) -> float:
        """Number of tokens."""
        return self.copies * (self.stop - self.start)

    def pairs(self, window: int | None = None) -> float:
        """Return the number of pairs of tokens that attend to each other, with a sliding window or without."""
        return self.copies * (_pairs(self.stop, window) - _pairs(self.start, window))


def _pairs(length: int, window: int | None) -> float:
    seen = length if window is None else min(length, window)
    return seen * length - seen**2 / 2


def first(config: "PreTrainedConfig", *names: str, default: Any = None) -> Any:
    """Return the first of the named attributes that exists and is not None, else ``default``."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def full_attention(config: "PreTrainedConfig") -> Mixer:
    """Return an attention layer without a window."""
    heads = first(config, "num_attention_heads", "num_heads")
    kv_heads = first(config, "num_key_value_heads", default=heads)
    if (query_key := first(config, "qk_head_dim")) is not None:  # multi-head latent attention (DeepSeek V3, Kimi)
        width = (query_key + config.v_head_dim) // 2
        return Mixer(heads, kv_heads, width, latent=config.kv_lora_rank + config.qk_rope_head_dim)
    return Mixer(heads, kv_heads, first(config, "head_dim", default=config.hidden_size // heads))


def _sliding_attention(config: "PreTrainedConfig") -> Mixer:
    return replace(full_attention(config), window=config.sliding_window)


def _gated_delta_rule(config: "PreTrainedConfig") -> Mixer:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    delta = values * config.linear_key_head_dim
    return Mixer(state=delta + config.linear_conv_kernel_dim * (2 * keys + values), recurrence=2 * delta)


def _short_convolution(config: "PreTrainedConfig") -> Mixer:
    return Mixer(state=config.conv_L_cache * config.hidden_size)  # its weights are counted with those of linear layers


# Type of a layer in ``layer_types`` of a text configuration -> its mixer.
_MIXERS: dict[str, Callable[["PreTrainedConfig"], Mixer]] = {
    "full_attention": full_attention,
    "sliding_attention": _sliding_attention,
    "linear_attention": _gated_delta_rule,
    "conv": _short_convolution,
}


def mixers_of(config: "PreTrainedConfig") -> tuple[Mixer, ...]:
    """Return the mixers of a decoder from its text configuration.

    Raises:
        NotImplementedError: the decoder has layers of another type.
    """
    count = config.num_hidden_layers
    window = first(config, "sliding_window")  # without layer_types, a window applies to all layers (Mistral)
    types = first(config, "layer_types") or ["full_attention" if window is None else "sliding_attention"] * count
    if unknown := sorted({*types} - _MIXERS.keys()):
        raise NotImplementedError(f"layer_types must be among {', '.join(_MIXERS)} to be planned, got {', '.join(unknown)}")
    reused = count - first(config, "num_kv_shared_layers", default=0)  # the first such layer (Gemma 4)
    # Layers that differ in the number and width of their heads (Gemma 4).
    configs = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * count
    mixers = [replace(_MIXERS[types[k]](configs[k]), reused=k >= reused) for k in range(count)]
    return tuple(replace(mixer, layers=layers) for mixer, layers in Counter(mixers).items())
