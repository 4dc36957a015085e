"""Decoding the completions of groups: each prompt runs once, and its keys and values serve all its completions."""

from collections import deque
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmkernels.models.attention import check_tree_attention
from vlmkernels.models.cut import cut_packs
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.models.packs import pack_groups
from vlmkernels.models.positions import prompt_positions
from vlmkernels.models.tree_cache import TreeCache, on_device
from vlmkernels.rollout.base import Sampling, pad_token_ids
from vlmkernels.rollout.token_sampler import SampledTokens, TokenSampler, stops


class Decoded(NamedTuple):
    """B = P * num_generations completions of up to C tokens; those of a prompt are consecutive.

    Attributes:
        ids: (B, C) int64, right-padded.
        mask: (B, C) bool, the tokens of each completion up to and with the token that ended it.
        truncated: (B,) bool, whether max_new_tokens ended the completion.
        logps: (B, C) fp32, log-probabilities of the tokens under the model at the temperature (1 if greedy), over the whole
            vocabulary; 0 outside the mask. None if ``model.generate`` sampled the tokens.
        log_kept_mass: (B, C) fp32, log of the probability, under the model, of the tokens that could be sampled: all except
            those that top_k, top_p, min_p, suppress_tokens and min_new_tokens exclude. ``logps - log_kept_mass`` is the
            log-probability that a token was sampled with; with a repetition penalty, log_kept_mass is defined by this and is
            not the log of a probability. 0 outside the mask; None if ``logps`` is None. See docs/mismatch.md.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    truncated: torch.Tensor
    logps: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None


class _Completions:
    """The tokens of B completions and their log-probabilities, which stay on the device until all have ended."""

    def __init__(self, count: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.sampling, self.tokenizer = sampling, tokenizer
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.truncated = [True] * count
        self._logps: list[torch.Tensor] = []  # (2, n) per step: logps and log_kept_mass of n tokens
        self._places: list[tuple[list[int], list[int]]] = []  # per step: the n completions, and where in them the tokens are

    def lengths(self, completions: list[int]) -> list[int]:
        return [len(self.tokens[k]) for k in completions]

    def append(self, completions: list[int], sampled: SampledTokens) -> list[bool]:
        """Append a token to each of the completions and return which of them have ended."""
        self._logps.append(torch.stack([sampled.logps, sampled.log_kept_mass]))
        self._places.append((completions.copy(), self.lengths(completions)))
        ended, eos = [], self.sampling.eos_token_id or ()
        for k, token in zip(completions, sampled.ids.tolist(), strict=True):
            self.tokens[k].append(token)
            stopped = token in eos or stops(self.tokens[k], self.sampling.stop_strings, self.tokenizer)
            self.truncated[k] = not stopped
            ended.append(stopped or len(self.tokens[k]) == self.sampling.max_new_tokens)
        return ended

    def decoded(self, device: torch.device) -> Decoded:
        ids, mask = pad_token_ids(self.tokens, self.sampling.pad_token_id)
        logps = torch.zeros(2, *ids.shape, device=device)
        rows, columns = torch.tensor([[x for places in self._places for x in places[axis]] for axis in (0, 1)], device=device)
        logps[:, rows, columns] = torch.cat(self._logps, 1)
        return Decoded(
            ids.to(device),
            mask.to(device),
            torch.tensor(self.truncated, device=device),
            logps=logps[0],
            log_kept_mass=logps[1],
        )


class _Decoder:
    """Schedules completions on a fixed number of slots: when one ends, another takes its slot.

    Args:
        model, prompts, max_tokens: see ``decode_groups``.
        num_slots: maximum number of completions decoded at the same time.
        sampler: samples the tokens.
        completions: collects them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: ModelInputs,
        num_slots: int,
        max_tokens: int | None,
        sampler: TokenSampler,
        completions: _Completions,
    ) -> None:
        self.model, self.prompts, self.max_tokens = model, prompts, max_tokens
        self.sampler, self.completions = sampler, completions
        self.device = prompts.inputs["input_ids"].device
        plain = base_model(model)
        self.deduplicates_images = accepts_image_features(plain)
        self.positions = prompt_positions(plain, prompts.inputs)
        other_axes = [axis for axis in range(self.positions.dim()) if axis != self.positions.dim() - 2]  # all but the prompts
        self.start_positions = (self.positions.amax(other_axes) + 1).tolist()  # position of the first completion token
        self.cache = TreeCache(num_slots)
        self.slots: list[int] = []  # the completion in each occupied slot
        self.first_logits: dict[int, torch.Tensor] = {}  # (V,) by prompt, for the first token of its completions
        # The cache ignores the mask. A mask with four axes keeps the model from building one, which would wait for the device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)

    def run(self) -> Decoded:
        pending = deque(range(self.sampler.count))
        while pending or self.slots:
            free = min(len(pending), self.cache.num_slots - len(self.slots))
            if free:
                self._admit([pending.popleft() for _ in range(free)])
            else:
                self._step()
        return self.completions.decoded(self.device)

    def _prompt(self, completion: int) -> int:
        return completion // self.sampler.num_generations

    def _sample(self, completions: list[int], logits: torch.Tensor) -> list[bool]:
        """Sample the next token of each of the completions and return which of them have ended."""
        return self.completions.append(completions, self.sampler(completions, self.completions.lengths(completions), logits))

    def _admit(self, completions: list[int]) -> None:
        """Sample the first tokens of new completions and put those that have not ended into free slots."""
        new = sorted({self._prompt(k) for k in completions} - self.first_logits.keys())
        for part in self._split_prompts(new):
            self._prefill(part)
        logits = torch.stack([self.first_logits[self._prompt(k)] for k in completions])
        ended = self._sample(completions, logits)
        self.slots += [k for k, end in zip(completions, ended, strict=True) if not end]

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
        layout = pack.inputs["tree_layout"]
        self.cache.begin(prompts, list(layout.lengths))
        last = torch.tensor([end - 1 for end in layout.ends], device=self.device)
        logits = self.model(**pack.inputs, tree_cache=self.cache, use_cache=False, logits_to_keep=last).logits[0]
        self.first_logits |= dict(zip(prompts, logits, strict=True))

    def _step(self) -> None:
        """Run one token of each occupied slot through the model and sample the next."""
        lengths, prompts = self.completions.lengths(self.slots), [self._prompt(k) for k in self.slots]
        if 2 * len(set(prompts)) <= len(self.cache.prompts):
            self.cache.keep(set(prompts))
        self.cache.arrange(prompts, [n - 1 for n in lengths], self.device)
        ids = on_device(self.device, [[self.completions.tokens[k][-1] for k in self.slots]])
        starts = [self.start_positions[prompt] for prompt in prompts]
        positions = on_device(self.device, [[start + n - 1 for start, n in zip(starts, lengths, strict=True)]])
        if self.positions.dim() == 3:
            positions = positions.expand(len(self.positions), 1, -1)
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            tree_cache=self.cache,
            use_cache=False,
        ).logits[0]
        self._free_slots(self._sample(self.slots, logits))

    def _free_slots(self, ended: list[bool]) -> None:
        """Drop the completions that have ended and move others into their slots, so that occupied slots stay contiguous."""
        alive = len(ended) - sum(ended)
        free = [slot for slot in range(alive) if ended[slot]]
        moved = [slot for slot in range(alive, len(ended)) if not ended[slot]]
        if free:
            self.cache.move(moved, free)
        for source, target in zip(moved, free, strict=True):
            self.slots[target] = self.slots[source]
        del self.slots[alive:]


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

    Returns:
        See ``Decoded``.

    Raises:
        ValueError: an argument is out of range, there are no prompts, or a prompt has more than ``max_tokens``.
        NotImplementedError: ``use_tree_attention`` was not called on the model.

    Source: https://arxiv.org/abs/2402.05099 for attention to a shared prompt.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations must be >= 1, got {num_generations}")
    if max_num_seqs is not None and max_num_seqs < 1:
        raise ValueError(f"max_num_seqs must be None or >= 1, got {max_num_seqs}")
    if sampling.eos_token_id is None or sampling.pad_token_id is None:
        got = f"{sampling.eos_token_id} and {sampling.pad_token_id}"
        raise ValueError(f"sampling must have eos_token_id and pad_token_id (see Sampling.for_model), got {got}")
    if sampling.generation_kwargs:
        raise ValueError(f"generation_kwargs must be empty for decode_groups, got {', '.join(sampling.generation_kwargs)}")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("tokenizer must be given with stop_strings, got None")
    if as_generate and uniform is not None:
        raise ValueError("uniform must be None with as_generate, got a tensor")
    if as_generate and max_num_seqs is not None:
        raise ValueError(f"max_num_seqs must be None with as_generate, got {max_num_seqs}")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    count = len(prompts) * num_generations
    if uniform is None and sampling.temperature > 0 and not as_generate:
        uniform = torch.rand(count, sampling.max_new_tokens, dtype=torch.float64)
    check_tree_attention(base_model(model))
    vocab_size = model.config.get_text_config().vocab_size
    sampler = TokenSampler(sampling, prompts, num_generations, vocab_size, uniform)
    completions = _Completions(count, sampling, tokenizer)
    return _Decoder(model, prompts, min(max_num_seqs or count, count), max_tokens, sampler, completions).run()
