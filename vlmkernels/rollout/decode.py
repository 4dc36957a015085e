"""Sampling the completions of groups: each prompt through the model once, and kept once for all its completions."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from transformers import MinPLogitsWarper, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from vlmkernels.models.group import cut_packs, pack_groups, prompt_positions
from vlmkernels.models.group_cache import GroupCache, on_device
from vlmkernels.models.image_features import once_per_image, takes_features
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require
from vlmkernels.ops.gather_logps import gather_logps


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Names and meanings are those of ``transformers.GenerationConfig``.

    temperature: 0 is greedy. stop_strings: a completion ends with the token that completes one of them.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int
    eos_token_id: Sequence[int]
    pad_token_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", "be >= 1", self.max_new_tokens)
        require(self.temperature >= 0, "temperature", "be >= 0", self.temperature)
        require(self.top_k >= 0, "top_k", "be >= 0", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "be in (0, 1]", self.top_p)
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "be None or in [0, 1]", self.min_p)
        require(self.repetition_penalty > 0, "repetition_penalty", "be > 0", self.repetition_penalty)
        require(not isinstance(self.stop_strings, str), "stop_strings", "be a list of strings", repr(self.stop_strings))
        require(all(self.stop_strings), "stop_strings", "hold no empty string", self.stop_strings)

    @classmethod
    def names(cls) -> set[str]:
        return {field.name for field in fields(cls)}


class Decoded(NamedTuple):
    """B = P * num_generations completions of C tokens at most, those of a prompt one after another.

    ids: (B, C) int64, right-padded. mask: (B, C) bool, up to and with the token that ended it. truncated: (B,) bool, ended by
    max_new_tokens. The others are None where an engine does not tell, and 0 outside of the mask:

    logps: (B, C) fp32, of the tokens under the model at the temperature (1 where it is greedy), over the whole vocabulary.
    log_kept_mass: (B, C) fp32, of the probability that the tokens which could be drawn have under the model: all but those
    that top_k, top_p, min_p, suppress_tokens and min_new_tokens leave out. The token was drawn with the log-probability
    logps - log_kept_mass; with a repetition penalty this is what defines it, and it is no probability. See docs/mismatch.md.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    truncated: torch.Tensor
    logps: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices (n,) int64 with probabilities (n, V): their sums, in fp64 so that none is lost, inverted at uniform, (n,) fp64 in
    [0, 1)."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(total - 1))
    # The first sum that is greater: never one of a probability of 0, which is no greater than the sum before it.
    return torch.searchsorted(sums, below, right=True).squeeze(1)


