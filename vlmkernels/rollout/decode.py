"""Decoding the completions of groups: each prompt runs once, and its keys and values serve all its completions.

The completions are decoded in slots. A decoding step is a function of the contents of device buffers (``Slots``) only, so that
on a GPU it runs as a CUDA graph, and the host reads the sampled tokens only every few steps.

A completion can have several turns (``decode_trajectories``): after a turn that calls tools, their results are appended to the
completion's own keys and values, and the next turn follows. While tools run, other completions use the slot.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmkernels.models.attention import check_tree_attention
from vlmkernels.models.cut import cut_packs
from vlmkernels.models.few_rows import few_rows_linears
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images, encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.packs import pack_groups, pack_trees
from vlmkernels.models.positions import prompt_positions, segment_positions
from vlmkernels.models.router_replay import ExpertRecorder
from vlmkernels.models.trajectories import chain, join
from vlmkernels.models.tree_cache import StoredCompletion, TreeCache, on_device
from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.completions import Completions, Decoded
from vlmkernels.rollout.slots import Slots
from vlmkernels.rollout.step_graphs import step_graphs
from vlmkernels.rollout.token_sampler import TokenSampler

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
        self.cache = TreeCache(num_slots, self.device, sampling.max_new_tokens, longest)
        self.slots = Slots(num_slots, len(self.group), sampling.max_new_tokens, self.device)
        self.pending = deque(range(len(self.group)))  # completions that have not begun
        self.stored: dict[int, StoredCompletion] = {}  # completions that wait for tools or for a slot
        self.resumed: deque[tuple[int, ModelInputs]] = deque()  # completions whose tools have finished, and the results
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) by prompt, for the first token of its completions
        # The cache ignores the mask. A mask with four axes keeps the model from building one, which would wait for the device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.graphs = step_graphs(model, self.device)
        every_step = sampling.stop_strings or (sampling.temperature and sampler.uniform is None)
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
                self._decode()

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
        budget = self.completions.sampling.max_new_tokens
        places = on_device(self.device, [k * budget + len(self.completions.tokens[k]) for k in completions])
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

    def _ends_from(self, k: int) -> int:
        """Return the place (``TokenSampler``) from which a completion may end."""
        sampling, length = self.completions.sampling, len(self.completions.tokens[k])
        return k * sampling.max_new_tokens + length - len(self.completions.turn(k)) + sampling.min_new_tokens

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
        no_ids = no_group.view(0, 0).to(self.device)
        inputs = deduplicate_images(chosen) if self.deduplicates_images else chosen.inputs
        pack = pack_groups(inputs, self.positions[..., prompts, :], no_group, no_ids, no_ids.bool(), chosen.family)
        self.cache.begin(prompts, list(pack.inputs["tree_layout"].lengths))
        self.first_logits |= dict(zip(prompts, self._last_logits(pack.inputs), strict=True))
        if self.experts is not None:
            self.experts.add_prompts(prompts)

    def _last_logits(self, inputs: dict) -> torch.Tensor:
        """Run a pack of sequences and return the logits (sequences, V) of the last token of each."""
        last = torch.tensor([end - 1 for end in inputs["tree_layout"].ends], device=self.device)
        return self._features(**inputs, use_cache=False, logits_to_keep=last)

    # Decoding

    def _decode(self) -> None:
        """Run some steps of all occupied slots, and free those whose turns have ended."""
        occupied, budget = self.slots.occupied, self.completions.sampling.max_new_tokens
        lengths = {k: len(self.completions.tokens[k]) for k in occupied}
        steps = min(self.steps_per_check, budget - min(lengths.values()))
        if self.episodes is not None and self.cache.is_recurrent:
            steps = 1  # further steps would change the states of a completion that continues after its tools
        if self._moves():
            self.slots.changed = True
        if self.slots.changed or max(lengths.values()) - 1 + steps > self.cache.capacity:
            self._arrange(steps)
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

    def _arrange(self, steps: int) -> None:
        """Copy the state of the slots to the device."""
        budget, rows, prompts, lengths = self.completions.sampling.max_new_tokens, [], [], []
        for k in self.slots.arranged():
            if k is None:
                rows.append(self.slots.no_completion)
                prompts.append(None)
                lengths.append(0)
            else:
                tokens = self.completions.tokens[k]
                place = k * budget + len(tokens)
                rows.append((tokens[-1], place, self.next_positions[k] - 1, (k + 1) * budget - 1, self._ends_from(k)))
                prompts.append(self.group[k])
                lengths.append(len(tokens) - 1)
        self.slots.upload(rows)
        self.cache.arrange(prompts, lengths, steps)

    def _run_step(self) -> torch.Tensor:
        """Run a step and return the sampled tokens (slots,)."""
        width = self.slots.width
        step = partial(self._step, width)
        if self.graphs is None:
            step()
        else:
            self.graphs(width, self.cache.version, step)
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
        """Run the model and return its logits (n, V)."""
        logits: torch.Tensor = self.model(**inputs, tree_cache=self.cache).logits[0]
        return logits

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
            self.experts.add_tokens(torch.cat([torch.arange(start, start + n) for start, n in parts]).to(self.device))
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
        last = [torch.tensor([[self.completions.tokens[k][-1]]], device=self.device) for k in completions]
        joined = join([result.prepend(token) for token, result in zip(last, encoded, strict=True)])
        if self.prompts.family.relative_positions:
            starts = torch.tensor([self.next_positions[k] - 1 for k in completions], device=self.device)
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


@torch.no_grad()
def decode_groups(
    model: PreTrainedModel,
    prompts: ModelInputs,
    num_generations: int,
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_generate: bool = False,
    uniform: torch.Tensor | None = None,
    record_experts: bool = False,
) -> Decoded:
    """Sample completions as ``model.generate`` does on ``num_generations`` copies of each prompt.

    Greedy completions equal those of ``generate`` up to rounding; sampled completions do so with ``as_generate``. Each prompt
    runs once, and its keys and values are stored once. When a completion ends, another takes its slot. The sampled tokens
    depend on ``uniform``, not on how many completions are decoded at the same time.

    Args:
        model: a model that ``vlmkernels.models.attention.use_tree_attention`` was called on; it may have adapters.
        prompts: P encoded prompts.
        num_generations: completions per prompt.
        sampling: how tokens are sampled, with ``eos_token_id`` and ``pad_token_id``, without ``generation_kwargs``.
        max_num_seqs: maximum number of completions decoded at the same time. Default: all.
        max_tokens: maximum number of prompt tokens in one forward pass. Default: no limit.
        tokenizer: needed for stop strings.
        as_generate: draw the random numbers that ``generate`` draws from the device's random state. Excludes ``max_num_seqs``
            and ``uniform``.
        uniform: (B, max_new_tokens) fp64 in [0, 1) on the CPU, one random number per token. Default: from the CPU's random
            state.
        record_experts: record the experts of each token; see ``vlmkernels.models.router_replay``.

    Returns:
        See ``Decoded``.

    Raises:
        ValueError: an argument is out of range, there are no prompts, or a prompt has more than ``max_tokens``.
        NotImplementedError: ``use_tree_attention`` was not called on the model.

    Source: https://arxiv.org/abs/2402.05099 for attention to a shared prompt.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations must be >= 1, got {num_generations}")
    if as_generate and uniform is not None:
        raise ValueError("uniform must be None with as_generate, got a tensor")
    if as_generate and max_num_seqs is not None:
        raise ValueError(f"max_num_seqs must be None with as_generate, got {max_num_seqs}")
    group = [prompt for prompt in range(len(prompts)) for _ in range(num_generations)]
    if uniform is None and sampling.temperature > 0 and not as_generate:
        uniform = torch.rand(len(group), sampling.max_new_tokens, dtype=torch.float64)
    decoder = make_decoder(
        model, prompts, group, sampling, max_num_seqs=max_num_seqs, max_tokens=max_tokens, tokenizer=tokenizer, uniform=uniform
    )
    if record_experts:
        decoder.record_experts()
    with few_rows_linears(model):
        decoder.run()
    return decoder.decoded(with_turns=False)


