"""A step's phases, their work and time; the memory it takes; and what limits it.

Per token of a decoder with W elements of weights in its linear layers a forward pass takes 2 W operations, a backward pass 4 W
(2 W where the weights are frozen); per pair of tokens that attend to one another 4 Q, Q being heads times their width, and 2.5
times that backward; per completion token the head takes 2 H V, and 6 H V in the loss (4 H V frozen).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from vlmkernels.ops.checks import require
from vlmkernels.plan.machine import Machine, Work
from vlmkernels.plan.shape import ModelShape, Stack
from vlmkernels.plan.workload import PRECISIONS, Tokens, Workload

WIDE = 4  # bytes of fp32


class PerToken(NamedTuple):
    """Elements per token and layer, in units of the layer's widths: hidden, query, key (or value), intermediate."""

    hidden: float
    query: float
    key: float
    intermediate: float

    def of(self, stack: Stack) -> float:
        widths = stack.hidden, stack.query_width, stack.kv_width, stack.intermediate
        return sum(factor * width for factor, width in zip(self, widths, strict=True))


class Kind(NamedTuple):
    """A kind of layer of transformers, run op by op. saved: what autograd keeps of it in fp32. forward, backward: what
    operations other than products read and write."""

    saved: PerToken
    forward: PerToken
    backward: PerToken


# Counted in transformers' layers, as tests/plan/test_plan.py does: with and without norms of queries and keys; towers with a gate
# in their MLP and without, where queries and keys are as wide as hidden states.
DECODER = Kind(PerToken(6, 2, 2, 4), PerToken(20, 22, 10.5, 5), PerToken(50, 38, 30, 9))
DECODER_QK_NORM = Kind(PerToken(6, 4, 4, 4), PerToken(20, 30, 17.5, 5), PerToken(63, 47, 53, 9))
TOWER_GATED = Kind(PerToken(12, 0, 0, 4), PerToken(24.4, 0, 0, 5), PerToken(84, 0, 0, 11))
TOWER = Kind(PerToken(10, 0, 0, 2), PerToken(14.4, 0, 0, 2), PerToken(39.5, 0, 0, 4))
# Bytes that autograd keeps under bf16 autocast: norms and the residual stream stay fp32, and each product keeps its own copy
# of its input.
DECODER_BF16 = {False: PerToken(26, 4, 4, 8), True: PerToken(26, 10, 10, 8)}  # by qk_norm
TOWER_BF16 = {False: PerToken(20, 0, 0, 4), True: PerToken(30, 0, 0, 8)}  # by gated

# Bytes per logit and decoding step: what drawing a token reads and writes of fp32 logits, its sums being fp64.
DRAW = 44
# Bytes per logit of the passes over a chunk of logits: scoring, and scoring with the gradient written over it.
SCORE, LOSS = 8, 16
# Bytes per parameter that clipping and AdamW read and write: gradient 3 times and written once, parameter and moments.
ADAM = 40


def kind_of(stack: Stack, tower: bool) -> Kind:
    if tower:
        return TOWER_GATED if stack.gated else TOWER
    return DECODER_QK_NORM if stack.qk_norm else DECODER


def saved_bytes(stack: Stack, tower: bool, precision: str) -> float:
    """Per token and layer, of what autograd keeps."""
    if precision == "fp32":
        return WIDE * kind_of(stack, tower).saved.of(stack)
    return (TOWER_BF16[stack.gated] if tower else DECODER_BF16[stack.qk_norm]).of(stack)


@dataclass(frozen=True)
class Phase:
    """name; its work, part by part; bytes that a GPU receives; whether that runs beside the work; what it takes beyond."""

    name: str
    parts: tuple[Work, ...] = ()
    tokens: float = 0.0
    wire: float = 0.0
    hidden: bool = False
    backward: bool = False
    extra: float = 0.0
    seconds: float = 0.0
    limit: str = ""

    @property
    def flops(self) -> float:
        return sum(part.gemm + part.attention for part in self.parts)

    @property
    def traffic(self) -> float:
        return sum(part.weights + part.traffic + part.fresh for part in self.parts)

    def timed(self, machine: Machine, wire_seconds: float) -> "Phase":
        parts = [machine.parts(part, self.backward) for part in self.parts]
        seconds = sum(machine.seconds(part) for part in parts)
        by_resource: dict[str, float] = {"communication": wire_seconds, "given": self.extra}
        for part in parts:
            for name, value in part.items():
                by_resource[name] = by_resource.get(name, 0.0) + value
        seconds = max(seconds, wire_seconds) if self.hidden else seconds + wire_seconds
        seconds += self.extra
        return replace(self, seconds=seconds, limit=max(by_resource, key=by_resource.get) if seconds else "")


