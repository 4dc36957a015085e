"""Decoding the completions of groups: each prompt runs once, and its keys and values serve all its completions.

A completion can have several turns (``decode_trajectories``): after a turn that calls tools, their results are appended to the
completion's own keys and values, and the next turn follows. While tools run, other completions use the slot.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmkernels.models.attention import check_tree_attention
from vlmkernels.models.cut import cut_packs
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images, encode_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.packs import pack_groups, pack_trees
from vlmkernels.models.positions import prompt_positions, segment_positions
from vlmkernels.models.router_replay import ExpertRecorder, RoutedExperts
from vlmkernels.models.trajectories import Turns, chain, join, text_inputs
from vlmkernels.models.tree_cache import StoredCompletion, TreeCache, on_device
from vlmkernels.rollout.base import Sampling, pad_token_ids
from vlmkernels.rollout.token_sampler import SampledTokens, TokenSampler, stops

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes


class Decoded(NamedTuple):
    """B completions of up to C tokens; those of a prompt are consecutive.

    Attributes:
        ids: (B, C) int64, right-padded.
        mask: (B, C) bool, the tokens of each completion up to and with the token that ended it.
        truncated: (B,) bool, whether max_new_tokens ended the completion, or the results of its tools did not fit.
        logps: (B, C) fp32, log-probabilities of the tokens under the model at the temperature (1 if greedy), over the whole
            vocabulary; 0 outside the mask and for results of tools. None if ``model.generate`` sampled the tokens.
        log_kept_mass: (B, C) fp32, log of the probability, under the model, of the tokens that could be sampled: all except
            those that top_k, top_p, min_p, suppress_tokens and min_new_tokens exclude. ``logps - log_kept_mass`` is the
            log-probability that a token was sampled with; with a repetition penalty, log_kept_mass is defined by this and is
            not the log of a probability. 0 where logps is 0; None if ``logps`` is None. See docs/mismatch.md.
        turns: the segments of completions with tools; None without tools.
        routed_experts: the experts of each token, with ``record_experts``.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    truncated: torch.Tensor
    logps: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None
    turns: Turns | None = None
    routed_experts: RoutedExperts | None = None


