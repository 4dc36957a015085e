"""The decoder: schedules completions on slots, and runs decoding steps. ``decode_groups`` describes it."""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vlmkernels.models.cut import cut_packs
from vlmkernels.models.head import replaced_method
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images, encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.packs import pack_groups, pack_trees
from vlmkernels.models.positions import prompt_positions, segment_positions
from vlmkernels.models.router_replay import ExpertRecorder
from vlmkernels.models.trajectories import chain, join
from vlmkernels.models.tree_cache import StoredCompletion, TreeCache, on_device
from vlmkernels.rollout.base import RolloutError
from vlmkernels.rollout.completions import Completions, Decoded
from vlmkernels.rollout.slots import Slots
from vlmkernels.rollout.step_graphs import step_graphs
from vlmkernels.rollout.token_sampler import TokenSampler, plain_head

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes


# On a GPU, the host reads the sampled tokens after this many steps. A completion that has ended keeps its slot until then.
GPU_STEPS = 8


class Decoder:
    """Schedules completions on a fixed number of slots: when one ends or waits for its tools, another takes its slot.

    Args:
        model, prompts, max_tokens: see ``decode_groups``.
        group: the prompt of each completion.
        num_slots: maximum number of completions decoded at the same time.
        sampler: samples the tokens.
        completions: collects them.

    Attributes:
        episodes: the conversations with tools; None if every completion is one turn.
        keeps_features: whether the results have image features in place of pixels in ``Decoded.turns``.
        steps_per_check: the number of steps after which the host reads the sampled tokens.
        graphs: runs decoding steps as graphs; None: they run eagerly.
        experts: records the experts of each token; None if they are not recorded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: ModelInputs,
        group: Sequence[int],
        num_slots: int,
        max_tokens: int | None,
        sampler: TokenSampler,
        completions: Completions,
    ) -> None:
        self.model, self.prompts, self.group, self.max_tokens = model, prompts, list(group), max_tokens
        self.sampler, self.completions = sampler, completions
        self.episodes: Episodes | None = None
        self.keeps_features = False
        self.experts: ExpertRecorder | None = None
        self.encoded: dict[tuple[int, ...], ModelInputs] = {}  # results with features, by the keys of their images
        self.device = prompts.inputs["input_ids"].device
        self.plain = base_model(model)
        self.deduplicates_images = accepts_image_features(self.plain)
        self.positions = prompt_positions(self.plain, prompts.inputs)
        other_axes = [axis for axis in range(self.positions.dim()) if axis != self.positions.dim() - 2]  # all but the prompts
        starts = (self.positions.amax(other_axes) + 1).tolist()
        self.next_positions = [starts[prompt] for prompt in self.group]  # position of the next token to sample
        sampling = completions.sampling
        self.eos = on_device(self.device, list(sampling.eos_token_id or ()) or [-1])
        longest = int(prompts.inputs["attention_mask"].sum(1).max())
        self.cache = TreeCache(num_slots, self.device, completions.most_tokens, longest)
        self.slots = Slots(num_slots, len(self.group), sampling.max_new_tokens, self.device)
        self.pending = deque(range(len(self.group)))  # completions that have not begun
        self.stored: dict[int, StoredCompletion] = {}  # completions that wait for tools or for a slot
        self.resumed: deque[tuple[int, ModelInputs]] = deque()  # completions whose tools have finished, and the results
        self.first_logits: dict[int, torch.Tensor] = {}  # by prompt, from _features, for the first token of its completions
        # The cache ignores the mask. A mask with four axes keeps the model from building one, which would wait for the device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        if sampler.warpers is None:
            sampler.head = plain_head(model)
        self.graphs = step_graphs(model, self.device)
        every_step = sampling.stop_strings or sampler.warpers is not None
        self.steps_per_check = GPU_STEPS if self.device.type == "cuda" and not every_step else 1

    def run(self) -> None:
        """Decode until every completion has ended."""
        with self.experts or nullcontext():
            self._run()

    def _run(self) -> None:
        while self.pending or self.slots.occupied or self.stored:
            slots, occupied = self.cache.num_slots, len(self.slots.occupied)
            free = slots - occupied
            # Completions that wait for tools keep their keys and values, so that there are at most as many as slots.
            new = min(free, len(self.pending), 2 * slots - occupied - len(self.stored))
            self._collect_results(wait=not (occupied or self.resumed or new > 0))
            if self.resumed and free:
                self._resume(free)
            elif new > 0:
                self._admit([self.pending.popleft() for _ in range(new)])
            elif occupied:
                self._decode_steps()

    def decoded(self, *, with_turns: bool) -> Decoded:
        """Return the completions."""
        decoded = self.completions.decoded(self.prompts, with_turns=with_turns, values=self.slots.values_of_completions())
        experts = None if self.experts is None else self.experts.routed(decoded.ids.shape[1])
        return decoded._replace(routed_experts=experts)

    def record_experts(self) -> None:
        """Record the experts of each token (``Decoded.routed_experts``)."""
        self.experts = ExpertRecorder(self.model, self.prompts, len(self.group), self.completions.sampling.max_new_tokens)

    def _first_tokens(self, completions: list[int], logits: torch.Tensor) -> list[bool]:
        """Sample the first token of a turn of each of the completions and return which of the turns have ended."""
        places = on_device(self.device, [self._place(k) for k in completions])
        sampled = self.sampler(logits, places, on_device(self.device, [self._ends_from(k) for k in completions]))
        self.slots.store(places, sampled)
        return [self._append(k, token) for k, token in zip(completions, sampled.ids.tolist(), strict=True)]

    def _append(self, k: int, token: int) -> bool:
        """Append a sampled token to a completion and return whether its turn has ended."""
        if token < 0:
            problem = "its logits are NaN or infinite" if token == -1 else "no token is left, because all others are excluded"
            number = len(self.completions.tokens[k])
            raise RolloutError(f"token {number} of completion {k} of prompt {self.group[k]} cannot be sampled: {problem}")
        self.next_positions[k] += 1
        return self.completions.append(k, token)

    def _place(self, k: int) -> int:
        """Return the place (``TokenSampler``) of the next token of a completion."""
        return k * self.slots.budget + self.completions.index(k)

    def _ends_from(self, k: int) -> int:
        """Return the place from which the current turn of a completion may end."""
        return self._place(k) - len(self.completions.turn(k)) + self.completions.sampling.min_new_tokens

    @property
    def _has_turns(self) -> bool:
        """Whether completions may continue after a turn."""
        return self.episodes is not None

    # Prompts

    def _admit(self, completions: list[int]) -> None:
        """Sample the first tokens of new completions and put those that have not ended into free slots."""
        prompts = {self.group[k] for k in completions}
        new = sorted(prompts - self.first_logits.keys())
        if new:
            self._drop_prompts(prompts)
            self.cache.reserve(len(new))
        for part in self._split_prompts(new):
            self._prefill(part)
        logits = torch.stack([self.first_logits[self.group[k]] for k in completions])
        for k, ended in zip(completions, self._first_tokens(completions, logits), strict=True):
            if not ended:
                self.slots.put(k)
            elif self._continues(k):
                self.stored[k] = StoredCompletion()

    def _drop_prompts(self, needed: set[int]) -> None:
        """Let others take the memory of prompts that no completion needs any more, besides those in ``needed``."""
        needed = needed | {self.group[k] for k in (*self.slots.occupied, *self.stored, *self.pending)}
        self.cache.keep(needed)
        self.first_logits = {prompt: logits for prompt, logits in self.first_logits.items() if prompt in needed}

    def _split_prompts(self, prompts: list[int]) -> list[list[int]]:
        """Split prompts into parts of at most ``max_tokens`` tokens."""
        if not prompts:
            return []
        if self.max_tokens is None:
            return [prompts]
        lengths = self.prompts.inputs["attention_mask"][prompts].sum(1).tolist()
        width = self.model.config.get_text_config().hidden_size
        parts = cut_packs(lengths, [*range(len(prompts))], [0] * len(prompts), self.max_tokens, width)
        return [[prompts[index] for index in part] for part in parts]

    def _prefill(self, prompts: list[int]) -> None:
        """Run prompts through the model: store their keys and values and their last logits."""
        chosen = self.prompts.select(torch.tensor(prompts))
        no_group = torch.empty(0, dtype=torch.int64)
        no_ids = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        inputs = deduplicate_images(chosen) if self.deduplicates_images else chosen.inputs
        positions = self.positions[..., on_device(self.device, prompts), :]
        pack = pack_groups(inputs, positions, no_group, no_ids, no_ids.bool(), chosen.family)
        self.cache.begin(prompts, list(pack.inputs["tree_layout"].lengths))
        self.first_logits |= dict(zip(prompts, self._last_logits(pack.inputs), strict=True))
        if self.experts is not None:
            self.experts.add_prompts(prompts)

    def _last_logits(self, inputs: dict) -> torch.Tensor:
        """Run a pack of sequences and return the logits (sequences, V) of the last token of each."""
        last = on_device(self.device, [end - 1 for end in inputs["tree_layout"].ends])
        return self._features(**inputs, use_cache=False, logits_to_keep=last)

    # Decoding

    def _decode_steps(self) -> None:
        """Run some steps of all occupied slots, and free those whose turns have ended."""
        occupied = self.slots.occupied
        left = [self.slots.budget - self.completions.index(k) for k in occupied]
        stored = max(len(self.completions.tokens[k]) for k in occupied) - 1
        # With turns, further steps would change the states of a completion that continues after its tools.
        steps = 1 if self._has_turns and self.cache.is_recurrent else min(self.steps_per_check, max(left))
        if self._moves():
            self.slots.changed = True
        room = steps if self.cache.max_tokens is None else min(steps, self.cache.max_tokens - stored)  # at most, it ends then
        if self.slots.changed or stored + room > self.cache.capacity:
            self._arrange(room)
        sampled = [self._run_step() for _ in range(steps)]
        rows = torch.stack(sampled).tolist() if steps > 1 else [sampled[0].tolist()]
        for slot, k in enumerate(self.slots.completions[: self.slots.width]):
            if k is not None and any(self._append(k, row[slot]) for row in rows):
                self._end_turn(slot, k)

    def _end_turn(self, slot: int, k: int) -> None:
        """Free the slot of a completion whose turn has ended."""
        if self._continues(k):
            self.stored[k] = self.cache.take_out(slot, len(self.completions.tokens[k]) - 1)
        self.slots.free(slot)

    def _moves(self) -> bool:
        """Move completions to the first slots if fewer slots are enough for a step."""
        sources, targets = self.slots.compact()
        if sources:
            self.cache.move(sources, targets)
        return bool(sources)

    def _arrange(self, room: int) -> None:
        """Copy the state of the slots to the device, and make room for as many tokens in each."""
        rows: list[tuple[int, ...]] = []
        prompts: list[int | None] = []
        lengths: list[int] = []
        for k in self.slots.arranged():
            if k is None:
                rows.append(self.slots.no_completion)
                prompts.append(None)
                lengths.append(0)
            else:
                tokens, last = self.completions.tokens[k], (k + 1) * self.slots.budget - 1
                rows.append((tokens[-1], self._place(k), self.next_positions[k] - 1, last, self._ends_from(k)))
                prompts.append(self.group[k])
                lengths.append(len(tokens) - 1)
        self.slots.upload(rows)
        self.cache.arrange(prompts, lengths, room)

    def _run_step(self) -> torch.Tensor:
        """Run a step and return the sampled tokens (slots,)."""
        width = self.slots.width
        step = partial(self._step, width)
        if self.graphs is None:
            step()
        else:
            self.graphs(width, (self.cache.version, self.sampler.version), step)
        return self.slots.state[0, :width].clone() if self.steps_per_check > 1 else self.slots.state[0, :width]

    def _step(self, width: int) -> None:
        """Run one token of each of the first slots through the model and sample the next: a function of device buffers only."""
        tokens, places, positions, last, ends_from = self.slots.state[:, :width]
        running = places < self.slots.nowhere
        position_ids = positions.unsqueeze(0)
        if self.positions.dim() == 3:
            position_ids = position_ids.expand(len(self.positions), 1, -1)
        logits = self._features(
            input_ids=tokens.clamp(min=0).unsqueeze(0), attention_mask=self.mask, position_ids=position_ids, use_cache=False
        )
        if self.experts is not None:
            self.experts.add_tokens(torch.where(running, places - 1, self.slots.nowhere))
        sampled = self.sampler(logits, places, ends_from)
        self.slots.store(places, sampled)
        ended = (sampled.ids.unsqueeze(1) == self.eos).any(1) | (places == last)
        self.cache.advance(running)
        positions += running
        tokens.copy_(sampled.ids)
        places.copy_(torch.where(running & ~ended, places + 1, self.slots.nowhere))

    def _features(self, **inputs: Any) -> torch.Tensor:
        """Run the model and return its logits (n, V), or the hidden states (n, H) before the head of the sampler."""
        if self.sampler.head is None:
            logits: torch.Tensor = self.model(**inputs, tree_cache=self.cache).logits[0]
            return logits
        found: list[torch.Tensor] = []

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden[0])
            return hidden[..., :1]

        with replaced_method(self.sampler.head.module, "forward", forward):
            self.model(**inputs, tree_cache=self.cache)
        (hidden,) = found
        return hidden

    # Results of tools

    def _continues(self, k: int) -> bool:
        """Report a turn that has ended, and return whether another turn may follow."""
        if self.episodes is None:
            return False
        return self.episodes.end_turn(k, self.completions.turn(k).copy(), not self.completions.truncated[k])

    def _collect_results(self, wait: bool) -> None:
        """Move completions whose tools have finished to ``resumed``.

        Args:
            wait: whether to wait until there is at least one.
        """
        if self.episodes is None or not self.stored:
            return
        for k, observation in self.episodes.ready(wait):
            prompt_length = self.cache.prompts[self.group[k]]
            if self.completions.has_room(k, observation.inputs, prompt_length, self.plain):
                self.resumed.append((k, observation.inputs.to(self.device)))
            else:
                self.episodes.refuse(k)
                self.completions.truncated[k] = True
                del self.stored[k]

    def _resume(self, free: int) -> None:
        """Append results to completions, sample the first tokens of their next turns, and put them into free slots."""
        batch: list[tuple[int, ModelInputs]] = []
        total = 0
        while self.resumed and len(batch) < free:
            total += 1 + self.resumed[0][1].inputs["input_ids"].shape[1]
            if batch and self.max_tokens is not None and total > self.max_tokens:
                break
            batch.append(self.resumed.popleft())
        completions = [k for k, _ in batch]
        stored = [len(self.completions.tokens[k]) - 1 for k in completions]
        slots = [self.slots.put(k) for k in completions]
        for slot, k in zip(slots, completions, strict=True):
            self.cache.put_back(slot, self.group[k], self.stored.pop(k))
        results = [result for _, result in batch]
        encoded = self._encode(results)
        if self.keeps_features:
            results = encoded
        pack = self._extension(completions, results, encoded)
        self.cache.extend(slots, [self.group[k] for k in completions], stored, list(pack["tree_layout"].lengths))
        logits = self._last_logits(pack)
        if self.experts is not None:
            starts = [k * self.slots.budget + length for k, length in zip(completions, stored, strict=True)]
            parts = zip(starts, pack["tree_layout"].lengths, strict=True)
            self.experts.add_tokens(
                torch.cat([torch.arange(start, start + n) for start, n in parts]).to(self.device, non_blocking=True)
            )
        for k, result in zip(completions, results, strict=True):
            self.completions.observe(k, result)
            self.sampler.see(k, result.inputs["input_ids"][0])
        for slot, k, ended in zip(slots, completions, self._first_tokens(completions, logits), strict=True):
            if ended:
                self._end_turn(slot, k)

    def _encode(self, results: list[ModelInputs]) -> list[ModelInputs]:
        """Return results with image features in place of pixels. Equal images, as of a group's calls, are encoded once."""
        if not self.deduplicates_images:
            return results
        keys = [None if r.image_keys is None or not len(r.image_keys) else (*r.image_keys.tolist(),) for r in results]
        new = {key: r for key, r in zip(keys, results, strict=True) if key is not None and key not in self.encoded}
        if new:
            encoded = encode_images(self.plain, join([*new.values()]))
            for row, key in enumerate(new):
                self.encoded[key] = encoded.select(torch.tensor([row]))
        return [r if key is None else self._with_features(r, self.encoded[key]) for key, r in zip(keys, results, strict=True)]

    def _with_features(self, result: ModelInputs, encoded: ModelInputs) -> ModelInputs:
        per_token = {name: x for name, x in result.inputs.items() if result.family.axis(name) == "token"}
        media = {name: x for name, x in encoded.inputs.items() if name not in per_token}
        return replace(result, inputs=media | per_token, rows=result.rows | {"image_token": encoded.rows["image_token"]})

    def _extension(self, completions: list[int], results: list[ModelInputs], encoded: list[ModelInputs]) -> dict:
        """Return the model inputs of the last token of each completion, which has not run yet, and the result after it.

        Args:
            results: the results as they are stored.
            encoded: the results as they run.
        """
        last = on_device(self.device, [self.completions.tokens[k][-1] for k in completions]).view(-1, 1, 1)
        joined = join([result.prepend(token) for token, result in zip(last, encoded, strict=True)])
        if self.prompts.family.relative_positions:
            starts = on_device(self.device, [self.next_positions[k] - 1 for k in completions])
            positions, advance = segment_positions(self.plain, joined.inputs)
            positions = positions - self.prompts.family.first_position + starts.unsqueeze(1)
            following = (starts + advance).tolist()
        else:
            positions, following = self._unrolled_positions(completions, results, joined)
        for k, position in zip(completions, following, strict=True):
            self.next_positions[k] = position
        return pack_trees(self.plain, joined, [-1] * len(completions), position_ids=positions).inputs

    def _unrolled_positions(
        self, completions: list[int], results: list[ModelInputs], joined: ModelInputs
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the positions of an extension, (axes, R, L), and of the tokens after it, from a copy of each whole path."""
        rows, following = [], []
        width = joined.inputs["input_ids"].shape[1]
        for k, result in zip(completions, results, strict=True):
            path = self.completions.path(k, self.prompts.select(torch.tensor([self.group[k]])))
            positions = prompt_positions(self.plain, chain([path, result]).inputs)
            following.append(int(positions.max()) + 1)
            count = 1 + result.inputs["input_ids"].shape[1]
            rows.append(pad(positions[..., -count:], (width - count, 0)))
        return torch.cat(rows, -2), following