@torch.no_grad()
def decode_trajectories(
    model: PreTrainedModel,
    prompts: ModelInputs,
    episodes: "Episodes",
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: torch.Tensor | None = None,
    keeps_features: bool = False,
    record_experts: bool = False,
) -> Decoded:
    """Sample completions of several turns: the results of the tools that a turn calls are appended, and the next turn follows.

    Only new tokens run through the model: each prompt once, and each turn and each result once per completion. While the tools
    of a completion run, others use its slot. The result is what ``model.generate`` returns turn by turn, up to rounding. The
    tokens depend on ``uniform`` and on the results of tools, not on how long tools take.

    Args:
        model, prompts, max_num_seqs, tokenizer: see ``decode_groups``.
        episodes: the conversations; ``episodes.group`` has the prompt of each completion.
        sampling: see ``decode_groups``. ``max_new_tokens`` counts all tokens after the prompt, also those of results.
            ``min_new_tokens`` and ``stop_strings`` apply to each turn.
        max_tokens: maximum number of tokens of prompts, or of results, in one forward pass. A result runs in one pass.
        uniform: (B, max_new_tokens) fp64 in [0, 1) on the CPU; see ``decode_groups``.
        keeps_features: return results with image features in place of pixels; see ``encode_images``.
        record_experts: see ``decode_groups``.

    Returns:
        See ``Decoded``, with ``turns``.

    Raises:
        See ``decode_groups``, and ``Episodes``.
    """
    group = episodes.group.tolist()
    if uniform is None and sampling.temperature > 0:
        uniform = torch.rand(len(group), sampling.max_new_tokens, dtype=torch.float64)
    decoder = make_decoder(
        model, prompts, group, sampling, max_num_seqs=max_num_seqs, max_tokens=max_tokens, tokenizer=tokenizer, uniform=uniform
    )
    decoder.episodes, decoder.keeps_features = episodes, keeps_features
    if record_experts:
        decoder.record_experts()
    with few_rows_linears(model):
        decoder.run()
    return decoder.decoded(with_turns=True)


