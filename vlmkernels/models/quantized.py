"""QLoRA: models whose linear layers bitsandbytes stores in 4 or 8 bits, under adapters that are trained (arXiv:2305.14314)."""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from vlmkernels.ops.checks import did_you_mean

# The 4-bit settings of the paper, section 3, for settings that a dict leaves out.
DEFAULTS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


_KEYS = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]


def json_values(model_init_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return ``model_init_kwargs`` with the settings of a ``BitsAndBytesConfig`` in its place, which JSON can hold."""
    config = (model_init_kwargs or {}).get("quantization_config")
    if not isinstance(config, BitsAndBytesConfig):
        return model_init_kwargs
    return {**model_init_kwargs, "quantization_config": {k: v for k, v in config.to_dict().items() if k in _KEYS}}


def quantized_arguments(model_init_kwargs: dict[str, Any] | None, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return ``model_init_kwargs`` with a ``BitsAndBytesConfig`` in place of a dict ``quantization_config``.

    In 4 bits, the settings that the dict leaves out are those of QLoRA: NF4, double quantization, and products in the dtype
    of the run. ``BitsAndBytesConfig`` itself has other defaults: FP4, and products in fp32.

    Args:
        model_init_kwargs: arguments of ``from_pretrained``. Other kinds of ``quantization_config`` than such a dict stay.
        compute_dtype: the dtype of the run's products.

    Raises:
        ValueError: the dict has an unknown key, or does not quantize.
        ImportError: bitsandbytes is not installed.
    """
    kwargs = dict(model_init_kwargs or {})
    config = kwargs.get("quantization_config")
    if config is None:
        return kwargs
    if isinstance(config, dict) and config.get("quant_method", "bitsandbytes") == "bitsandbytes":
        given = {name: value for name, value in config.items() if name != "quant_method"}
        if unknown := [name for name in given if name not in _KEYS]:
            raise ValueError(
                f"quantization_config must have keys of BitsAndBytesConfig, got {unknown[0]!r}{did_you_mean(unknown[0], _KEYS)}"
            )
        if not given.get("load_in_4bit") and not given.get("load_in_8bit"):
            raise ValueError(f"quantization_config must set load_in_4bit or load_in_8bit to true, got {config!r}")
        if given.get("load_in_4bit"):
            given = DEFAULTS | {"bnb_4bit_compute_dtype": compute_dtype} | given
        kwargs["quantization_config"] = config = BitsAndBytesConfig(**given)
    if isinstance(config, BitsAndBytesConfig) and not has_bitsandbytes():
        raise ImportError("quantization_config needs bitsandbytes: pip install 'vlmkernels[qlora]'")
    return kwargs


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model, perhaps with adapters, has quantized weights."""
    return getattr(model, "hf_quantizer", None) is not None


def prepare_quantized(model: PreTrainedModel) -> None:
    """Check that a model can be trained if it is quantized, and let its layers compute alike in sampling and in training.

    Changes a quantized model in place; does nothing to others.

    Raises:
        ValueError: the model is not quantized by bitsandbytes, has no adapters, or its language-model head is quantized.
    """
    if not is_quantized(model):
        return
    method = getattr(model.quantization_method, "value", model.quantization_method)
    if method != "bitsandbytes":
        raise ValueError(f"model must be quantized by bitsandbytes, or not at all, got {method}")
    if not is_peft_model(model):
        raise ValueError("peft_config must be given for a quantized model, whose weights cannot be trained, got None")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    head = model.get_output_embeddings()
    if isinstance(getattr(head, "base_layer", head), (Linear4bit, Linear8bitLt)):
        raise ValueError(
            "quantization_config must leave out the language-model head, of which the loss needs the weights "
            f"(add 'lm_head' to llm_int8_skip_modules), got {type(head).__name__}"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, a layer in evaluation mode would repack its weight for a kernel in bf16 without gradients,
        # which it would then run in training too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
