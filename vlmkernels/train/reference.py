"""The reference of a policy with adapters: the base model, or a frozen copy of the adapter that the run starts from.

The copy is an adapter named ``ref``, as in TRL. It keeps its weights for the whole run. Models are saved without it; a
checkpoint has its weights in ``reference_adapter.safetensors``, so that a resumed run has the reference of the first run.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

ADAPTER = "ref"
WEIGHTS_FILE = "reference_adapter.safetensors"
# Initializations of LoRA that change the weights of the base model, which is then not the model that was given.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model has an adapter that is the reference. An active adapter, which is trained, is not."""
    return is_peft_model(model) and ADAPTER in model.peft_config and ADAPTER not in model.active_adapters


def kind_of(model: torch.nn.Module, beta: float) -> str | None:
    """Return the reference of a run: "adapter", "base" (the model without adapters), "copy" (of the whole model) or None.

    Args:
        model: the policy without wrappers.
        beta: weight of the KL term; with 0 there is no reference.
    """
    if beta == 0:
        return None
    return "adapter" if has_adapter(model) else "base" if is_peft_model(model) else "copy"


def changes_base(peft_config: Any) -> bool:
    """Whether adding the adapter changes the base model, so that the base model cannot be the reference."""
    return str(getattr(peft_config, "init_lora_weights", "")).lower().startswith(CHANGES_BASE)


def add_adapter(model: PreTrainedModel) -> None:
    """Add a frozen copy of the active adapter, in place. An adapter ``ref`` that the model has already is frozen instead.

    Raises:
        ValueError: several adapters are active, or the active one is named ``ref``.
    """
    if has_adapter(model):
        for _, parameter in _reference_tensors(model, model.named_parameters()):
            parameter.requires_grad_(False)
        return
    if ADAPTER in model.active_adapters:
        raise ValueError(f"model must not train an adapter named {ADAPTER!r} with beta > 0, the name of the reference")
    if len(model.active_adapters) != 1:
        active = ", ".join(model.active_adapters)
        raise ValueError(f"model must have one active adapter with beta > 0, because the reference is its copy, got {active}")
    (active,) = model.active_adapters
    config = copy.deepcopy(model.peft_config[active])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others can change the base model
    known = dict(_tensors(model))
    with _same_adapters(model):
        model.add_adapter(ADAPTER, config)
    for name, tensor in _tensors(model):
        if name not in known:
            parts = name.split(".")
            parts[len(parts) - 1 - parts[::-1].index(ADAPTER)] = active
            tensor.data = known[".".join(parts)].detach().clone()
            tensor.requires_grad_(False)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _reference_tensors(
    model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return those of the named tensors that belong to the adapter ``ref``, if it is the reference."""
    if has_adapter(model):
        yield from (item for item in tensors if ADAPTER in item[0].split("."))


def policy_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Return the parameters without those of the adapter ``ref``."""
    copied = {id(parameter) for _, parameter in _reference_tensors(model, model.named_parameters())}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in copied)


@contextmanager
def _same_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Restore the active adapter and what is trained. PEFT trains all of an adapter that it activates."""
    active, trained = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        if model.active_adapter != active:
            model.set_adapter(active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextmanager
def as_reference(model: PreTrainedModel) -> Iterator[None]:
    """Let a policy with adapters compute the reference inside: with its adapter ``ref``, or else without adapters."""
    with _same_adapters(model):
        if has_adapter(model):
            model.set_adapter(ADAPTER)
            yield
        else:
            with model.disable_adapter():
                yield


@contextmanager
def hidden(model: torch.nn.Module) -> Iterator[None]:
    """Save the model without the reference inside: a folder ``ref`` would be loaded as an adapter to train."""
    if not has_adapter(model):
        yield
        return
    saved = [name for name in model.peft_config if name != ADAPTER]
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=saved)
    try:
        yield
    finally:
        del model.save_pretrained


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the adapter ``ref`` by the names of the parameters, on the CPU; empty without one.

    Call it before the model is wrapped.
    """
    named = _reference_tensors(model, _tensors(model))
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named}


def save(state: dict[str, torch.Tensor], checkpoint: str | Path) -> None:
    """Add the reference to a checkpoint."""
    save_file(state, str(Path(checkpoint) / WEIGHTS_FILE))


def restore(model: torch.nn.Module, checkpoint: str | Path, manifest: Path, kind: str | None) -> None:
    """Load the reference of a checkpoint into the adapter ``ref``. Call it before the model is wrapped.

    A checkpoint of a run without a reference, or of a version that did not record it, causes a warning.

    Args:
        manifest: the file that states the reference of the run that wrote the checkpoint.
        kind: the reference of this run; see ``kind_of``.

    Raises:
        ValueError: the checkpoint was written by a run with another kind of reference, or another adapter.
    """
    about = json.loads(manifest.read_text()) if manifest.exists() else {}
    saved_kind, name = about.get("reference"), f"resume_from_checkpoint {checkpoint}"
    if kind is None:
        return
    if saved_kind is None:
        text = "%s records no reference: this run uses %s as it was given, perhaps not the reference of the first run"
        logger.warning(text, name, _MEANINGS[kind])
        return
    if saved_kind != kind:
        raise ValueError(
            f"{name} must have the reference of this run, {_MEANINGS[kind]}, got {_MEANINGS[saved_kind]}: give the model and "
            "peft_config that the first run was given"
        )
    if kind == "adapter":
        saved, own = load_file(str(Path(checkpoint) / WEIGHTS_FILE)), adapter_state(model)
        for key in sorted(saved.keys() | own.keys()):
            shapes = [tuple(state[key].shape) if key in state else None for state in (own, saved)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} must have a reference with {key} of shape {shapes[0]}, got {shapes[1]}")
        model.load_state_dict(saved, strict=False)


_MEANINGS = {"adapter": "a copy of an adapter", "base": "the model without adapters", "copy": "a copy of the whole model"}
