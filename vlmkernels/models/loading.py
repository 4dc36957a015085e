"""Loading models and processors, and changing the mode of a loaded model."""

import copy
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
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vlmkernels.models.families import TEXT, family_of

# Do not run code that comes with the weights unless the user enables it. If it is unset, transformers prompts at the terminal.
_NO_REMOTE_CODE = {"trust_remote_code": False}


def _shared_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's from_pretrained that its configuration and processor need too."""
    return {name: kwargs[name] for name in ("trust_remote_code", "revision") if name in kwargs}


def load_processor(path: str, model_init_kwargs: dict[str, Any] | None = None) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor or tokenizer at ``path``."""
    return AutoProcessor.from_pretrained(path, **_shared_kwargs(_NO_REMOTE_CODE | (model_init_kwargs or {})))


def load_model(path: str, model_init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """Load the model at ``path``, with its adapters if the folder has any.

    Pickled weight files are read with ``torch.load(weights_only=True)``.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        model_init_kwargs: arguments of ``from_pretrained``. ``dtype`` defaults to fp32.

    Raises:
        ValueError: ``path`` looks like a folder and is not one.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"model must be an existing folder or a name on the hub, got {path}")
    if (Path(path) / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        base = load_model(PeftConfig.from_pretrained(path).base_model_name_or_path, model_init_kwargs)
        return PeftModel.from_pretrained(base, path, is_trainable=True)
    kwargs = {"dtype": torch.float32, **_NO_REMOTE_CODE, **(model_init_kwargs or {})}
    family = family_of(AutoConfig.from_pretrained(path, **_shared_kwargs(kwargs)))
    auto = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    model = auto.from_pretrained(path, **kwargs)
    if is_deepspeed_zero3_enabled():
        # transformers records weight renamings here that it did not apply, and would revert them when it saves.
        vars(model).pop("_weight_conversions", None)
    return model


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model under a PEFT wrapper, or ``model`` itself if it has none."""
    return model.get_base_model() if is_peft_model(model) else model


def disable_dropout(model: torch.nn.Module) -> None:
    """Set the rate of every ``torch.nn.Dropout`` in ``model`` to 0. Changes the model in place and cannot be undone."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of ``model`` in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Disable gradients and put ``model`` in evaluation mode; restore its mode on exit."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
