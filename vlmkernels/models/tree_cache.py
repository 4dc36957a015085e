"""The cache for decoding groups: each prompt is stored once, and each running completion has one slot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from vlmkernels.ops.linear_logps.sweep import HALF, gemm_operand
from vlmkernels.ops.tree_attention import TreeLayout

# aten::bmm.dtype multiplies 16-bit operands with fp32 results, on CUDA only.
_HAS_FP32_RESULTS = "dtype" in torch.ops.aten.bmm.overloads()


def fp32_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return query (B, H, M, D) @ key (B, H, N, D)^T as (B, H, M, N) in fp32, without rounding to the dtype of the operands."""
    if query.device.type == "cuda" and query.dtype in HALF and _HAS_FP32_RESULTS:
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.unflatten(0, key.shape[:2])
    with torch.autocast(query.device.type, enabled=False):
        return gemm_operand(query.float()) @ gemm_operand(key.float()).mT


def on_device(device: torch.device, values: list) -> torch.Tensor:
    """Copy host values into a tensor on ``device``, without waiting for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _one_token_each(count: int) -> TreeLayout:
    return TreeLayout((1,) * count, (-1,) * count)


@dataclass
class StoredCompletion:
    """What a cache holds of one completion: by layer its keys and values, (Hkv, n, D), and its states. Empty at first."""

    own: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    states: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)


class _Extension:
    """Completions to which the next forward pass appends several tokens each, and which of the stored tokens these see.

    Args:
        slots: the slots of the completions, contiguous.
        owners: for each of them the index of its prompt.
        prompt_lengths, lengths, added: for each of them the number of tokens of its prompt, those stored, and those to append.
    """

    def __init__(
        self, slots: range, owners: list[int], prompt_lengths: list[int], lengths: list[int], added: list[int]
    ) -> None:
        self.slots, self.owners, self.added = slots, owners, added
        self.prompt_lengths, self.lengths = prompt_lengths, lengths
        self.layout = TreeLayout(tuple(added), (-1,) * len(added))
        self._masks: dict[tuple, torch.Tensor] = {}

    def mask(self, index: int, layout: TreeLayout, window: int | None, device: torch.device) -> torch.Tensor:
        """Return what the new tokens of a completion see, (new, prompt + stored + new) bool.

        Args:
            layout: the layout of the new tokens of all completions, with bidirectional spans.
            window: see ``tree_attention``.
        """
        key = index, layout.bidirectional, window
        if key not in self._masks:
            start, count = self.layout.starts[index], self.added[index]
            before = self.prompt_lengths[index] + self.lengths[index]
            query, position = torch.arange(before, before + count).unsqueeze(1), torch.arange(before + count)
            block = layout.tokens[1, start : start + count]
            mask = position <= query
            mask[:, before:] |= (block.unsqueeze(1) == block) & (block >= 0)
            if window is not None:
                mask &= query - position < window
            self._masks[key] = mask.to(device, non_blocking=True)
        return self._masks[key]


class TreeCache:
    """Keys, values and states of A prompts, each stored once, and of the completions that are being decoded, one per slot.

    Per layer, the prompts' keys and values are (A, Hkv, P, D), and the slots' keys and values (S, Hkv, capacity, D).
    In a decoding step, each slot has one query, which attends to the slot's prompt and to the slot's own tokens:

        softmax([q K_prompt | q K_own]) [V_prompt; V_own]

    The scores with a prompt come from one product of its keys and the queries of all its completions, so the prompt is read
    once per group and token instead of once per completion and token.

    Recurrent layers have a state per prompt, (A, ...), and one per slot, (S, ...), which starts as that of the slot's prompt.

    A completion whose turn has ended leaves its slot while its tools run (``take_out``). It comes back into any free slot
    (``put_back``), and the next forward pass appends the results of the tools (``extend``).

    A decoder calls ``begin``, ``keep``, ``move``, ``arrange``, ``take_out``, ``put_back`` and ``extend`` between forward
    passes; within them the attention function in ``vlmkernels.models.attention`` calls ``fill``, ``attend`` and
    ``attend_extension``, and the functions in ``vlmkernels.models.linear_attention`` call ``fill_states``, ``states`` and
    ``set_states``.

    Args:
        num_slots: S, the largest number of completions decoded at once.

    Source: https://arxiv.org/abs/2402.05099.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.prompts: list[int] = []  # the stored prompts, in order
        self.lengths: list[int] = []  # the number of tokens of each
        self._prefix: dict[int, list[torch.Tensor]] = {}  # layer -> keys and values of the prompts
        self._own: dict[int, list[torch.Tensor]] = {}  # layer -> keys and values of the slots
        self._prefix_states: dict[tuple[int, str], torch.Tensor] = {}  # (layer, kind) -> states of the prompts
        self._own_states: dict[tuple[int, str], torch.Tensor] = {}  # (layer, kind) -> states of the slots
        self._filling: list[int] = []  # the lengths of the prompts in the next forward pass
        self._extension: _Extension | None = None

    # Prompts

    def begin(self, prompts: list[int], lengths: list[int]) -> None:
        """Set the prompts that the next forward pass will contain, one after another, and their lengths."""
        self.prompts, self.lengths, self._filling = self.prompts + prompts, self.lengths + lengths, lengths
        self._extension = None

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the keys and values, (1, Hkv, T, D), of the prompts passed to ``begin``."""
        stored = self._prefix.setdefault(layer, [key.new_empty(0, 1, 0, 1)] * 2)
        for index, packed in enumerate((key, value)):
            parts = packed[0].transpose(0, 1).split(self._filling)
            new = pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()
            old = stored[index]
            if len(old):
                longest = max(old.shape[2], new.shape[2])
                new = torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in (old, new)])
            stored[index] = new

    def fill_states(self, layer: int, kind: str, states: torch.Tensor) -> None:
        """Store the states, one per prompt, at the end of the prompts passed to ``begin``."""
        old = self._prefix_states.get((layer, kind))
        self._prefix_states[layer, kind] = states if old is None else torch.cat([old, states])

    def keep(self, prompts: set[int]) -> None:
        """Drop all other prompts."""
        chosen = [index for index, prompt in enumerate(self.prompts) if prompt in prompts]
        self.prompts, self.lengths = ([x[index] for index in chosen] for x in (self.prompts, self.lengths))
        longest = max(self.lengths, default=0)
        for stored in self._prefix.values():
            stored[:] = [x[chosen, :, :longest].contiguous() for x in stored]
        self._prefix_states = {key: states[chosen] for key, states in self._prefix_states.items()}

    # Slots

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy completions from the slots ``sources`` to the slots ``targets``."""
        for stored in self._own.values():
            for x in stored:
                x[targets] = x[sources]
        for states in self._own_states.values():
            states[targets] = states[sources]

    def take_out(self, slot: int, length: int) -> StoredCompletion:
        """Copy the ``length`` tokens of the completion in a slot, which may then be used for another."""
        if not length:
            return StoredCompletion()
        own = {layer: [x[slot, :, :length].clone() for x in stored] for layer, stored in self._own.items()}
        return StoredCompletion(own, {key: states[slot].clone() for key, states in self._own_states.items()})

    def put_back(self, slot: int, prompt: int, stored: StoredCompletion) -> None:
        """Store a completion, from ``take_out``, in a slot."""
        for layer, new in stored.own.items():
            for x, tokens in zip(self._reserve(layer, new, new[0].shape[1]), new, strict=True):
                x[slot, :, : tokens.shape[1]] = tokens
        owner = self.prompts.index(prompt)
        for key, prompts in self._prefix_states.items():
            self._slot_states(key)[slot] = stored.states.get(key, prompts[owner])

    def extend(self, slots: range, prompts: list[int], lengths: list[int], added: list[int]) -> None:
        """Prepare a forward pass that appends several tokens to each of some completions, one completion after another.

        Args:
            slots: the slots of the completions.
            prompts: the prompt of each.
            lengths: the number of tokens that each of these slots holds.
            added: the number of tokens to append to each.
        """
        owners = [self.prompts.index(prompt) for prompt in prompts]
        self._extension = _Extension(slots, owners, [self.lengths[owner] for owner in owners], lengths, added)

    @property
    def extends(self) -> bool:
        """Whether the next forward pass appends to completions (``extend``)."""
        return self._extension is not None

    def arrange(self, prompts: list[int], lengths: list[int], device: torch.device) -> None:
        """Prepare a decoding step.

        Args:
            prompts: the prompt of each slot in use.
            lengths: the number of tokens that each of these slots holds.
        """
        self._extension = None
        index_of = {prompt: index for index, prompt in enumerate(self.prompts)}
        owners = [index_of[prompt] for prompt in prompts]  # the index of each slot's prompt
        members: list[list[int]] = [[] for _ in self.prompts]  # the slots of each prompt
        for slot, owner in enumerate(owners):
            members[owner].append(slot)
        self._group_size = max(map(len, members))
        # If every prompt has the same number of completions, one after another, grouping them is a view.
        self._even_groups = owners == [index for index in range(len(members)) for _ in range(self._group_size)]
        if not self._even_groups:
            self._members = on_device(device, [m + [0] * (self._group_size - len(m)) for m in members])
            place = {slot: index * self._group_size + k for index, m in enumerate(members) for k, slot in enumerate(m)}
            self._places = on_device(device, [place[slot] for slot in range(len(owners))])
        self._equal_lengths = len(set(lengths)) == 1
        self._slots = torch.arange(len(owners), device=device)
        self._columns = on_device(device, lengths)  # where the next token of each slot is stored
        self._width = max(lengths) + 1
        prompt_lengths = [self.lengths[owner] for owner in owners]
        self._longest = max(length + prompt for length, prompt in zip(lengths, prompt_lengths, strict=True)) + 1
        self._equal_prompts = min(prompt_lengths) == max(self.lengths)
        self._prompt_lengths = on_device(device, prompt_lengths)
        self._biases: dict[int | None, torch.Tensor | None] = {}  # by window
        new = [slot for slot, length in enumerate(lengths) if length == 0]  # slots whose state is that of their prompt
        self._new = (on_device(device, new), on_device(device, [owners[slot] for slot in new])) if new else None

    @property
    def step_layout(self) -> TreeLayout:
        """The layout of a decoding step or of an extension: a sequence of new tokens per slot."""
        return _one_token_each(len(self._slots)) if self._extension is None else self._extension.layout

    def states(self, layer: int, kind: str) -> torch.Tensor:
        """Return the states, before a step or an extension, of its slots."""
        stored = self._slot_states((layer, kind))
        if self._extension is not None:
            return stored[self._extension.slots.start : self._extension.slots.stop]
        if self._new is not None:
            slots, owners = self._new
            stored[slots] = self._prefix_states[layer, kind][owners]
        return stored[: len(self._slots)]

    def set_states(self, layer: int, kind: str, states: torch.Tensor) -> None:
        """Store the states, after a step or an extension, of its slots."""
        first = 0 if self._extension is None else self._extension.slots.start
        self._own_states[layer, kind][first : first + len(states)] = states

    def _slot_states(self, key: tuple[int, str]) -> torch.Tensor:
        if key not in self._own_states:
            prompts = self._prefix_states[key]
            self._own_states[key] = prompts.new_empty(self.num_slots, *prompts.shape[1:])
        return self._own_states[key]

    def _bias(self, window: int | None) -> torch.Tensor | None:
        """Return what is added to the scores (slots, Hkv, R, P + width): -inf for tokens that a slot does not see."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._biases:
            self._biases[window] = self._make_bias(window)
        return self._biases[window]

    def _make_bias(self, window: int | None) -> torch.Tensor | None:
        if window is None and self._equal_lengths and self._equal_prompts:
            return None
        prompts, columns = self._prompt_lengths.unsqueeze(1), self._columns.unsqueeze(1)
        in_prompt = torch.arange(max(self.lengths), device=prompts.device)
        in_completion = torch.arange(self._width, device=prompts.device)
        seen = torch.cat([in_prompt < prompts, in_completion <= columns], 1)
        if window is not None:
            distance = torch.cat([prompts + columns - in_prompt, columns - in_completion], 1)
            seen &= distance < window
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, None]

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """Group (slots, Hkv, R, W) by prompt: (A, Hkv, G R, W)."""
        x = x.unflatten(0, (-1, self._group_size)) if self._even_groups else x[self._members]
        return x.transpose(1, 2).flatten(2, 3)

    def _by_slot(self, x: torch.Tensor) -> torch.Tensor:
        """Invert ``_by_prompt``."""
        x = x.unflatten(2, (self._group_size, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._even_groups else x[self._places]

    def _reserve(self, layer: int, like: Sequence[torch.Tensor], width: int) -> list[torch.Tensor]:
        """Return the keys and values of the slots, (S, Hkv, capacity, D), with a capacity of at least ``width`` tokens.

        Args:
            like: keys and values (Hkv, n, D).
        """
        if layer not in self._own:
            self._own[layer] = [x.new_empty(self.num_slots, x.shape[0], 0, x.shape[2]) for x in like]
        stored = self._own[layer]
        if (capacity := stored[0].shape[2]) < width:
            stored[:] = [pad(x, (0, 0, 0, max(32, capacity, width - capacity))) for x in stored]
        return stored

    def _append(self, layer: int, new: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Append the keys and values (slots, Hkv, D) of a step, and return all that are stored, (slots, Hkv, width, D)."""
        stored = self._reserve(layer, [x.transpose(0, 1) for x in new], self._width)
        count = len(new[0])
        for x, token in zip(stored, new, strict=True):
            if self._equal_lengths:
                x[:count, :, self._width - 1] = token
            else:
                x[self._slots, :, self._columns] = token
        return [x[:count, :, : self._width] for x in stored]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Append key and value (1, Hkv, slots, D) and attend with query (1, Hq, slots, D). Returns (1, slots, Hq, D).

        ``window`` is the sliding window of the layer, as in ``tree_attention``.
        """
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        q = query.unflatten(1, (key.shape[1], -1))
        prefix_key, prefix_value = self._prefix[layer]
        own_key, own_value = self._append(layer, (key, value))
        scores = torch.cat([self._by_slot(fp32_scores(self._by_prompt(q), prefix_key)), fp32_scores(q, own_key)], -1)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if (bias := self._bias(window)) is not None:
            scores += bias
        shares = scores.softmax(-1).split([prefix_key.shape[2], own_key.shape[2]], -1)
        on_prefix, on_own = (gemm_operand(x.to(q.dtype)) for x in shares)
        out = on_own @ own_value + self._by_slot(self._by_prompt(on_prefix) @ prefix_value)
        return out.flatten(1, 2).unsqueeze(0)

    def attend_extension(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        layout: TreeLayout,
        window: int | None = None,
    ) -> torch.Tensor:
        """Append the keys and values (1, Hkv, T, D) of an extension and attend with query (1, Hq, T, D).

        Args:
            layout: the layout of the T tokens, one sequence per completion, with bidirectional spans.
            window: the sliding window of the layer, as in ``tree_attention``.

        Returns:
            (1, T, Hq, D).
        """
        extension, outputs = self._extension, []
        assert extension is not None
        width = max(map(sum, zip(extension.lengths, extension.added, strict=True)))
        own = self._reserve(layer, [key[0], value[0]], width)
        parts = (x[0].split(extension.added, 1) for x in (query, key, value))
        for index, (q, *new) in enumerate(zip(*parts, strict=True)):
            slot, length = extension.slots[index], extension.lengths[index]
            stop, prompt = length + extension.added[index], extension.prompt_lengths[index]
            seen = []
            for x, prefix, tokens in zip(own, self._prefix[layer], new, strict=True):
                x[slot, :, length:stop] = tokens
                seen.append(torch.cat([prefix[extension.owners[index], :, :prompt], x[slot, :, :stop]], 1).unsqueeze(0))
            mask = extension.mask(index, layout, window, q.device)
            outputs.append(
                scaled_dot_product_attention(
                    q.unsqueeze(0).contiguous(), *seen, attn_mask=mask, scale=scale, enable_gqa=len(q) != seen[0].shape[1]
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)