def make_decoder(
    model: PreTrainedModel,
    prompts: ModelInputs,
    group: Sequence[int],
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: torch.Tensor | None = None,
) -> Decoder:
    """Check the arguments of ``decode_groups`` or ``decode_trajectories`` and build the decoder.

    Args:
        group: the prompt of each completion, ascending.
        uniform: see ``TokenSampler``.
    """
    if max_num_seqs is not None and max_num_seqs < 1:
        raise ValueError(f"max_num_seqs must be None or >= 1, got {max_num_seqs}")
    if sampling.eos_token_id is None or sampling.pad_token_id is None:
        got = f"{sampling.eos_token_id} and {sampling.pad_token_id}"
        raise ValueError(f"sampling must have eos_token_id and pad_token_id (see Sampling.for_model), got {got}")
    if sampling.generation_kwargs:
        raise ValueError(f"generation_kwargs must be empty for decode_groups, got {', '.join(sampling.generation_kwargs)}")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("tokenizer must be given with stop_strings, got None")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    if uniform is not None:
        _check_uniform(uniform, (len(group), sampling.max_new_tokens))
    check_tree_attention(base_model(model))
    vocab_size = model.config.get_text_config().vocab_size
    sampler = TokenSampler(sampling, prompts, group, vocab_size, uniform)
    completions = Completions(len(group), sampling, tokenizer)
    return Decoder(model, prompts, group, min(max_num_seqs or len(group), len(group)), max_tokens, sampler, completions)


def _check_uniform(uniform: torch.Tensor, shape: tuple[int, int]) -> None:
    if uniform.shape != shape:
        raise ValueError(f"uniform must be {shape}, one number per token, got {tuple(uniform.shape)}")
    bad = ~((uniform >= 0) & (uniform < 1))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"uniform must be in [0, 1), got {uniform[row, column].item()} at ({row}, {column})")
