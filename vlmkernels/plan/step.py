"""The phases of a step, with their costs, their duration and their limiting resource."""

import math
from dataclasses import dataclass, replace

from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.machine import Cost, Machine
from vlmkernels.plan.memory import peak_memory
from vlmkernels.plan.shape import ModelShape
from vlmkernels.plan.workload import OPTIMIZERS, StepTokens, Workload

# Bytes per parameter that gradient clipping and AdamW read and write: the gradient is read three times and written once; the
# parameter and both moments are read and written. A number has 4 bytes, except in moments of 8 bits.
ADAM, MOMENTS = 24, 8


@dataclass(frozen=True)
class Phase:
    """A phase of the step on one GPU.

    Attributes:
        name: name in reports.
        parts: costs of the parts of the phase, which run one after another.
        tokens: number of tokens that the phase processes.
        wire: bytes that the GPU receives.
        hidden: whether communication overlaps with computation.
        backward: whether the phase is a backward pass.
        extra: additional seconds from the workload, such as the time of the reward functions.
        seconds: duration of the phase, set by ``timed``.
        limit: the resource that takes the most time, set by ``timed``.
    """

    name: str
    parts: tuple[Cost, ...] = ()
    tokens: float = 0.0
    wire: float = 0.0
    hidden: bool = False
    backward: bool = False
    extra: float = 0.0
    seconds: float = 0.0
    limit: str = ""

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products and attention."""
        return sum(part.gemm + part.attention for part in self.parts)

    @property
    def traffic(self) -> float:
        """Bytes read, written and allocated."""
        return sum(part.weights + part.traffic + part.fresh for part in self.parts)

    def timed(self, machine: Machine, wire_seconds: float) -> "Phase":
        """Return the phase with its ``seconds`` and ``limit`` on a machine. ``wire_seconds``: time of the communication."""
        parts = [machine.seconds_by_resource(part, self.backward) for part in self.parts]
        seconds = sum(machine.seconds(part) for part in parts)
        by_resource: dict[str, float] = {"communication": wire_seconds, "given": self.extra}
        for part in parts:
            for name, value in part.items():
                by_resource[name] = by_resource.get(name, 0.0) + value
        seconds = max(seconds, wire_seconds) if self.hidden else seconds + wire_seconds
        seconds += self.extra
        return replace(self, seconds=seconds, limit=max(by_resource, key=lambda name: by_resource[name]) if seconds else "")


@dataclass(frozen=True)
class Plan:
    """The plan of a step for one training GPU.

    Attributes:
        shape, work, machine, teacher: the arguments of ``plan``; the shape with the workload's ``image_tokens``.
        tokens: numbers of tokens of a pass on the GPU.
        loss_tokens: those of the pass that computes the loss.
        phases: phases of the step, in order.
        memory: name of an item -> its bytes at peak memory.
        moment: when memory peaks: "forward pass", "optimizer" or "sampling".
        host_memory: bytes of activations in host memory.
    """

    shape: ModelShape
    work: Workload
    machine: Machine
    tokens: StepTokens
    loss_tokens: StepTokens
    phases: tuple[Phase, ...]
    memory: dict[str, float]
    moment: str
    host_memory: float = 0.0
    teacher: ModelShape | None = None

    @property
    def seconds(self) -> float:
        """Duration of the step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether the peak memory fits into the memory of the machine."""
        return sum(self.memory.values()) <= self.machine.memory

    def phase(self, name: str) -> Phase:
        """Return the phase with this name."""
        return next(phase for phase in self.phases if phase.name == name)


def _phases(costs: StepCosts) -> list[Phase]:
    work, t, of_loss = costs.work, costs.tokens, costs.loss_tokens
    gathered = costs.bytes * costs.shape.params if costs.sharded else 0.0  # bytes of all weights, gathered
    to_server = 2.0 * (costs.adapters or costs.shape.params)  # in bf16
    synced = to_server if work.engine == "vllm_server" else gathered
    phases = [Phase("sampling", tuple(costs.sampling()), costs.scored + work.local_prompts * t.prompt, synced)]
    if work.image_use_steps is not None:
        parts, measured = costs.image_use()
        share = 1 / work.image_use_steps
        parts = [part.scaled(share) for part in parts]
        phases.append(Phase("image use", tuple(parts), share * measured.passed, share * gathered * measured.packs, hidden=True))
    phases.append(Phase("rewards", extra=work.reward_seconds))
    for name, wanted in (("old log-probs", work.old), ("reference log-probs", work.reference)):
        if wanted:
            phases.append(Phase(name, tuple(costs.forward()), t.passed, gathered * t.packs, hidden=True))
    if (teacher := costs.teacher) is not None:
        wire = teacher.bytes * teacher.shape.params * teacher.tokens.packs if costs.sharded else 0.0
        phases.append(Phase("teacher", tuple(costs.teacher_forward()), teacher.tokens.passed, wire, hidden=True))
    wire = gathered * of_loss.packs
    phases.append(Phase("forward and loss", tuple(costs.forward(loss=True)), of_loss.passed, wire, hidden=True))
    gradients = float(costs.bytes * costs.trainable) if work.gpus > 1 else 0.0
    # FSDP2 reduces the gradients of every pack. DDP reduces once, by a reduce-scatter and an all-gather.
    wire += gradients * (of_loss.packs if costs.sharded else 2)
    phases.append(Phase("backward", tuple(costs.backward()), of_loss.passed, wire, hidden=True, backward=True))
    own = costs.trainable / (work.gpus if costs.sharded else 1)
    phases.append(Phase("optimizer", (Cost(traffic=(ADAM + 2 * (OPTIMIZERS[work.optim] or MOMENTS)) * own),)))
    return phases


def _wire_seconds(phase: Phase, work: Workload, machine: Machine) -> float:
    if phase.name == "sampling" and work.engine == "vllm_server":
        return phase.wire / machine.network
    return machine.collective(phase.wire, work.gpus)


def plan(shape: ModelShape, work: Workload, machine: Machine, teacher: ModelShape | None = None) -> Plan:
    """Estimate the tokens, duration and peak memory of a GRPO step on one training GPU.

    Args:
        shape: the model.
        work: the step.
        machine: the device.
        teacher: the teacher of distillation; None = no teacher.

    Raises:
        ValueError: the model or the machine does not support the workload. Memory is not checked; see ``Plan.fits``.
    """
    if work.precision != machine.precision:
        raise ValueError(f"precision must be {machine.precision} on {machine.name}, got {work.precision}")
    if work.gpus > 1 and machine.link == math.inf:
        raise ValueError(f"gpus must be 1 on {machine.name}, whose link bandwidth is unknown, got {work.gpus}")
    if work.images and shape.vision is None:
        raise ValueError(f"images must be 0 for a text model, got {work.images}")
    for model in (shape, *([] if teacher is None else [teacher])):
        if work.share_prefix and model.unshared:
            raise ValueError(f"share_prefix must be false for {model.name}: {model.unshared}, got true")
    shape = shape.with_image_tokens(work.image_tokens if work.images else 0)
    if teacher is not None:
        teacher = _with_images_of(teacher, shape, work)
    costs = StepCosts(shape, work, machine, teacher)
    memory, moment = peak_memory(costs)
    phases = tuple(phase.timed(machine, _wire_seconds(phase, work, machine)) for phase in _phases(costs))
    host = costs.activations()[1]
    return Plan(shape, work, machine, costs.tokens, costs.loss_tokens, phases, memory, moment, host, teacher)


def _with_images_of(teacher: ModelShape, shape: ModelShape, work: Workload) -> ModelShape:
    """Return the teacher with the tokens per image of the model, whose processor encodes the images of both."""
    if not work.images:
        return teacher.with_image_tokens(0)
    if teacher.vision is None:
        raise ValueError(f"teacher must have a vision tower for prompts with images, got the text model {teacher.name}")
    assert shape.vision is not None
    return teacher.with_image_tokens(shape.vision.image_tokens(work.width, work.height))
