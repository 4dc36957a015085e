"""What all processes of a run must do alike, or wait for one another forever."""

from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmkernels.ops.checks import require


def zero_stage(accelerator: Accelerator) -> int | None:
    """That of DeepSpeed; None without it."""
    plugin = accelerator.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return None if plugin is None else plugin.zero_stage


def in_step(accelerator: Accelerator) -> bool:
    """Whether all processes must run the same layers as often: each call of a layer, or each gradient, is a collective."""
    return accelerator.is_fsdp2 or zero_stage(accelerator) is not None


def check_parallelism(accelerator: Accelerator, model: torch.nn.Module, n_gpu: int) -> None:
    """Refuse by name what would train wrongly, or not at all."""
    if n_gpu > 1:
        raise NotImplementedError("nn.DataParallel is not supported: use torchrun, or show one GPU to the process")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise NotImplementedError("FSDP1 is not supported: use FSDP2 (fsdp_config with version: 2)")
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    rule = "have trained parameters in float32 or bfloat16 (fp16=True computes in half precision all the same)"
    require(trained <= {torch.float32, torch.bfloat16, torch.float64}, "model", rule, _names(trained))
    if accelerator.is_fsdp2:
        require(len(trained) <= 1, "model", "have trained parameters of one dtype under FSDP2", _names(trained))
        lean = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
        require(not lean, "cpu_ram_efficient_loading", "be false: the reference is a copy of what each process loaded", lean)
    stage = zero_stage(accelerator)
    if stage is None:
        return
    if stage < 2:
        raise NotImplementedError(f"DeepSpeed's ZeRO-{stage} is not supported: use ZeRO-2, ZeRO-3, FSDP2 or DDP")
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if stage == 3:
        rule = "be true, or checkpoints would hold no weights (zero3_save_16bit_model in accelerate's configuration)"
        key = "stage3_gather_16bit_weights_on_model_save"
        require(zero.get(key) is True, key, rule, zero.get(key))


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def most(accelerator: Accelerator, number: int) -> int:
    """The greatest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def _cut_by_zero3(model: torch.nn.Module) -> bool:
    """From its loading on, or from the start of training."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(model: torch.nn.Module):
    """Inside, before training, the parameters of a model that DeepSpeed cut while it was loaded are whole, to be read."""
    if not _cut_by_zero3(model):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


@contextmanager
def gathered(accelerator: Accelerator, model: torch.nn.Module, head: torch.nn.Module):
    """Inside, the parameters of a policy under FSDP2 or ZeRO-3 are whole, so that processes may call it unequally often,
    without gradients; any other is as it is.

    Args:
        model: the policy without what wraps it. head: its language-model head, which FSDP2 keeps whole between forward and
            backward pass.
    """
    in_full = _gathered_zero3 if _cut_by_zero3(model) else _gathered_fsdp2
    with in_full(accelerator, model, head):
        yield


@contextmanager
def _gathered_fsdp2(accelerator: Accelerator, model: torch.nn.Module, head: torch.nn.Module):
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        fully_shard.state(model)._lazy_init()  # so that a part of the model may be called before the whole
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
def _gathered_zero3(accelerator: Accelerator, model: torch.nn.Module, head: torch.nn.Module):
    """Without its hooks too, which would let go of each parameter after its module's call and compare the order of calls."""
    import deepspeed

    if accelerator.deepspeed_engine_wrapped is None:  # not trained yet
        with whole(model):
            yield
        return
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.empty_partition_cache()  # what the last pass fetched ahead
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
    """Before the policy is wrapped: ZeRO-3 gathers a head whole, with what LoRA adds to it, when the head is called."""
    if zero_stage(accelerator) == 3 and hasattr(head, "lora_A"):
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(head, True)


def prepared_reference(accelerator: Accelerator, reference: torch.nn.Module) -> torch.nn.Module:
    """The frozen reference, sharded where the policy is, in the dtype that DeepSpeed gives the policy."""
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
    """The backward pass of a part of a micro-batch: never the one that DeepSpeed takes the optimiser's step after."""
    if zero_stage(accelerator) is None:
        accelerator.backward(loss)
    else:
        accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
