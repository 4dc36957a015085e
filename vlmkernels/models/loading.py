"""Loading models and processors, and changing the mode of a loaded model."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vlmkernels.models.families import TEXT, family_of
from vlmkernels.models.hunyuan import number_images_per_sample

# Do not run code that comes with the weights unless the user enables it. If it is unset, transformers prompts at the terminal.
_NO_REMOTE_CODE = {"trust_remote_code": False}


def _shared_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's from_pretrained that its configuration and processor need too."""
    return {name: kwargs[name] for name in ("trust_remote_code", "revision") if name in kwargs}


def _from_pretrained(auto: Any, path: str, **kwargs: Any) -> Any:
    """Call ``auto.from_pretrained``. An error says that the path of the model is wrong, which that of transformers does not."""
    try:
        return auto.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model must be the folder of a model or its name on the hub, got {path}: {reason}") from error


def load_processor(
    path: str, model_init_kwargs: dict[str, Any] | None = None, *, auto: Any = AutoProcessor
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor or tokenizer of the model at ``path``, or of its base model if the folder holds adapters.

    Args:
        auto: ``AutoTokenizer`` loads only the tokenizer.
    """
    kwargs = _shared_kwargs(_NO_REMOTE_CODE | (model_init_kwargs or {}))
    return _from_pretrained(auto, _base_path(path), **kwargs)


def load_config(path: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Load the configuration of the model at ``path``, or of its base model if the folder holds adapters.

    Raises:
        ValueError: ``path`` looks like a folder and is not one.
    """
    kwargs = _shared_kwargs(_NO_REMOTE_CODE | (model_init_kwargs or {}))
    return _from_pretrained(AutoConfig, _base_path(path), **kwargs)


def embedding_rows(model_or_config: PreTrainedModel | PreTrainedConfig) -> int:
    """Return the number of rows of the input embedding of a model, or of the model of a configuration."""
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config.get_text_config().vocab_size
    weight = model_or_config.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves a shape of 0


def _base_path(path: str) -> str:
    """Return ``path``, or the path of the base model if the folder holds adapters.

    Raises:
        ValueError: ``path`` looks like a folder and is not one.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"model must be an existing folder or a name on the hub, got {path}")
    if not (Path(path) / "adapter_config.json").exists():
        return path
    from peft import PeftConfig

    return PeftConfig.from_pretrained(path).base_model_name_or_path


def load_model(path: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """Load the model at ``path``, with its adapters if the folder has any.

    Pickled weight files are read with ``torch.load(weights_only=True)``.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        model_init_kwargs: arguments of ``from_pretrained``. ``dtype`` defaults to fp32.

    Raises:
        ValueError: ``path`` looks like a folder and is not one.
    """
    if (base_path := _base_path(path)) != path:
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(base_path, model_init_kwargs), path, is_trainable=True)
    kwargs = {"dtype": torch.float32, **_NO_REMOTE_CODE, **(model_init_kwargs or {})}
    family = family_of(_from_pretrained(AutoConfig, path, **_shared_kwargs(kwargs)))
    auto = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    model = number_images_per_sample(_from_pretrained(auto, path, **kwargs))
    if is_deepspeed_zero3_enabled():
        # transformers records weight renamings here that it did not apply, and would revert them when it saves.
        vars(model).pop("_weight_conversions", None)
    return model


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model under a PEFT wrapper, or ``model`` itself if it has none."""
    return model.get_base_model() if is_peft_model(model) else model


# The methods of a model that define how it samples, in place of which decode_groups runs.
_SAMPLING_METHODS = ("generate", "_sample", "prepare_inputs_for_generation", "_get_logits_processor", "_get_stopping_criteria")


def sampling_override(model: torch.nn.Module) -> str | None:
    """Return which method of sampling a user's class or the instance overrides, for example ``generate``; None if none is."""
    parts = [model.base_model, base_model(model)] if is_peft_model(model) else []
    for part in [model, *parts]:
        for name in _SAMPLING_METHODS:
            own = vars(part).get(name)
            # PEFT stores the model's own bound method on the instance.
            moved = isinstance(own, types.MethodType) and own.__func__ is getattr(type(own.__self__), name, None)
            if own is not None and not moved:
                return f"{type(part).__name__}.{name} is set on the instance"
            owner = next((cls for cls in type(part).__mro__ if name in vars(cls)), None)
            if owner is None:
                continue
            modules = owner.__module__, vars(owner)[name].__module__
            if not all(module.startswith(("transformers.", "peft.")) for module in modules):
                return f"{type(part).__name__} overrides {name}"
    return None


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate in ``model`` to 0. Changes the model in place and cannot be undone.

    The rates are those of torch's dropout modules, and numbers named ``attention_dropout`` or ``dropout`` in other modules.
    """
    for module in model.modules():
        for name in dropout_rates(module):
            setattr(module, name, 0.0)


def dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the dropout rates above 0 of ``module`` itself, by the names of its attributes."""
    # Attention layers of transformers hold their rate as a number. Elsewhere these names can be modules.
    names = ("p",) if isinstance(module, torch.nn.modules.dropout._DropoutNd) else ("attention_dropout", "dropout")
    rates = {name: getattr(module, name, None) for name in names}
    return {name: rate for name, rate in rates.items() if isinstance(rate, float) and rate > 0}


def freeze_vision(model: torch.nn.Module) -> None:
    """Let the parameters of the vision tower, and of what connects it to the decoder, need no gradient, with their adapters.

    Args:
        model: the model, perhaps with adapters.

    Raises:
        ValueError: the model is a text model.
    """
    plain = base_model(model)
    if family_of(plain.config) is TEXT:
        raise ValueError(f"freeze_vision must be False for a text model, got True for {type(plain).__name__}")
    kept = {*plain.base_model.get_decoder().parameters()}
    for parameter in plain.base_model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of ``model`` in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@contextmanager
def frozen_weights_cast_once(model: torch.nn.Module) -> Iterator[None]:
    """Let autocast convert each frozen fp32 weight of a linear layer once in the block, and not in every forward pass.

    autocast keeps the converted copy of a weight, until it ends, only if the weight requires gradients. So these weights do in
    the block, in which gradients must be disabled. The copies of a model under adapters take as much memory as those of a
    trained model.
    """
    layers = (module for module in model.modules() if type(module) is torch.nn.Linear)
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    frozen = [p for p in parameters if type(p) is torch.nn.Parameter and p.dtype == torch.float32 and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Disable gradients and put ``model`` in evaluation mode; restore the mode of each of its modules on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
