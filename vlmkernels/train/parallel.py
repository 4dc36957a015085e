"""How DDP, FSDP2 and DeepSpeed change what the trainer does: checks, gathered parameters, the reference, backward passes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from vlmkernels.models.quantized import is_quantized
from vlmkernels.train.config import GRPOConfig


def zero_stage(accelerator: Accelerator) -> int | None:
    """Return the ZeRO stage of DeepSpeed, or None without DeepSpeed."""
    plugin = accelerator.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return None if plugin is None else plugin.zero_stage


def requires_lockstep(accelerator: Accelerator) -> bool:
    """Whether every rank must run the same number of forward and backward passes, because collectives run inside them."""
    return accelerator.is_fsdp2 or zero_stage(accelerator) is not None


def check_parallelism(
    accelerator: Accelerator, model: PreTrainedModel, teacher: PreTrainedModel | None, args: GRPOConfig
) -> None:
    """Check that a run is possible in this distributed configuration.

    Args:
        model: the policy.
        teacher: its teacher, or None.

    Raises:
        NotImplementedError: the kind of parallelism is not supported.
        ValueError: the dtype of the parameters, or an option of FSDP2, DeepSpeed or the run is not supported.
    """
    if args.n_gpu > 1:  # that this process sees
        raise NotImplementedError("nn.DataParallel is not supported: use torchrun, or show one GPU to the process")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP1 is not supported: use FSDP2 (fsdp_config with version: 2)")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float64}:
        raise ValueError(
            "model must have trained parameters in float32 or bfloat16 (with fp16=True too, which only affects computation), "
            f"got {names}"
        )
    if accelerator.is_fsdp2 and len(dtypes) > 1:
        raise ValueError(f"model must have trained parameters of one dtype under FSDP2, got {names}")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading must be false, because each process copies the reference from the model it loaded, "
            "got true"
        )
    stage = zero_stage(accelerator)
    if stage is not None:
        _check_zero(accelerator, stage, args)
    if not requires_lockstep(accelerator):
        return
    if is_quantized(model) or (teacher is not None and is_quantized(teacher)):
        raise ValueError("quantization_config must be None under FSDP2 and DeepSpeed: use DDP, got a quantized model")
    if args.activation_offloading:
        raise ValueError(
            "activation_offloading must be False under FSDP2 and DeepSpeed, as it would also copy gathered weights, got True"
        )


def _check_zero(accelerator: Accelerator, stage: int, args: GRPOConfig) -> None:
    if stage < 2:
        raise NotImplementedError(f"DeepSpeed ZeRO-{stage} is not supported: use ZeRO-2, ZeRO-3, FSDP2 or DDP")
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    saves_weights = zero.get("stage3_gather_16bit_weights_on_model_save")
    if stage == 3 and saves_weights is not True:
        raise ValueError(
            "stage3_gather_16bit_weights_on_model_save must be true (zero3_save_16bit_model in accelerate's configuration), "
            f"because checkpoints would hold no weights, got {saves_weights}"
        )
    if args.on_nonfinite != "raise":
        raise ValueError(
            "on_nonfinite must be 'raise' under DeepSpeed, which takes the optimizer step inside the backward pass, "
            f"got {args.on_nonfinite!r}"
        )


def max_over_ranks(accelerator: Accelerator, number: int) -> int:
    """Return the largest of the ranks' numbers, on every rank."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def is_zero3_sharded(model: torch.nn.Module) -> bool:
    """Whether ZeRO-3 has sharded parameters of the model: while it was loaded, or when training began."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gathered_zero3(model: torch.nn.Module) -> AbstractContextManager:
    """Gather the parameters of a model that ZeRO-3 sharded while loading it; does nothing for other models."""
    if not is_zero3_sharded(model):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def gathered(accelerator: Accelerator, model: torch.nn.Module, head: torch.nn.Module) -> AbstractContextManager:
    """Gather the parameters of a policy under FSDP2 or ZeRO-3, so that ranks may run different numbers of forward passes.

    Requires ``torch.no_grad``. Does nothing for other models.

    Args:
        model: the policy without wrappers.
        head: its language-model head, which FSDP2 keeps gathered between forward and backward pass.
    """
    return _all_gathered_zero3(accelerator, model) if is_zero3_sharded(model) else _gathered_fsdp2(model, head)


@contextmanager
def _gathered_fsdp2(model: torch.nn.Module, head: torch.nn.Module) -> Iterator[None]:
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        fully_shard.state(model)._lazy_init()  # lets a submodule run before the root module has run
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
        for module in (model, head):
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)


@contextmanager
def _all_gathered_zero3(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Gather all parameters and remove DeepSpeed's hooks, which would release them after each module's forward pass."""
    import deepspeed

    if accelerator.deepspeed_engine_wrapped is None:  # training has not begun
        with gathered_zero3(model):
            yield
        return
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.empty_partition_cache()  # release the parameters that the last pass prefetched
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


def prepare_head(accelerator: Accelerator, head: torch.nn.Module) -> None:
    """Let ZeRO-3 gather a head and its LoRA weights together when the head is called. Call it before the policy is wrapped."""
    if zero_stage(accelerator) == 3 and hasattr(head, "lora_A"):
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(head, True)


def prepare_reference(accelerator: Accelerator, reference: torch.nn.Module) -> torch.nn.Module:
    """Shard the frozen reference as the policy is sharded, and give it the dtype that DeepSpeed gives the policy."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)
    stage = zero_stage(accelerator)
    if stage is None:
        return accelerator.prepare_model(reference, evaluation_mode=True)
    config = accelerator.deepspeed_plugin.deepspeed_config
    if stage == 3:
        import deepspeed

        zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
        zero.pop("offload_optimizer", None)
        precision = {name: config[name] for name in ("bf16", "fp16") if name in config}
        options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
        return deepspeed.initialize(model=reference, config=options)[0]
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtype for name, dtype in halves.items() if config.get(name, {}).get("enabled") is True), torch.float32)
    return reference.to(accelerator.device, dtype)


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Run the backward pass of a split before the last one; DeepSpeed must not take its optimizer step after it."""
    if zero_stage(accelerator) is None:
        accelerator.backward(loss)
    else:
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
