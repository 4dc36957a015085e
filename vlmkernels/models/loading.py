"""The models of a run: the policy and the reference."""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from vlmkernels.models.families import TEXT, family_of

# Code beside the weights is not run unless asked for: without a word of it, transformers would ask at the terminal.
NO_CODE = {"trust_remote_code": False}


def _of_files(kwargs: dict) -> dict:
    """Of the arguments of a model's from_pretrained those that its configuration and processor have too."""
    return {name: kwargs[name] for name in ("trust_remote_code", "revision") if name in kwargs}


def load_processor(path: str, model_init_kwargs: dict | None = None):
    """The processor or tokenizer at ``path``."""
    return AutoProcessor.from_pretrained(path, **_of_files(NO_CODE | (model_init_kwargs or {})))


def load_model(path: str, model_init_kwargs: dict | None = None) -> PreTrainedModel:
    """The model at ``path``, in fp32 unless ``model_init_kwargs`` has a dtype; with its adapters if the path holds some.

    Files are read as tensors and JSON: a pickled weight file goes through ``torch.load(weights_only=True)``.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"model must be an existing folder or a name on the hub, got {path}")
    if (Path(path) / "adapter_config.json").exists():
        from peft import PeftConfig, PeftModel

        base = load_model(PeftConfig.from_pretrained(path).base_model_name_or_path, model_init_kwargs)
        return PeftModel.from_pretrained(base, path, is_trainable=True)
    kwargs = {"dtype": torch.float32, **NO_CODE, **(model_init_kwargs or {})}
    family = family_of(AutoConfig.from_pretrained(path, **_of_files(kwargs)))
    auto = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    model = auto.from_pretrained(path, **kwargs)
    if is_deepspeed_zero3_enabled():  # transformers notes renamings that it did not need, and would undo them in checkpoints
        vars(model).pop("_weight_conversions", None)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).requires_grad_(False).eval()


@contextmanager
def inference(model: torch.nn.Module):
    """No gradients and evaluation mode inside; the mode from before outside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