@dataclass(frozen=True)
class Plan:
    """Of one GPU that trains. memory: bytes by item at the moment named ``moment``, when most is held."""

    shape: ModelShape
    work: Workload
    machine: Machine
    tokens: Tokens
    phases: tuple[Phase, ...]
    memory: dict[str, float]
    moment: str

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.machine.memory

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


class _Costs:
    def __init__(self, shape: ModelShape, work: Workload, machine: Machine):
        self.shape, self.work, self.machine = shape, work, machine
        self.tokens = Tokens.of(shape, work)
        self.bytes = PRECISIONS[work.precision]  # of what products read
        self.vision = shape.vision if work.images else None
        self.full = work.lora_r == 0
        self.adapters = 0 if self.full else work.lora_r * shape.decoder.ports
        vision = 0 if work.frozen_vision else shape.vision_params
        self.trainable = self.adapters or shape.params - shape.vision_params + vision
        self.scored = work.completions * work.completion_tokens
        self.sharded = work.parallel == "fsdp2" and work.gpus > 1

    # Work

    def decoder(self, tokens: float, pairs: float, passes: int, backward: bool = False) -> Work:
        stack = self.shape.decoder
        times = (4 if self.full else 2) if backward else 2
        kind = kind_of(stack, tower=False)
        traffic = (kind.backward if backward else kind.forward).of(stack)
        return Work(
            gemm=times * stack.linear * tokens + (2 if not backward else 4) * self.adapters * tokens,
            rows=tokens / passes,
            attention=(10 if backward else 4) * stack.query_width * stack.layers * pairs,
            weights=(2 if backward else 1) * self.bytes * stack.linear * passes,
            traffic=self.bytes * traffic * stack.layers * tokens + (WIDE * stack.params if backward and self.full else 0),
            calls={"backward" if backward else "forward": stack.layers * passes},
        )

    def tower(self, patches: float, image_tokens: float, pairs: float, passes: int, backward: bool = False) -> Work:
        stack, merger = self.vision.stack, self.vision.merger
        kind = kind_of(stack, tower=True)
        traffic = (kind.backward if backward else kind.forward).of(stack)
        return Work(
            gemm=(4 if backward else 2) * (stack.linear * patches + merger * image_tokens),
            rows=patches / passes,
            attention=(10 if backward else 4) * stack.hidden * pairs,
            weights=(2 if backward else 1) * self.bytes * (stack.linear + merger) * passes,
            traffic=self.bytes * traffic * stack.layers * patches + (WIDE * stack.params if backward else 0),
            calls={"backward" if backward else "forward": stack.layers * passes},
        )

    def images(self, backward: bool = False) -> list[Work]:
        """The tower in a pass over the batch, where it runs in it."""
        t = self.tokens
        if not t.patches or self.work.frozen_vision:
            return []
        return [self.tower(t.patches, t.image_tokens, t.vision_pairs, t.packs, backward)]

    def scores(self, loss: bool = False) -> Work:
        """The head over the completions' tokens, in the loss with its gradients."""
        passes = self.tokens.packs
        logits = min(WIDE * self.shape.vocab * self.scored / passes, self.work.logits_bytes)
        gradient = WIDE * self.shape.head if loss and self.full else 0
        return Work(
            gemm=((6 if self.full else 4) if loss else 2) * self.scored * self.shape.head,
            rows=self.scored / passes,
            weights=(2 if loss else 1) * self.bytes * self.shape.head * passes,
            traffic=(LOSS if loss else SCORE) * self.scored * self.shape.vocab,
            fresh=(logits + gradient) * passes,
        )

    def a_pass(self) -> list[Work]:
        t = self.tokens
        return [self.decoder(t.passed, t.pairs, t.packs), *self.images(), self.scores()]

    def sampling(self) -> list[Work]:
        """Of one device that samples."""
        work, stack, shape = self.work, self.shape.decoder, self.shape
        groups, count, ways = work.local_prompts, float(work.completions), 1
        if work.engine == "server":
            ways = self.server_ways
            replicas = work.server_gpus // ways
            groups, count = work.prompts / replicas, work.prompts * work.group_size / replicas
        copies = groups if work.share_prefix or work.engine != "transformers" else count
        prompt, length = self.tokens.prompt, work.completion_tokens
        parts = [self.decoder(copies * prompt, copies * prompt**2 / 2, 1)]
        if self.tokens.patches:
            share = copies * work.images / (self.tokens.patches / self.vision.patches(work.width, work.height))
            t = self.tokens
            parts.append(self.tower(t.patches * share, t.image_tokens * share, t.vision_pairs * share, 1))
        steps, held = length - 1, prompt + length / 2
        calls = {"engine": steps}
        if work.engine == "transformers":
            calls = {"decode": stack.layers * steps, "step": steps}
        keys = 2 * self.bytes * stack.kv_width * stack.layers * (copies * prompt + count * length / 2)
        if copies == count:  # generate joins the new keys to the old, and repeats both for every head, at each step
            keys *= 3 + 2 * stack.heads / stack.kv_heads
        values = 8 * WIDE * stack.heads * stack.layers * count * held if work.engine == "transformers" else 0
        parts.append(
            Work(
                gemm=2 * (stack.linear + shape.head) * count * steps,
                rows=count,
                attention=4 * stack.query_width * stack.layers * count * held * steps,
                weights=self.bytes * (stack.linear + shape.head) * steps,
                traffic=(keys + values + DRAW * count * shape.vocab + self.layer_traffic * count) * steps,
                calls=calls,
            )
        )
        if ways == 1:
            return parts
        split = ("gemm", "attention", "weights", "traffic")
        return [replace(part, **{name: getattr(part, name) / ways for name in split}) for part in parts]

    @property
    def layer_traffic(self) -> float:
        stack = self.shape.decoder
        return self.bytes * kind_of(stack, tower=False).forward.of(stack) * stack.layers

    @property
    def server_ways(self) -> int:
        """GPUs that a server's replica is split among: enough that its weights fill half of them at most."""
        ways, most = 1, min(self.work.server_gpus, self.machine.devices)
        while ways < most and 2 * self.shape.params > ways * self.machine.memory / 2:
            ways *= 2
        return min(ways, most)

    # Phases

    def phases(self) -> tuple[Phase, ...]:
        work, t = self.work, self.tokens
        whole = self.bytes * self.shape.params if self.sharded else 0.0  # of a gather of all weights
        to_engine = 2.0 * (self.adapters or self.shape.params)  # to the server, in bf16
        synced = to_engine if work.engine == "server" else whole
        passes = [Phase("sampling", tuple(self.sampling()), self.scored + work.local_prompts * t.prompt, synced)]
        passes.append(Phase("rewards", extra=work.reward_seconds))
        forward = tuple(self.a_pass())
        for name, wanted in (("old log-probs", work.old), ("reference log-probs", work.reference)):
            if wanted:
                passes.append(Phase(name, forward, t.passed, whole * t.packs, hidden=True))
        loss = (self.decoder(t.passed, t.pairs, t.packs), *self.images(), self.scores(loss=True))
        passes.append(Phase("forward and loss", loss, t.passed, whole * t.packs, hidden=True))
        back = [self.decoder(t.passed, t.pairs, t.packs, backward=True), *self.images(backward=True)]
        if work.checkpointing:
            back += [self.decoder(t.passed, t.pairs, t.packs), *self.images()]
        if self.full:  # the embedding's gradient is dense, and added to the head's where they are one
            back.append(Work(fresh=WIDE * self.shape.head, traffic=3 * WIDE * self.shape.head * self.shape.tied))
        gradients = float(self.bytes * self.trainable) if work.gpus > 1 else 0.0
        reduced = gradients * (t.packs if self.sharded else 2)  # DDP reduces once, by a scatter and a gather
        passes.append(Phase("backward", tuple(back), t.passed, whole * t.packs + reduced, hidden=True, backward=True))
        own = self.trainable / (work.gpus if self.sharded else 1)
        passes.append(Phase("optimiser", (Work(traffic=ADAM * own),)))
        return tuple(phase.timed(self.machine, self.wire_seconds(phase)) for phase in passes)

    def wire_seconds(self, phase: Phase) -> float:
        if phase.name == "sampling" and self.work.engine == "server":
            return phase.wire / self.machine.network
        return self.machine.collective(phase.wire, self.work.gpus)

    # Memory

    def memory(self) -> tuple[dict[str, float], str]:
        work, t, shape, stack = self.work, self.tokens, self.shape, self.shape.decoder
        kept, shards = PRECISIONS[work.weights], work.gpus if self.sharded else 1
        always = {
            "weights": kept * shape.params / shards,
            "adapters": WIDE * self.adapters / shards,
            "reference": kept * shape.params / shards if work.reference and self.full else 0.0,
            "optimiser": 2 * (kept if self.full else WIDE) * self.trainable / shards,
            "engine's weights": 2.0 * shape.params if work.engine == "vllm" else 0.0,
            "reserve": self.machine.reserve,
        }
        gradients = (kept if self.full else WIDE) * self.trainable / shards
        passed, patches = t.passed / t.packs, t.patches / t.packs
        layers = saved_bytes(stack, False, work.precision)
        tower = 0.0
        if patches and not work.frozen_vision:
            tower = saved_bytes(self.vision.stack, True, work.precision)
            depth, width = self.vision.stack.layers, self.vision.stack.hidden
            tower *= patches
            tower = depth * tower if not work.checkpointing else tower + WIDE * depth * width * patches
        activations = layers * passed * stack.layers
        copies = 2.0 * shape.params if work.precision == "bf16" and work.weights == "fp32" and not self.sharded else 0.0
        if work.checkpointing:
            activations = layers * passed + WIDE * stack.hidden * stack.layers * passed
            copies /= stack.layers
        whole = 0.0
        if self.sharded:  # the head, kept whole, and two layers
            whole = self.bytes * (2 * stack.params / stack.layers + (1 if shape.tied else 2) * shape.head)
        rows = self.scored / t.packs
        forward = {
            "gradients": gradients if t.packs > 1 else 0.0,
            "bf16 copies of weights": copies,
            "gathered layers": whole,
            "activations": activations + tower,
            "logits": min(WIDE * shape.vocab * rows, work.logits_bytes),
            "gradients by logits": min(2.0 * shape.vocab * rows, work.dlogits_bytes) if work.precision == "bf16" else 0.0,
            "head's gradient": WIDE * shape.head if self.full else 0.0,
            "hidden states": 3 * WIDE * stack.hidden * (passed + rows),
        }
        moments = {"forward pass": forward, "optimiser": {"gradients": gradients}}
        if work.engine != "server":
            copies = work.local_prompts if work.share_prefix or work.engine == "vllm" else work.completions
            held = copies * t.prompt + work.completions * work.completion_tokens
            sampling = {"keys and values": 2.0 * self.bytes * stack.kv_width * stack.layers * held}
            if work.engine == "transformers":
                sampling["gathered layers"] = self.bytes * shape.params if self.sharded else 0.0
            moments["sampling"] = sampling
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        items = always | moments[moment]
        return {name: size for name, size in items.items() if size}, moment


def plan(shape: ModelShape, work: Workload, machine: Machine) -> Plan:
    """The step's tokens, phases and memory on one GPU.

    Raises:
        ValueError: the workload does not fit the model or the machine.
    """
    require(work.precision == machine.precision, "precision", f"be that of {machine.name}, {machine.precision}", work.precision)
    require(work.gpus == 1 or machine.link < math.inf, "gpus", f"be 1 on {machine.name}, whose links are not known", work.gpus)
    require(not work.images or shape.vision is not None, "images", "be 0 for a text model", work.images)
    require(not work.share_prefix or not shape.unshared, "share_prefix", f"be false: {shape.unshared}", True)
    costs = _Costs(shape, work, machine)
    memory, moment = costs.memory()
    return Plan(shape, work, machine, costs.tokens, costs.phases(), memory, moment)
