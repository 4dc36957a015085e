"""Operations and memory traffic of each pass of a step on one device.

A decoder with W weights in its linear layers takes 2 W operations per token in a forward pass and 4 W in a backward pass (2 W
with frozen weights). Attention takes 4 Q operations per pair of tokens that attend to each other, where Q is the number of
heads times their width, and 10 Q in a backward pass. The gated delta rule, with Hv states of size Dk x Dv, takes 8 Hv Dk Dv
operations per token, and 20 Hv Dk Dv in a backward pass. The head takes 2 H V operations per completion token for
log-probabilities, and 6 H V for the loss and its gradients (4 H V if the head is frozen), with hidden size H and vocabulary
size V. Log-probabilities given masked images take 2 H V, and as much as the gradients of the loss in the backward pass. The
divergence from a teacher of hidden size H' takes 6 H V (4 H V) and 2 H' V.
"""

from collections.abc import Sequence
from dataclasses import replace

from vlmkernels.plan.layers import FP32_BYTES, kind_of, saved_bytes
from vlmkernels.plan.machine import Cost, Machine
from vlmkernels.plan.mixers import Mixer, Span
from vlmkernels.plan.shape import ModelShape
from vlmkernels.plan.workload import NF4, PRECISIONS, StepTokens, Workload

# Bytes per logit that sampling a token reads and writes in a decoding step: logits are fp32, their cumulative sums fp64.
DRAW = 44
# Bytes per logit that the head reads and writes for log-probabilities, and for the loss with in-place gradients; for a
# divergence those of both sides, without and with gradients.
SCORE, LOSS, KL, KL_LOSS = 8, 16, 16, 28
MEASURED_PROMPTS, MEASURED_COMPLETIONS = 4, 8  # of a generation batch, at most, by vlmkernels.train.image_use


