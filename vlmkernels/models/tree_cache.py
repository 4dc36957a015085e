"""The cache for decoding groups: each prompt is stored once, and each running completion has one slot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn.functional import scaled_dot_product_attention

from vlmkernels.ops.decode_attention import KeyValues, decode_attention
from vlmkernels.ops.fixed_matmul import is_fixed
from vlmkernels.ops.tree_attention import TreeLayout, paths

_SMALLEST = 32  # tokens
_MULTIPLE = 64  # prompts have memory for a multiple of this number of tokens


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
        slots: the slots of the completions.
        rows: for each of them the row of its prompt.
        prompt_lengths, lengths, added: for each of them the number of tokens of its prompt, those stored, and those to append.
    """

    def __init__(
        self, slots: list[int], rows: list[int], prompt_lengths: list[int], lengths: list[int], added: list[int]
    ) -> None:
        self.slots, self.rows, self.added = slots, rows, added
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


def _enlarged(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return a copy of x with a greater shape."""
    new = x.new_zeros(shape)
    new[tuple(map(slice, x.shape))] = x
    return new


class TreeCache:
    """Keys, values and states of A prompts, each stored once, and of the completions that are being decoded, one per slot.

    Per layer, the prompts' keys and values are (A, Hkv, P, D), and the slots' keys and values (S, Hkv, capacity, D). In a
    decoding step, each slot has one query, which attends to the slot's prompt and to the slot's own tokens with one call of
    ``decode_attention``, which reads each prompt once for all its completions.

    These buffers and the device's copies of lengths and membership stay where they are, so that a step can be captured as a
    CUDA graph: between steps, a prompt takes the row of one that is not needed any more, and a completion the slot of one that
    has ended. ``version`` changes when a buffer is replaced by a larger one. Slots have memory for 32, 64, 128, ... tokens.

    Recurrent layers have a state per prompt, (A, ...), and one per slot, (S, ...), which starts as that of the slot's prompt.

    A completion whose turn has ended leaves its slot while its tools run (``take_out``). It comes back into any free slot
    (``put_back``), and the next forward pass appends the results of the tools (``extend``).

    A decoder calls ``reserve``, ``begin``, ``keep``, ``move``, ``arrange``, ``take_out``, ``put_back`` and ``extend`` between
    forward passes, and ``advance`` after each step. Within forward passes the attention function in
    ``vlmkernels.models.attention`` calls ``fill``, ``attend`` and ``attend_extension``, and the functions in
    ``vlmkernels.models.linear_attention`` call ``fill_states``, ``states`` and ``set_states``.

    Args:
        num_slots: S, the largest number of completions decoded at once.
        device: where the buffers are.
        max_tokens: the largest number of tokens of a completion that are stored. Default: no limit.
        max_prompt_tokens: the length of the longest prompt, if it is known. Shorter ones have memory for as many tokens.

    Source: https://arxiv.org/abs/2402.05099.
    """

    def __init__(
        self,
        num_slots: int,
        device: torch.device | str,
        max_tokens: int | None = None,
        max_prompt_tokens: int = 0,
    ) -> None:
        self.num_slots, self.device, self.max_tokens = num_slots, torch.device(device), max_tokens
        self.version = 0
        self.prompts: dict[int, int] = {}  # the stored prompts, and the number of tokens of each
        self._rows: dict[int, int] = {}  # prompt -> row of the buffers
        self._num_rows, self._prompt_capacity = 0, -(-max_prompt_tokens // _MULTIPLE) * _MULTIPLE
        self.capacity = 0  # of a slot, in tokens
        self._prefix: dict[int, list[torch.Tensor]] = {}  # layer -> keys and values of the prompts
        self._own: dict[int, list[torch.Tensor]] = {}  # layer -> keys and values of the slots
        self._prefix_states: dict[tuple[int, str], torch.Tensor] = {}  # (layer, kind) -> states of the prompts
        self._own_states: dict[tuple[int, str], torch.Tensor] = {}  # (layer, kind) -> states of the slots
        self._filling: list[int] = []  # the prompts in the next forward pass
        self._extension: _Extension | None = None
        # For each slot the row of its prompt, or -1, and its number of tokens.
        self._slots = torch.stack([torch.full((num_slots,), -1), torch.zeros(num_slots)]).int().to(self.device)
        self._width = 0  # slots in a step
        self._row_lengths = torch.empty(0, dtype=torch.int32, device=self.device)
        self._order, self._rank = torch.zeros(2, num_slots, dtype=torch.int32, device=self.device)  # see KeyValues.grouped
        self._levels: dict[tuple[int, int], list[KeyValues]] = {}  # (layer, slots)

    # Memory

    def reserve(self, count: int, longest: int = 0) -> None:
        """Make room for ``count`` more prompts of up to ``longest`` tokens. ``begin`` does so if it is necessary."""
        rows = len(self.prompts) + count
        if rows > self._num_rows:
            rows = max(rows, self._num_rows + self._num_rows // 2)
        capacity = max(self._prompt_capacity, -(-longest // _MULTIPLE) * _MULTIPLE)
        rows = max(rows, self._num_rows)
        if (rows, capacity) == (self._num_rows, self._prompt_capacity):
            return
        self._num_rows, self._prompt_capacity = rows, capacity
        for stored in self._prefix.values():
            stored[:] = [_enlarged(x, rows, x.shape[1], capacity, x.shape[3]) for x in stored]
        self._prefix_states = {key: _enlarged(x, rows, *x.shape[1:]) for key, x in self._prefix_states.items()}
        self._row_lengths = _enlarged(self._row_lengths, rows)
        self._changed()

    def _reserve_own(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every slot."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"lengths must leave room in slots for {self.max_tokens} tokens, got {tokens} with the next ones")
        if tokens > self.capacity or len(self._own) < len(self._prefix):
            capacity = max(_SMALLEST, 1 << (tokens - 1).bit_length(), self.capacity)
            self.capacity = capacity if self.max_tokens is None else max(min(capacity, self.max_tokens), self.capacity)
            for layer, prefix in self._prefix.items():
                old = self._own.get(layer, [x[:0, :, :0] for x in prefix])
                self._own[layer] = [_enlarged(x, self.num_slots, x.shape[1], self.capacity, x.shape[3]) for x in old]
            self._changed()
        for key, prompts in self._prefix_states.items():
            if key not in self._own_states:
                self._own_states[key] = prompts.new_empty(self.num_slots, *prompts.shape[1:])

    def _changed(self) -> None:
        self.version += 1
        self._levels.clear()

    # Prompts

    def begin(self, prompts: list[int], lengths: list[int]) -> None:
        """Set the prompts that the next forward pass will contain, one after another, and their lengths."""
        self.reserve(len(prompts), max(lengths, default=0))
        free = [row for row in range(self._num_rows) if row not in self._rows.values()]
        self._rows |= dict(zip(prompts, free, strict=False))
        self.prompts |= dict(zip(prompts, lengths, strict=True))
        self._filling, self._extension = prompts, None
        by_row = {self._rows[prompt]: length for prompt, length in self.prompts.items()}
        lengths_of_rows = torch.tensor([by_row.get(row, 0) for row in range(self._num_rows)], dtype=torch.int32)
        self._row_lengths.copy_(lengths_of_rows, non_blocking=True)

    def fill(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the keys and values, (1, Hkv, T, D), of the prompts passed to ``begin``."""
        if layer not in self._prefix:
            shape = self._num_rows, key.shape[1], self._prompt_capacity
            self._prefix[layer] = [x.new_empty(*shape, x.shape[3]) for x in (key, value)]
        lengths = [self.prompts[prompt] for prompt in self._filling]
        for stored, packed in zip(self._prefix[layer], (key, value), strict=True):
            for prompt, new in zip(self._filling, packed[0].split(lengths, 1), strict=True):
                stored[self._rows[prompt], :, : new.shape[1]] = new

    def fill_states(self, layer: int, kind: str, states: torch.Tensor) -> None:
        """Store the states, one per prompt, at the end of the prompts passed to ``begin``."""
        if (layer, kind) not in self._prefix_states:
            self._prefix_states[layer, kind] = states.new_empty(self._num_rows, *states.shape[1:])
        rows = [self._rows[prompt] for prompt in self._filling]
        self._prefix_states[layer, kind][on_device(self.device, rows)] = states

    def keep(self, prompts: set[int]) -> None:
        """Drop all other prompts: others can take their rows."""
        for stored in (self.prompts, self._rows):
            for prompt in stored.keys() - prompts:
                del stored[prompt]

    def _row(self, prompt: int) -> int:
        if prompt not in self._rows:
            raise ValueError(f"prompts must be stored, got {prompt} with {sorted(self.prompts)}")
        return self._rows[prompt]

    # Slots

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy completions from the slots ``sources`` to the slots ``targets``."""
        indices = on_device(self.device, sources), on_device(self.device, targets)
        for x in (*(x for stored in self._own.values() for x in stored), *self._own_states.values()):
            x[indices[1]] = x[indices[0]]

    @property
    def is_recurrent(self) -> bool:
        """Whether there are states."""
        return bool(self._prefix_states)

    def take_out(self, slot: int, length: int) -> StoredCompletion:
        """Copy the ``length`` tokens of the completion in a slot, which may then be used for another."""
        if not length:
            return StoredCompletion()
        own = {layer: [x[slot, :, :length].clone() for x in stored] for layer, stored in self._own.items()}
        return StoredCompletion(own, {key: states[slot].clone() for key, states in self._own_states.items()})

    def put_back(self, slot: int, prompt: int, stored: StoredCompletion) -> None:
        """Store a completion, from ``take_out``, in a slot."""
        row, length = self._row(prompt), max((x[0].shape[1] for x in stored.own.values()), default=0)
        self._reserve_own(length)
        for layer, new in stored.own.items():
            for x, tokens in zip(self._own[layer], new, strict=True):
                x[slot, :, :length] = tokens
        for key, prompts in self._prefix_states.items():
            self._own_states[key][slot] = stored.states.get(key, prompts[row])

    def extend(self, slots: list[int], prompts: list[int], lengths: list[int], added: list[int]) -> None:
        """Prepare a forward pass that appends several tokens to each of some completions, one completion after another.

        Args:
            slots: the slots of the completions.
            prompts: the prompt of each.
            lengths: the number of tokens that each of these slots holds.
            added: the number of tokens to append to each.
        """
        rows, prompt_lengths = [self._row(prompt) for prompt in prompts], [self.prompts[prompt] for prompt in prompts]
        self._reserve_own(max(map(sum, zip(lengths, added, strict=True))))
        self._extension = _Extension(slots, rows, prompt_lengths, lengths, added)

    @property
    def extends(self) -> bool:
        """Whether the next forward pass appends to completions (``extend``)."""
        return self._extension is not None

    def arrange(self, prompts: Sequence[int | None], lengths: Sequence[int], steps: int = 1) -> None:
        """Prepare decoding steps, until the slots change.

        Args:
            prompts: the prompt of each of the first slots; None for a slot that is not in use, whose results have no meaning.
            lengths: the number of tokens that each of these slots holds.
            steps: the number of tokens to append to each until the next call.
        """
        if len(prompts) > self.num_slots:
            raise ValueError(f"prompts must be those of at most {self.num_slots} slots, got {len(prompts)}")
        self._extension, self._width = None, len(prompts)
        rows = [-1 if prompt is None else self._row(prompt) for prompt in prompts]
        self._reserve_own(max(lengths, default=0) + steps)
        self._slots[:, : self._width].copy_(torch.tensor([rows, list(lengths)], dtype=torch.int32), non_blocking=True)
        if self.device.type != "cpu" and self._width and self._prefix:
            level = KeyValues(*next(iter(self._prefix.values())), self._row_lengths, self._slots[0, : self._width]).grouped()
            self._order[: self._width], self._rank[: self._width] = level.order, level.rank
        new = [slot for slot, (row, length) in enumerate(zip(rows, lengths, strict=True)) if row >= 0 and length == 0]
        if new and self._own_states:
            targets, sources = on_device(self.device, new), on_device(self.device, [rows[slot] for slot in new])
            for key, states in self._own_states.items():
                states[targets] = self._prefix_states[key][sources]

    def advance(self, appended: torch.Tensor) -> None:
        """Count the tokens of a step: ``appended`` is (slots,) bool, those that stay."""
        self._slots[1, : len(appended)] += appended

    @property
    def step_layout(self) -> TreeLayout:
        """The layout of a decoding step or of an extension: a sequence of new tokens per slot."""
        return _one_token_each(self._width) if self._extension is None else self._extension.layout

    def states(self, layer: int, kind: str) -> torch.Tensor:
        """Return the states, before a step or an extension, of its slots."""
        stored = self._own_states[layer, kind]
        return stored[: self._width] if self._extension is None else stored[self._extension.slots]

    def set_states(self, layer: int, kind: str, states: torch.Tensor) -> None:
        """Store the states, after a step or an extension, of its slots."""
        stored = self._own_states[layer, kind]
        stored[slice(self._width) if self._extension is None else self._extension.slots] = states

    def _levels_of(self, layer: int, count: int) -> list[KeyValues]:
        """The levels that the first ``count`` slots read in a layer."""
        if (layer, count) not in self._levels:
            rows, lengths = self._slots[:, :count]
            order, rank = (None, None) if self.device.type == "cpu" else (self._order[:count], self._rank[:count])
            own = (x[:count] for x in self._own[layer])
            self._levels[layer, count] = [
                KeyValues(*self._prefix[layer], self._row_lengths, rows, order=order, rank=rank),
                KeyValues(*own, lengths),
            ]
        return self._levels[layer, count]

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
        levels = self._levels_of(layer, len(query))
        if is_fixed() and query.device.type == "cpu":
            return paths.decode(query, levels, key, value, window, scale).unsqueeze(0)
        return decode_attention(query, levels, key=key, value=value, window=window, scale=scale).unsqueeze(0)

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
        parts = (x[0].split(extension.added, 1) for x in (query, key, value))
        for index, (q, *new) in enumerate(zip(*parts, strict=True)):
            slot, length = extension.slots[index], extension.lengths[index]
            stop, prompt = length + extension.added[index], extension.prompt_lengths[index]
            seen = []
            for x, prefix, tokens in zip(self._own[layer], self._prefix[layer], new, strict=True):
                x[slot, :, length:stop] = tokens
                seen.append(torch.cat([prefix[extension.rows[index], :, :prompt], x[slot, :, :stop]], 1).unsqueeze(0))
            mask = extension.mask(index, layout, window, q.device)
            if is_fixed():
                tokens_first = (x.squeeze(0).transpose(0, 1) for x in (q.unsqueeze(0), *seen))
                factor = q.shape[-1] ** -0.5 if scale is None else scale
                outputs.append(paths.attend(*tokens_first, mask.cpu(), factor).transpose(0, 1).unsqueeze(0))
                continue
            # With a mask and fewer key heads than query heads, CUDA has only a kernel that stores all scores in fp32.
            groups = len(q) // seen[0].shape[1]
            seen = [x.repeat_interleave(groups, 1) for x in seen] if groups > 1 and q.is_cuda else seen
            enable_gqa = len(q) != seen[0].shape[1]
            outputs.append(
                scaled_dot_product_attention(
                    q.unsqueeze(0).contiguous(), *seen, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
                )
            )
        return torch.cat(outputs, 2).transpose(1, 2)