def stops(tokens: list[int], stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a stop string is in the text that the last tokens end."""
    if not stop_strings:
        return False
    longest = max(len(text.encode()) for text in stop_strings)  # a token is one byte at least
    text = tokenizer.decode(tokens[-longest - 1 :])
    return any(stop in text for stop in stop_strings)


class _Decoder:
    def __init__(
        self, model, prompts, num_generations, sampling, num_slots, max_tokens, tokenizer, as_generate, uniform
    ) -> None:
        self.model, self.prompts, self.group_size, self.sampling = model, prompts, num_generations, sampling
        self.tokenizer, self.max_tokens, self.device = tokenizer, max_tokens, prompts.inputs["input_ids"].device
        self.count = len(prompts) * num_generations
        plain = model.get_base_model() if is_peft_model(model) else model
        self.once_per_image = takes_features(plain)
        self.positions = prompt_positions(plain, prompts.inputs)
        axes = [axis for axis in range(self.positions.dim()) if axis != self.positions.dim() - 2]
        self.after = (self.positions.amax(axes) + 1).tolist()  # the position of each prompt's first completion token
        self.cache = GroupCache(num_slots)
        self.slots: list[int] = []  # the completion in each
        self.tokens: list[list[int]] = [[] for _ in range(self.count)]
        self.truncated = [True] * self.count
        self.logps: list[torch.Tensor] = []  # (2, n): Decoded's logps and log_kept_mass
        self.drawn: list[tuple[list[int], list[int]]] = []  # (completions, their lengths before) of each element of logps
        self.first: dict[int, torch.Tensor] = {}  # logits (V,) of each prompt's first completion token
        # A number for every token there may be: so what is drawn does not depend on which completions share a step.
        if uniform is None and sampling.temperature and not as_generate:
            uniform = torch.rand(self.count, sampling.max_new_tokens, dtype=torch.float64)
        self.uniform = uniform
        self.seen = None
        # Of a step. The cache attends as it needs to; a mask of four axes keeps the model from making one, which waits for the
        # device.
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        size = model.config.get_text_config().vocab_size  # configurations may name tokens that the model does not have
        self.eos, self.suppressed = (
            torch.tensor([token for token in tokens if token < size], device=self.device, dtype=torch.int64)
            for tokens in (sampling.eos_token_id, sampling.suppress_tokens)
        )
        self.warpers = []
        if sampling.temperature:
            if sampling.top_k:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def run(self) -> Decoded:
        pending = deque(range(self.count))
        while pending or self.slots:
            if pending and len(self.slots) < self.cache.num_slots:
                self._admit([pending.popleft() for _ in range(min(len(pending), self.cache.num_slots - len(self.slots)))])
            else:
                self._step()
        width = max(map(len, self.tokens))
        mask = torch.arange(width) < torch.tensor([len(tokens) for tokens in self.tokens]).unsqueeze(1)
        ids = torch.full((self.count, width), self.sampling.pad_token_id)
        ids[mask] = torch.tensor([token for tokens in self.tokens for token in tokens])
        logps = torch.zeros(2, *ids.shape, device=self.device)
        completions, lengths = torch.tensor(
            [[x for drawn in self.drawn for x in drawn[axis]] for axis in (0, 1)], device=self.device
        )
        logps[:, completions, lengths] = torch.cat(self.logps, 1)
        return Decoded(ids.to(self.device), mask.to(self.device), torch.tensor(self.truncated, device=self.device), *logps)

    def _prompt(self, completion: int) -> int:
        return completion // self.group_size

    def _admit(self, completions: list[int]) -> None:
        """New completions draw their first tokens and take slots."""
        new = sorted({self._prompt(k) for k in completions} - self.first.keys())
        for part in self._cut(new):
            self._prefill(part)
        logits = torch.stack([self.first[self._prompt(k)] for k in completions])
        ended = self._draw(completions, logits)
        self.slots += [k for k, end in zip(completions, ended, strict=True) if not end]

    def _cut(self, prompts: list[int]) -> list[list[int]]:
        if self.max_tokens is None or not prompts:
            return [prompts] if prompts else []
        lengths = self.prompts.inputs["attention_mask"][prompts].sum(1).tolist()
        width = self.model.config.get_text_config().hidden_size
        parts = cut_packs(lengths, [*range(len(prompts))], [0] * len(prompts), self.max_tokens, width)
        return [[prompts[index] for index in part] for part in parts]

    def _prefill(self, prompts: list[int]) -> None:
        chosen = self.prompts.select(torch.tensor(prompts))
        none = torch.empty(0, dtype=torch.int64)
        ids = none.view(0, 0).to(self.device)
        inputs = once_per_image(chosen) if self.once_per_image else chosen.inputs
        pack = pack_groups(inputs, self.positions[..., prompts, :], none, ids, ids.bool())
        layout = pack.inputs["group_layout"]
        self.cache.begin(prompts, list(layout.prefixes))
        last = torch.tensor([end - 1 for _, _, end in layout.groups], device=self.device)
        logits = self.model(**pack.inputs, group_cache=self.cache, use_cache=False, logits_to_keep=last).logits[0]
        self.first |= dict(zip(prompts, logits, strict=True))

    def _step(self) -> None:
        lengths = [len(self.tokens[k]) for k in self.slots]
        prompts = [self._prompt(k) for k in self.slots]
        if 2 * len(set(prompts)) <= len(self.cache.prompts):
            self.cache.keep(set(prompts))
        self.cache.arrange(prompts, [n - 1 for n in lengths], self.device)
        ids = on_device(self.device, [[self.tokens[k][-1] for k in self.slots]])
        positions = on_device(self.device, [[self.after[p] + n - 1 for p, n in zip(prompts, lengths, strict=True)]])
        if self.positions.dim() == 3:
            positions = positions.expand(len(self.positions), 1, -1)
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            group_cache=self.cache,
            use_cache=False,
        ).logits[0]
        ended = self._draw(self.slots, logits)
        alive = len(ended) - sum(ended)
        free = [slot for slot in range(alive) if ended[slot]]
        moved = [slot for slot in range(alive, len(ended)) if not ended[slot]]
        if free:
            self.cache.move(moved, free)
        for source, target in zip(moved, free, strict=True):
            self.slots[target] = self.slots[source]
        del self.slots[alive:]

    def _draw(self, completions: list[int], logits: torch.Tensor) -> list[bool]:
        """Append a token to each of the completions; which of them end."""
        sampling, lengths = self.sampling, [len(self.tokens[k]) for k in completions]
        scores = self._ruled_out(completions, lengths, logits.float())
        if sampling.temperature:
            scores = scores / sampling.temperature
            for warper in self.warpers:
                scores = warper(None, scores)
            probabilities = scores.softmax(-1)
            if self.uniform is None:
                # torch.multinomial of a row for each completion, ended or not.
                noise = scores.new_empty(self.count, scores.shape[1]).exponential_()
                chosen = (probabilities / noise[completions]).argmax(-1)
            else:
                chosen = draw(probabilities, self.uniform[completions, lengths].to(self.device))
            drawn_with = probabilities.gather(1, chosen.unsqueeze(1)).squeeze(1).log()
        else:
            chosen = scores.argmax(-1)
            drawn_with = torch.zeros(len(chosen), device=self.device)
        logps = gather_logps(logits, chosen, temperature=sampling.temperature or 1.0)
        self.logps.append(torch.stack([logps, logps - drawn_with]))
        self.drawn.append((completions.copy(), lengths))
        if self.seen is not None:
            self.seen[on_device(self.device, completions), chosen] = True
        ended = []
        for k, token in zip(completions, chosen.tolist(), strict=True):
            self.tokens[k].append(token)
            done = token in sampling.eos_token_id or stops(self.tokens[k], sampling.stop_strings, self.tokenizer)
            self.truncated[k] = not done
            ended.append(done or len(self.tokens[k]) == sampling.max_new_tokens)
        return ended

    def _ruled_out(self, completions: list[int], lengths: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Scores (n, V) with the repetition penalty, and -inf for tokens that may not come."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            if self.seen is None:
                ids, mask = self.prompts.inputs["input_ids"], self.prompts.inputs["attention_mask"].bool()
                seen = torch.zeros(len(ids), scores.shape[1], dtype=torch.bool, device=self.device)
                seen[mask.nonzero()[:, 0], ids[mask]] = True
                self.seen = seen.repeat_interleave(self.group_size, 0)
            seen = self.seen[on_device(self.device, completions)]
            penalised = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
        if len(self.suppressed):
            scores = scores.index_fill(1, self.suppressed, -torch.inf)
        early = [row for row, length in enumerate(lengths) if length < sampling.min_new_tokens]
        if early:
            scores = scores.clone()
            scores[on_device(self.device, early).unsqueeze(1), self.eos] = -torch.inf
        return scores


@torch.no_grad()
def decode_groups(
    model: torch.nn.Module,
    prompts: Batch,
    num_generations: int,
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_generate: bool = False,
    uniform: torch.Tensor | None = None,
) -> Decoded:
    """Completions of prompts, equal to those of ``model.generate`` on ``num_generations`` copies of each up to rounding.

    A prompt is run once; its keys and values are held once. Completions leave the batch when they end, and others take their
    slots. What is drawn depends on ``uniform`` alone, not on how many completions are decoded at a time.

    Args:
        model: one that ``vlmkernels.models.attention.use_group_attention`` was called on; perhaps with adapters.
        max_num_seqs: completions decoded at a time; default all.
        max_tokens: of the prompts run at a time; default all of those whose completions get slots.
        tokenizer: needed with stop strings.
        as_generate: draw from the device's random state what ``generate`` draws from it; without max_num_seqs.
        uniform: (B, max_new_tokens) fp64 in [0, 1), on the CPU, which tokens are drawn with; default by its random state.

    Returns:
        See ``Decoded``.

    Raises:
        ValueError: an argument is out of range.
    """
    require(num_generations >= 1, "num_generations", "be >= 1", num_generations)
    require(max_num_seqs is None or max_num_seqs >= 1, "max_num_seqs", "be None or >= 1", max_num_seqs)
    require(not sampling.stop_strings or tokenizer is not None, "tokenizer", "be given with stop_strings", None)
    require(not as_generate or uniform is None, "uniform", "be None with as_generate", "a tensor")
    require(not as_generate or max_num_seqs is None, "max_num_seqs", "be None with as_generate", max_num_seqs)
    count = len(prompts) * num_generations
    slots = min(max_num_seqs or count, count)
    return _Decoder(model, prompts, num_generations, sampling, slots, max_tokens, tokenizer, as_generate, uniform).run()
