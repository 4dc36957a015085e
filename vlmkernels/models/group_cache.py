"""Keys and values of groups while their completions are decoded: each prompt once, and one slot per running completion."""

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vlmkernels.ops.linear_logps.sweep import HALF

# aten::bmm.dtype, available on CUDA only: fp32 results of 16-bit operands.
_HAS_FP32_RESULTS = "dtype" in torch.ops.aten.bmm.overloads()


def fp32_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query (B, H, M, D), key (B, H, N, D) -> q k^T (B, H, M, N) in fp32, not rounded to the dtype of its operands."""
    if query.device.type == "cuda" and query.dtype in HALF and _HAS_FP32_RESULTS:
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.unflatten(0, key.shape[:2])
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ key.float().mT


def on_device(device: torch.device, values: list) -> torch.Tensor:
    """A tensor of values of the host, copied without waiting for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


class GroupCache:
    """Keys and values, by layer: of A prompts, each once, (A, Hkv, P, D); and of the completions that are being written, one in
    each slot, (S, Hkv, capacity, D).

    One query per slot attends to its prompt and its own tokens. Its scores on the prompt come from one product of the prompt's
    keys with the queries of all its completions, so that a prompt is read once per token of a group, not once per completion:

        softmax([q K_prompt | q K_own]) [V_prompt; V_own]

    The attention function of ``vlmkernels.models.attention`` calls ``fill`` and ``attend``. Source: https://arxiv.org/abs/2402.05099.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.prompts: list[int] = []  # whose prefixes are held, in order
        self.lengths: list[int] = []  # of those
        self._prefix: dict[int, list[torch.Tensor]] = {}
        self._own: dict[int, list[torch.Tensor]] = {}
        self._filling: list[int] = []

    # Prompts

    def begin(self, prompts: list[int], lengths: list[int]) -> None:
        """The next forward pass is of these prompts, one behind the other."""
        self.prompts, self.lengths, self._filling = self.prompts + prompts, self.lengths + lengths, lengths

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: (1, Hkv, T, D) of the prompts begun."""
        held = self._prefix.setdefault(layer, [key.new_empty(0, 1, 0, 1)] * 2)
        for index, packed in enumerate((key, value)):
            parts = packed[0].transpose(0, 1).split(self._filling)
            new = pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()
            old = held[index]
            if len(old):
                longest = max(old.shape[2], new.shape[2])
                new = torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in (old, new)])
            held[index] = new

    def keep(self, prompts: set[int]) -> None:
        """Forget the other prompts."""
        chosen = [index for index, prompt in enumerate(self.prompts) if prompt in prompts]
        self.prompts, self.lengths = ([x[index] for index in chosen] for x in (self.prompts, self.lengths))
        longest = max(self.lengths, default=0)
        for held in self._prefix.values():
            held[:] = [x[chosen, :, :longest].contiguous() for x in held]

    # Slots

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Completions into other slots."""
        for held in self._own.values():
            for x in held:
                x[targets] = x[sources]

    def arrange(self, prompts: list[int], lengths: list[int], device: torch.device) -> None:
        """Before a step: the prompt of each slot, and how many tokens it holds."""
        where = {prompt: index for index, prompt in enumerate(self.prompts)}
        own = [where[prompt] for prompt in prompts]
        members: list[list[int]] = [[] for _ in self.prompts]
        for slot, index in enumerate(own):
            members[index].append(slot)
        self._size = max(map(len, members))
        # Every prompt with as many completions, one after another: then groups are views.
        self._even = own == [index for index in range(len(members)) for _ in range(self._size)]
        if not self._even:
            self._members = on_device(device, [m + [0] * (self._size - len(m)) for m in members])
            number = {slot: index * self._size + k for index, m in enumerate(members) for k, slot in enumerate(m)}
            self._place = on_device(device, [number[slot] for slot in range(len(own))])
        self._equal = len(set(lengths)) == 1
        self._step = on_device(device, lengths)
        self._slots = torch.arange(len(own), device=device)
        self._length = max(lengths) + 1
        self._bias = None
        if len({self.lengths[index] for index in own}) > 1 or not self._equal or max(self.lengths) > self.lengths[own[0]]:
            prefix = torch.arange(max(self.lengths), device=device)
            behind = torch.arange(self._length, device=device)
            held = on_device(device, [self.lengths[index] for index in own])
            seen = torch.cat([prefix < held.unsqueeze(1), behind <= self._step.unsqueeze(1)], 1)
            self._bias = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)[:, None, None]

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """(slots, Hkv, R, W) as (A, Hkv, G R, W)."""
        x = x.unflatten(0, (-1, self._size)) if self._even else x[self._members]
        return x.transpose(1, 2).flatten(2, 3)

    def _by_slot(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(2, (self._size, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._even else x[self._place]

    def _append(self, layer: int, new: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """What the slots hold, (slots, Hkv, length, D), with the step's keys and values, (slots, Hkv, D), behind it."""
        held = self._own.setdefault(layer, [x.new_empty(self.num_slots, x.shape[1], 0, x.shape[2]) for x in new])
        if held[0].shape[2] < self._length:
            held[:] = [pad(x, (0, 0, 0, max(32, x.shape[2]))) for x in held]
        count = len(new[0])
        for x, token in zip(held, new, strict=True):
            if self._equal:
                x[:count, :, self._length - 1] = token
            else:
                x[self._slots, :, self._step] = token
        return [x[:count, :, : self._length] for x in held]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """query (1, Hq, slots, D), key and value (1, Hkv, slots, D) -> (1, slots, Hq, D)"""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        q = query.unflatten(1, (key.shape[1], -1))
        prefix_key, prefix_value = self._prefix[layer]
        own_key, own_value = self._append(layer, (key, value))
        scores = torch.cat([self._by_slot(fp32_scores(self._by_prompt(q), prefix_key)), fp32_scores(q, own_key)], -1)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if self._bias is not None:
            scores += self._bias
        on_prefix, on_own = scores.softmax(-1).to(q.dtype).split([prefix_key.shape[2], own_key.shape[2]], -1)
        out = on_own @ own_value + self._by_slot(self._by_prompt(on_prefix) @ prefix_value)
        return out.flatten(1, 2).unsqueeze(0)