class StepCosts:
    """Costs of the passes of a step.

    Args:
        teacher: the teacher of distillation; None = no teacher.

    Attributes:
        tokens: numbers of tokens of a pass on one device.
        loss_tokens: those of the pass that computes the loss, also with masked images if the loss has perception terms.
        teacher: the costs of the teacher, whose tokens are those of its passes; None = no teacher.
        bytes: bytes per element of the inputs of matrix products.
        vision: the vision tower, if prompts have images.
        full: whether the model itself is trained, rather than LoRA adapters.
        adapters: number of parameters of the LoRA adapters.
        trainable: number of trainable parameters.
        scored: completion tokens on one device.
        sharded: whether parameters are sharded over the devices.
        weight_bytes: bytes that a product reads of each weight of a layer.
        stored: bytes of all parameters.
        tree_cache: whether ``TreeCache`` stores the keys and values of sampling: those of all tokens in all attention layers,
            even of tokens outside of a window, which it masks.
    """

    def __init__(self, shape: ModelShape, work: Workload, machine: Machine, teacher: ModelShape | None = None):
        self.shape, self.work, self.machine = shape, work, machine
        self.masks_images = work.perception_loss_weight > 0
        self.tokens = StepTokens.from_workload(shape, work)
        self.loss_tokens = StepTokens.from_workload(shape, work, branches=self.masks_images)
        self.bytes = PRECISIONS[work.precision]
        self.vision = shape.vision if work.images else None
        self.full = work.lora_r == 0
        self.adapters = 0 if self.full else work.lora_r * shape.decoder.ports
        vision_params = 0 if work.frozen_vision else shape.vision_params
        self.trainable = self.adapters or shape.params - shape.vision_params + vision_params
        self.scored = work.completions * work.completion_tokens
        self.sharded = work.parallel == "fsdp2" and work.gpus > 1
        quantized = work.weights == "nf4"
        # A layer in 4 bits is dequantized: a copy in the precision of the product is written and read.
        self.weight_bytes = NF4 + 2 * self.bytes if quantized else self.bytes
        in_4_bits = shape.quantizable if quantized else 0
        self.stored = NF4 * in_4_bits + PRECISIONS.get(work.weights, 2) * (shape.params - in_4_bits)
        self.tree_cache = work.engine == "transformers" and work.share_prefix
        self.teacher = None
        if teacher is not None:
            changes = {"weights": work.teacher_weights, "lora_r": 0, "freeze_vision": False, "perception_loss_weight": 0.0}
            self.teacher = StepCosts(teacher, replace(work, **changes), machine)
            self.teacher.tokens = StepTokens.from_workload(teacher, work, cut_branches=self.masks_images)

    def decoder(self, spans: Sequence[Span], passes: int, backward: bool = False) -> Cost:
        """Return the cost of the decoder's layers.

        Args:
            spans: the tokens.
            passes: number of passes that the tokens are split into.
            backward: the cost of the backward pass instead of the forward pass.
        """
        stack, tokens = self.shape.decoder, sum(span.tokens for span in spans)
        mixed = sum(
            m.layers * (m.query_width * sum(span.pairs(m.window) for span in spans) + m.recurrence * tokens)
            for m in stack.mixers
        )
        times = (4 if self.full else 2) if backward else 2
        kind = kind_of(stack, tower=False)
        traffic = (kind.backward if backward else kind.forward).elements(stack)
        gradients = FP32_BYTES * stack.params if backward and self.full else 0
        return Cost(
            gemm=times * stack.linear * tokens + (4 if backward else 2) * self.adapters * tokens,
            rows=tokens / passes,
            attention=(10 if backward else 4) * mixed,
            weights=(2 if backward and self.full else 1) * self.weight_bytes * stack.linear * passes,
            traffic=self.bytes * traffic * stack.layers * tokens + gradients,
            calls={"backward" if backward else "forward": stack.layers * passes},
        )

    def tower(self, patches: float, image_tokens: float, pairs: float, passes: int, backward: bool = False) -> Cost:
        """Return the cost of the vision tower for ``patches`` patches, which are merged into ``image_tokens`` tokens."""
        stack, merger = self.vision.stack, self.vision.merger
        kind = kind_of(stack, tower=True)
        traffic = (kind.backward if backward else kind.forward).elements(stack)
        return Cost(
            gemm=(4 if backward else 2) * (stack.linear * patches + merger * image_tokens),
            rows=patches / passes,
            attention=(10 if backward else 4) * stack.hidden * pairs,
            weights=(2 if backward else 1) * self.weight_bytes * (stack.linear + merger) * passes,
            traffic=self.bytes * traffic * stack.layers * patches + (FP32_BYTES * stack.params if backward else 0),
            calls={"backward" if backward else "forward": stack.layers * passes},
        )

    def images(self, t: StepTokens, backward: bool = False) -> list[Cost]:
        """Return the cost of the vision tower in a pass over the batch. A frozen tower runs only once, during sampling."""
        if not t.patches or self.work.frozen_vision:
            return []
        return [self.tower(t.patches, t.image_tokens, t.vision_pairs, t.packs, backward)]

    def scores(self, loss: bool = False) -> Cost:
        """Return the cost of the head. ``loss``: including the gradients, which the fused head computes in the forward pass."""
        passes = (self.loss_tokens if loss else self.tokens).packs
        return Cost(
            gemm=((6 if self.full else 4) if loss else 2) * self.scored * self.shape.head,
            rows=self.scored / passes,
            weights=(2 if loss else 1) * self.bytes * self.shape.head * passes,
            traffic=(LOSS if loss else SCORE) * self.scored * self.shape.vocab,
            fresh=(self.chunk(passes) + (self.head_gradient if loss else 0)) * passes,
        )

    @property
    def head_gradient(self) -> int:
        """Bytes of the gradient of the head's weight."""
        return FP32_BYTES * self.shape.head if self.full else 0

    def chunk(self, passes: int) -> float:
        """Return the bytes of the chunk of logits that the head computes, if the batch is split into ``passes`` passes."""
        return min(FP32_BYTES * self.shape.vocab * self.scored / passes, self.work.logits_bytes)

    @property
    def keeps_masked_logits(self) -> bool:
        """Whether the logits given masked images fit into a chunk, so that the backward pass does not compute them again."""
        return FP32_BYTES * self.shape.vocab * self.scored / self.loss_tokens.packs <= self.work.logits_bytes

    def masked_scores(self, backward: bool = False) -> list[Cost]:
        """Return the cost of the head for log-probabilities given masked images, whose gradients the backward pass computes."""
        if not self.masks_images:
            return []
        rows, head, passes = self.scored, self.shape.head, self.loss_tokens.packs
        logits = Cost(
            gemm=2 * rows * head,
            rows=rows / passes,
            weights=self.bytes * head * passes,
            traffic=SCORE * rows * self.shape.vocab,
            fresh=self.chunk(passes) * passes,
        )
        if not backward:
            return [logits]
        gradients = Cost(
            gemm=(4 if self.full else 2) * rows * head,
            rows=rows / passes,
            weights=self.bytes * head * passes,
            traffic=(LOSS - SCORE) * rows * self.shape.vocab,
            fresh=self.head_gradient * passes,
        )
        return [gradients] if self.keeps_masked_logits else [logits, gradients]

    def divergence(self) -> list[Cost]:
        """Return the cost of the divergence from the teacher and of its gradients, over the rows that both heads have."""
        teacher, passes = self.teacher, self.loss_tokens.packs
        if teacher is None:
            return []
        vocab = min(self.shape.vocab, teacher.shape.vocab)
        width, other = self.shape.decoder.hidden, teacher.shape.decoder.hidden
        return [
            Cost(
                gemm=((6 if self.full else 4) * width + 2 * other) * self.scored * vocab,
                rows=self.scored / passes,
                weights=self.bytes * (2 * width + other) * vocab * passes,
                traffic=KL_LOSS * self.scored * vocab,
                fresh=(2 * self.chunk(passes) + self.head_gradient) * passes,
            )
        ]

    def teacher_forward(self) -> list[Cost]:
        """Return the costs of the passes of the teacher over the batch, up to its head. It encodes the images in each."""
        assert self.teacher is not None
        t = self.teacher.tokens
        return [self.teacher.decoder(t.spans, t.packs), *self.teacher.images(t)]

    def image_use(self) -> tuple[list[Cost], StepTokens]:
        """Return the costs of a measurement of image use, and its tokens: a pass without gradients with both images."""
        prompts = min(MEASURED_PROMPTS, self.work.local_prompts)
        group = min(MEASURED_COMPLETIONS // prompts, self.work.group_size)
        t = StepTokens.from_workload(self.shape, replace(self.work, prompts=prompts, gpus=1, group_size=group), branches=True)
        rows, head = prompts * group * self.work.completion_tokens, self.shape.head
        divergence = Cost(
            gemm=4 * rows * head,
            rows=rows / t.packs,
            weights=2 * self.bytes * head * t.packs,
            traffic=KL * rows * self.shape.vocab,
            fresh=2 * min(FP32_BYTES * rows * self.shape.vocab, self.work.logits_bytes * t.packs),
        )
        tower = self.tower(t.patches, t.image_tokens, t.vision_pairs, t.packs)
        return [self.decoder(t.spans, t.packs), tower, divergence], t

    def forward(self, loss: bool = False) -> list[Cost]:
        """Return the costs of a forward pass over the batch that computes log-probabilities, or with ``loss`` the loss."""
        t = self.loss_tokens if loss else self.tokens
        moved = [Cost(host=self.activations()[1] * t.packs)] if loss and self.work.activation_offloading else []
        further = [*self.masked_scores(), *self.divergence()] if loss else []
        return [self.decoder(t.spans, t.packs), *self.images(t), self.scores(loss), *further, *moved]

    def backward(self) -> list[Cost]:
        """Return the costs of the backward pass below the head, including recomputation under activation checkpointing."""
        t = self.loss_tokens
        costs = [self.decoder(t.spans, t.packs, backward=True), *self.images(t, backward=True)]
        costs += self.masked_scores(backward=True)
        if self.work.checkpointing:
            costs += [self.decoder(t.spans, t.packs), *self.images(t)]
        if self.work.activation_offloading:
            costs.append(Cost(host=self.activations()[1] * t.packs))
        if self.full:  # the gradient of the embedding is dense; if tied, it is added to the gradient of the head
            head = FP32_BYTES * self.shape.head
            costs.append(Cost(fresh=head, traffic=3 * head * self.shape.tied))
        return costs

    def activations(self) -> tuple[float, float]:
        """Return the bytes that autograd saves for one pack, on the device and in host memory.

        With activation checkpointing, these are the activations of one layer and the input of each layer. Offloading leaves
        the activations of one layer on the device.
        """
        work, t = self.work, self.loss_tokens
        parts = [(self.shape.decoder, False, t.passed / t.packs)]
        if self.vision is not None and t.patches and not work.frozen_vision:
            parts.append((self.vision.stack, True, t.patches / t.packs))
        device = host = 0.0
        for stack, tower, tokens in parts:
            layer = saved_bytes(stack, tower, work.precision) * tokens
            kept = (FP32_BYTES * stack.hidden * tokens if work.checkpointing else layer) * stack.layers
            if work.activation_offloading:
                device, host = max(device, layer), host + kept
            else:
                device += kept + (layer if work.checkpointing else 0)
        return device, host

    def sampling(self) -> list[Cost]:
        """Return the costs of sampling on one sampling device: the prefill of the prompts, then the decoding steps."""
        work, ways = self.work, 1
        groups, count = float(work.local_prompts), float(work.completions)
        if work.engine == "vllm_server":
            ways = self.server_ways
            replicas = work.server_gpus // ways
            groups, count = work.prompts / replicas, work.prompts * work.group_size / replicas
        copies = groups if work.share_prefix or work.engine != "transformers" else count
        prompt = self.tokens.prompt
        parts = [self.decoder([Span(copies, 0, prompt)], 1)]
        if self.tokens.patches:
            t = self.tokens
            encoded = copies * work.images
            if self.masks_images and work.frozen_vision:  # the features of the masked images
                encoded += work.local_prompts * work.images
            share = encoded / (t.patches / self.vision.patches(work.width, work.height))
            parts.append(self.tower(t.patches * share, t.image_tokens * share, t.vision_pairs * share, 1))
        parts.append(self._decoding(copies, count))
        if ways == 1:
            return parts
        split = ("gemm", "attention", "weights", "traffic")
        return [replace(part, **{name: getattr(part, name) / ways for name in split}) for part in parts]

    def kv_bytes(self, mixer: Mixer, tokens: float, sequences: float) -> float:
        """Return the bytes of the keys and values in a layer that are stored for ``tokens`` in ``sequences``."""
        latent = 0 if self.tree_cache else mixer.latent
        return self.bytes * (latent or 2 * mixer.kv_width) * self._in_window(mixer, tokens, sequences)

    def _in_window(self, mixer: Mixer, tokens: float, sequences: float) -> float:
        return tokens if mixer.window is None or self.tree_cache else min(tokens, sequences * mixer.window)

    def _decoding(self, copies: float, count: float) -> Cost:
        """Return the cost of decoding ``count`` completions, with the keys and values of ``copies`` prompts."""
        work, stack, shape = self.work, self.shape.decoder, self.shape
        prompt, length = self.tokens.prompt, work.completion_tokens
        steps, held = length - 1, prompt + length / 2
        in_process = work.engine == "transformers"
        keys = scores = states = mixed = 0.0
        for m in stack.mixers:
            seen = self._in_window(m, count * held, count)
            # generate concatenates old and new keys at each step and repeats them for every query head
            repeats = 3 + 2 * m.heads / m.kv_heads if copies == count and m.heads else 1
            keys += self.kv_bytes(m, copies * prompt + count * length / 2, count) * m.layers * repeats
            scores += 8 * FP32_BYTES * m.heads * m.layers * seen if in_process else 0
            states += 2 * FP32_BYTES * m.state * m.layers * count
            mixed += m.layers * (m.query_width * seen + m.recurrence * count)
        layers = self.bytes * kind_of(stack, tower=False).forward.elements(stack) * stack.layers * count
        return Cost(
            gemm=2 * (stack.linear + shape.head) * count * steps,
            rows=count,
            attention=4 * mixed * steps,
            weights=(self.weight_bytes * stack.linear + self.bytes * shape.head) * steps,
            traffic=(keys + scores + states + DRAW * count * shape.vocab + layers) * steps,
            calls={"decode": stack.layers * steps, "step": steps} if in_process else {"engine": steps},
        )

    @property
    def server_ways(self) -> int:
        """Number of GPUs per server replica: enough for the weights to fill at most half of their memory, up to one node."""
        ways, limit = 1, min(self.work.server_gpus, self.machine.devices)
        while ways < limit and 2 * self.shape.params > ways * self.machine.memory / 2:
            ways *= 2
        return min(ways, limit)
