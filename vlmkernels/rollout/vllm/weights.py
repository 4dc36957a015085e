"""The weights that vLLM loads, in memory or in a folder, and checks of adapters."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def active_adapter(model: PreTrainedModel) -> str | None:
    """Return the name of the active adapter, or None if the model has no adapters."""
    return model.active_adapter if is_peft_model(model) else None


def lora_rank(model: PreTrainedModel, adapter: str) -> int:
    """Return the largest rank of a LoRA adapter; ``rank_pattern`` may set other ranks for single layers."""
    config = model.peft_config[adapter]
    return max([config.r, *config.rank_pattern.values()])


def check_adapters(model: PreTrainedModel) -> None:
    """Raise ValueError if the model has adapters that vLLM ignores or rejects."""
    if not is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model.active_adapter, str):
        raise ValueError(f"peft_config must activate exactly one adapter, got {model.active_adapter}")
    config, plain = model.peft_config[model.active_adapter], model.get_base_model()
    if config.peft_type != "LORA":
        raise ValueError(f"peft_config must be a LoRA configuration with use_vllm, got {config.peft_type}")
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"):
        value = getattr(config, name, None)
        if value:
            raise ValueError(f"peft_config must leave out {name} with use_vllm, because vLLM does not support it, got {value}")
    if config.bias != "none":
        raise ValueError(f"peft_config must have bias='none' with use_vllm, got {config.bias!r}")
    decoder = {id(module) for module in plain.get_decoder().modules()}
    outside = [
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and id(module) not in decoder
    ]
    if outside:
        raise ValueError(
            "peft_config must adapt the decoder alone with use_vllm, because vLLM ignores other adapters "
            f"(target_modules='.*language_model.*_proj'), got {', '.join(outside[:3])}"
        )


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers, tied ones once.

    ``state_dict()`` is not used, because under FSDP2 it shards the parameters again that were gathered for sampling.
    """
    tensors = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        buffers = {
            name: x for name, x in module._buffers.items() if x is not None and name not in module._non_persistent_buffers_set
        }
        tensors |= {f"{prefix}.{name}" if prefix else name: x for name, x in buffers.items()}
    return {name: x.detach() for name, x in tensors.items()}


def checkpoint_tensors(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors that ``save_pretrained`` would write, on the device of the model.

    Floating-point tensors are converted to ``dtype`` when they are yielded, so that only those that the reader keeps are in
    memory. A tensor that has the dtype already is not copied.
    """
    ignored = {*(model._keys_to_ignore_on_save or ())}
    tensors = {name: x for name, x in _state(model).items() if name not in ignored}
    for name, x in revert_weight_conversion(model, tensors).items():
        yield name, (x.to(dtype) if x.is_floating_point() else x).contiguous()


def save_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Path:
    """Write the weights that vLLM loads, a full checkpoint or the active adapter, and return the folder they are in."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = active_adapter(model)
    if adapter is None:
        state = {name: x.to("cpu", dtype if x.is_floating_point() else None) for name, x in _state(model).items()}
        model.save_pretrained(folder, state_dict=state)
        return folder
    tensors = {name: x.detach().cpu() for name, x in model.named_parameters() if "lora_" in name}
    model.save_pretrained(folder, selected_adapters=[adapter], state_dict=tensors)
    return folder if adapter == "default" else folder / adapter