class Completions:
    """The tokens of B completions and their log-probabilities, which stay on the device until all have ended.

    Attributes:
        tokens: the tokens of each completion so far, with the results of tools.
        parts: the segments of each completion; the last one is the current turn of the model.
    """

    def __init__(self, count: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.sampling, self.tokenizer = sampling, tokenizer
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.parts: list[list[list[int] | ModelInputs]] = [[[]] for _ in range(count)]
        self.truncated = [True] * count
        self._logps: list[torch.Tensor] = []  # (2, n) per step: logps and log_kept_mass of n tokens
        self._places: list[tuple[list[int], list[int]]] = []  # per step: the n completions, and where in them the tokens are

    def lengths(self, completions: list[int]) -> list[int]:
        return [len(self.tokens[k]) for k in completions]

    def turn(self, k: int) -> list[int]:
        """Return the tokens of the current turn of a completion."""
        turn = self.parts[k][-1]
        assert isinstance(turn, list)
        return turn

    def append(self, completions: list[int], sampled: SampledTokens) -> list[bool]:
        """Append a token to each of the completions and return which of their turns have ended."""
        self._logps.append(torch.stack([sampled.logps, sampled.log_kept_mass]))
        self._places.append((completions.copy(), self.lengths(completions)))
        ended, eos = [], self.sampling.eos_token_id or ()
        for k, token in zip(completions, sampled.ids.tolist(), strict=True):
            self.tokens[k].append(token)
            self.turn(k).append(token)
            stopped = token in eos or stops(self.turn(k), self.sampling.stop_strings, self.tokenizer)
            self.truncated[k] = not stopped
            ended.append(stopped or len(self.tokens[k]) == self.sampling.max_new_tokens)
        return ended

    def append_turn(self, k: int, ids: list[int], *, truncated: bool) -> None:
        """Append the tokens of a whole turn, without log-probabilities."""
        self.tokens[k] += ids
        self.turn(k).extend(ids)
        self.truncated[k] = truncated

    def observe(self, k: int, result: ModelInputs) -> None:
        """Append the result of tools to a completion and begin its next turn."""
        self.tokens[k] += result.inputs["input_ids"][0].tolist()
        self.parts[k] += [result, []]

    def path(self, k: int, prompt: ModelInputs) -> ModelInputs:
        """Return the prompt of a completion and its tokens so far as one sample."""
        parts = [part for part in self.parts[k] if not isinstance(part, list) or part]
        device, pad_token_id = prompt.inputs["input_ids"].device, self.sampling.pad_token_id or 0
        turns = [text_inputs([p], prompt.family, device, pad_token_id) if isinstance(p, list) else p for p in parts]
        return chain([prompt.trim(), *turns])

    def has_room(self, k: int, result: ModelInputs, prompt_length: int, model: PreTrainedModel) -> bool:
        """Return whether a completion has room for a result and one more token, in the budget and in the model's context."""
        length = len(self.tokens[k]) + result.inputs["input_ids"].shape[1]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return length < self.sampling.max_new_tokens and (context is None or prompt_length + length < context)

    def decoded(self, prompts: ModelInputs, *, with_turns: bool) -> Decoded:
        device = prompts.inputs["input_ids"].device
        pad_token_id = self.sampling.pad_token_id
        ids, mask = pad_token_ids(self.tokens, pad_token_id)
        logps: Sequence[torch.Tensor | None] = (None, None)
        if self._logps:
            logps = torch.zeros(2, *ids.shape, device=device)
            places = [[x for places in self._places for x in places[axis]] for axis in (0, 1)]
            rows, columns = torch.tensor(places, device=device)
            logps[:, rows, columns] = torch.cat(self._logps, 1)
        turns = None
        if with_turns:
            assert pad_token_id is not None
            turns = Turns.from_parts(self.parts, prompts.family, device, pad_token_id)
        return Decoded(
            ids.to(device),
            mask.to(device),
            torch.tensor(self.truncated, device=device),
            logps=logps[0],
            log_kept_mass=logps[1],
            turns=turns,
        )


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
        self.cache = TreeCache(num_slots)
        self.pending = deque(range(len(self.group)))  # completions that have not begun
        self.slots: list[int] = []  # the completion in each occupied slot
        self.stored: dict[int, StoredCompletion] = {}  # completions that wait for tools or for a slot
        self.resumed: deque[tuple[int, ModelInputs]] = deque()  # completions whose tools have finished, and the results
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) by prompt, for the first token of its completions
        # The cache ignores the mask. A mask with four axes keeps the model from building one, which would wait for the device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def run(self) -> None:
        """Decode until every completion has ended."""
        with nullcontext() if self.experts is None else self.experts:
            self._run()

    def _run(self) -> None:
        while self.pending or self.slots or self.stored:
            slots = self.cache.num_slots
            free = slots - len(self.slots)
            # Completions that wait for tools keep their keys and values, so that there are at most as many as slots.
            new = min(free, len(self.pending), 2 * slots - len(self.slots) - len(self.stored))
            self._collect_results(wait=not (self.slots or self.resumed or new > 0))
            if self.resumed and free:
                self._resume(free)
            elif new > 0:
                self._admit([self.pending.popleft() for _ in range(new)])
            elif self.slots:
                self._step()

    def _sample(self, completions: list[int], logits: torch.Tensor) -> list[bool]:
        """Sample the next token of each of the completions and return which of their turns have ended."""
        turns = [len(self.completions.turn(k)) for k in completions]
        sampled = self.sampler(completions, self.completions.lengths(completions), logits, turns)
        for k in completions:
            self.next_positions[k] += 1
        return self.completions.append(completions, sampled)

    # Prompts

    def _admit(self, completions: list[int]) -> None:
        """Sample the first tokens of new completions and put those that have not ended into free slots."""
        new = sorted({self.group[k] for k in completions} - self.first_logits.keys())
        for part in self._split_prompts(new):
            self._prefill(part)
        logits = torch.stack([self.first_logits[self.group[k]] for k in completions])
        for k, ended in zip(completions, self._sample(completions, logits), strict=True):
            if not ended:
                self.slots.append(k)
            elif self._continues(k):
                self.stored[k] = StoredCompletion()

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
            self.experts.add_prompts(prompts, self.experts.take())

    def _last_logits(self, inputs: dict) -> torch.Tensor:
        """Run a pack of sequences and return the logits (sequences, V) of the last token of each."""
        last = torch.tensor([end - 1 for end in inputs["tree_layout"].ends], device=self.device)
        logits: torch.Tensor = self.model(**inputs, tree_cache=self.cache, use_cache=False, logits_to_keep=last).logits[0]
        return logits

    # Decoding

    def _step(self) -> None:
        """Run one token of each occupied slot through the model and sample the next."""
        lengths, prompts = self.completions.lengths(self.slots), [self.group[k] for k in self.slots]
        needed = {*prompts, *(self.group[k] for k in (*self.stored, *self.pending))}
        if 2 * len(needed) <= len(self.cache.prompts):
            self.cache.keep(needed)
        self.cache.arrange(prompts, [n - 1 for n in lengths], self.device)
        ids = on_device(self.device, [[self.completions.tokens[k][-1] for k in self.slots]])
        positions = on_device(self.device, [[self.next_positions[k] - 1 for k in self.slots]])
        if self.positions.dim() == 3:
            positions = positions.expand(len(self.positions), 1, -1)
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            tree_cache=self.cache,
            use_cache=False,
        ).logits[0]
        if self.experts is not None:
            self.experts.add_tokens(self.slots, [n - 1 for n in lengths], self.experts.take())
        self._free_slots(self._sample(self.slots, logits))

    def _free_slots(self, ended: list[bool]) -> None:
        """Drop the completions that have ended and move others into their slots, so that occupied slots stay contiguous."""
        for slot, (k, end) in enumerate(zip(self.slots, ended, strict=True)):
            if end and self._continues(k):
                self.stored[k] = self.cache.take_out(slot, len(self.completions.tokens[k]) - 1)
        alive = len(ended) - sum(ended)
        free = [slot for slot in range(alive) if ended[slot]]
        moved = [slot for slot in range(alive, len(ended)) if not ended[slot]]
        if free:
            self.cache.move(moved, free)
        for source, target in zip(moved, free, strict=True):
            self.slots[target] = self.slots[source]
        del self.slots[alive:]

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
            prompt = self.cache.lengths[self.cache.prompts.index(self.group[k])]
            if self.completions.has_room(k, observation.inputs, prompt, self.plain):
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
        first, completions = len(self.slots), [k for k, _ in batch]
        stored = [len(self.completions.tokens[k]) - 1 for k in completions]
        for slot, k in enumerate(completions, first):
            self.cache.put_back(slot, self.group[k], self.stored.pop(k))
        results = [result for _, result in batch]
        encoded = self._encode(results)
        if self.keeps_features:
            results = encoded
        pack = self._extension(completions, results, encoded)
        self.cache.extend(
            range(first, first + len(batch)),
            [self.group[k] for k in completions],
            stored,
            list(pack["tree_layout"].lengths),
        )
        logits = self._last_logits(pack)
        if self.experts is not None:
            counts = pack["tree_layout"].lengths
            places = [(k, start + n) for k, start, count in zip(completions, stored, counts, strict=True) for n in range(count)]
            self.experts.add_tokens([k for k, _ in places], [place for _, place in places], self.experts.take())
        for k, result in zip(completions, results, strict=True):
            self.completions.observe(k, result)
            self.sampler.see(k, result.inputs["input_ids"][0])
        self.slots += completions
        ended = self._sample(completions, logits)
        self._free_slots([False] * first + ended)

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
    return _decode(decoder, with_turns=False, record_experts=record_experts)


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
    return _decode(decoder, with_turns=True, record_experts=record_experts)


def _decode(decoder: Decoder, *, with_turns: bool, record_experts: bool) -> Decoded:
    if record_experts:
        decoder.experts = ExpertRecorder(decoder.model, decoder.prompts, len(decoder.group))
    decoder.run()
    decoded = decoder.completions.decoded(decoder.prompts, with_turns=with_turns)
    if decoder.experts is None:
        return decoded
    return decoded._replace(routed_experts=decoder.experts.routed(decoded.ids.shape[1]))


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
    check_tree_attention(base_model(model))
    vocab_size = model.config.get_text_config().vocab_size
    sampler = TokenSampler(sampling, prompts, group, vocab_size, uniform)
    completions = Completions(len(group), sampling, tokenizer)
    return Decoder(model, prompts, group, min(max_num_seqs or len(group), len(group)), max_tokens, sampler, completions)
