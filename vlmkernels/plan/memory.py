"""Peak memory of one training GPU."""

from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.layers import FP32_BYTES
from vlmkernels.plan.workload import OPTIMIZERS, PRECISIONS


def peak_memory(costs: StepCosts) -> tuple[dict[str, float], str]:
    """Return the bytes of each item at peak memory, and when memory peaks: "forward pass", "optimizer" or "sampling"."""
    moments = {"forward pass": _forward(costs), "optimizer": {"gradients": _gradients(costs)}}
    if costs.work.engine != "vllm_server":
        moments["sampling"] = _sampling(costs)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    items = _always(costs) | moments[moment]
    return {name: size for name, size in items.items() if size}, moment


def _shards(costs: StepCosts) -> int:
    return costs.work.gpus if costs.sharded else 1


def _gradients(costs: StepCosts) -> float:
    return (PRECISIONS[costs.work.weights] if costs.full else FP32_BYTES) * costs.trainable / _shards(costs)


def _moments(costs: StepCosts) -> float:
    per_parameter = OPTIMIZERS[costs.work.optim]
    return 2 * _gradients(costs) if per_parameter is None else per_parameter * costs.trainable / _shards(costs)


def _always(costs: StepCosts) -> dict[str, float]:
    """Return the bytes of the items that stay in memory during the whole step."""
    work, shape, shards = costs.work, costs.shape, _shards(costs)
    stack, quantized = shape.decoder, work.weights == "nf4"
    return {
        "weights": costs.stored / shards,
        "dequantized layer": float(costs.bytes * stack.hidden * stack.intermediate) if quantized else 0.0,
        "adapters": FP32_BYTES * costs.adapters / shards,
        "reference": costs.stored / shards if work.reference and costs.full else 0.0,
        "teacher": costs.teacher.stored / shards if costs.teacher else 0.0,
        "optimizer": _moments(costs),
        "engine's weights": 2.0 * shape.params if work.engine == "vllm_colocate" else 0.0,
        "reserve": costs.machine.reserve,
    }


def _forward(costs: StepCosts) -> dict[str, float]:
    """Return the bytes of the items in memory at the end of a forward pass, when the loss is computed."""
    work, t, shape, stack = costs.work, costs.loss_tokens, costs.shape, costs.shape.decoder
    copies = 2.0 * shape.params if work.precision == "bf16" and work.weights == "fp32" and not costs.sharded else 0.0
    if work.checkpointing:
        copies /= stack.layers
    gathered = 0.0
    if costs.sharded:  # two layers, the head, and the embedding unless it is tied to the head
        gathered = costs.bytes * (2 * stack.params / stack.layers + (1 if shape.tied else 2) * shape.head)
    rows = costs.scored / t.packs
    # Masked images and a teacher have a node of autograd each, which holds a gradient of the head.
    nodes = 1 + costs.masks_images + (costs.teacher is not None)
    return {
        "gradients": _gradients(costs) if t.packs > 1 else 0.0,
        "bf16 copies of weights": copies,
        "gathered layers": gathered,
        "activations": costs.activations()[0],
        "logits": costs.chunk(t.packs) * (2 if costs.teacher else 1),
        "logits given masked images": costs.chunk(t.packs) if costs.masks_images and costs.keeps_masked_logits else 0.0,
        "gradients of logits": min(2.0 * shape.vocab * rows, work.dlogits_bytes) if work.precision == "bf16" else 0.0,
        "head's gradient": float(costs.head_gradient * nodes),
        "hidden states": 3 * FP32_BYTES * stack.hidden * (t.passed / t.packs + rows * (1 + costs.masks_images)),
        **_of_teacher(costs, rows),
    }


def _of_teacher(costs: StepCosts, rows: float) -> dict[str, float]:
    """Return the bytes of what a teacher's pass leaves for the loss: hidden states, and a copy of the head if it is sharded."""
    if costs.teacher is None:
        return {}
    shape = costs.teacher.shape
    return {
        "teacher's hidden states": costs.bytes * shape.decoder.hidden * rows,
        "teacher's head": float(costs.bytes * shape.head if costs.sharded else 0),
    }


def _sampling(costs: StepCosts) -> dict[str, float]:
    """Return the bytes of the items in memory at the end of sampling."""
    work, mixers = costs.work, costs.shape.decoder.mixers
    copies = work.local_prompts if work.share_prefix or work.engine == "vllm_colocate" else work.completions
    tokens, count = copies * costs.tokens.prompt + costs.scored, work.completions
    own = [m for m in mixers if not m.reused or costs.tree_cache]
    items = {
        "keys and values": sum(m.layers * costs.kv_bytes(m, tokens, count) for m in own),
        "recurrent states": FP32_BYTES * sum(m.state * m.layers for m in mixers) * (count + copies * costs.tree_cache),
    }
    if work.engine == "transformers":
        items["gathered layers"] = costs.bytes * costs.shape.params if costs.sharded else 0.0
    return items
