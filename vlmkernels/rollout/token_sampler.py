"""Sampling the next tokens of completions from logits, or from hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, MinPLogitsWarper, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.tree_cache import on_device
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.ops.sample_logps import SampledTokens, sample_logps
from vlmkernels.rollout.base import Sampling


def stops(tokens: list[int], stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether a stop string occurs in the text of the last tokens.

    A token has at least one byte, so it is enough to decode one token more than the longest stop string has bytes.
    """
    if not stop_strings or tokenizer is None:
        return False
    longest = max(len(text.encode()) for text in stop_strings)
    text = tokenizer.decode(tokens[-longest - 1 :])
    return any(stop in text for stop in stop_strings)


class TokenSampler:
    """Samples the next tokens of completions. Calls do not wait for the device.

    The place of a token in the B completions of up to C = max_new_tokens tokens is the index ``completion * C + index``. A slot
    without a completion has the place B * C.

    Args:
        sampling: how tokens are sampled. ``eos_token_id`` must be set.
        prompts: P prompts. The repetition penalty applies to their tokens too.
        group: the prompt of each of the B completions.
        vocab_size: V. Larger token ids in ``sampling`` are ignored: a generation config may name tokens that the model lacks.
        uniform: (B, C) fp64 in [0, 1), one number for every token, so that the tokens of a completion do not depend on which
            completions share a step. None: draw from the device's random state as ``generate`` does.
    """

    def __init__(
        self, sampling: Sampling, prompts: ModelInputs, group: Sequence[int], vocab_size: int, uniform: torch.Tensor | None
    ) -> None:
        self.sampling, self.count, self.vocab_size = sampling, len(group), vocab_size
        self.device = prompts.inputs["input_ids"].device
        self.uniform = None
        if uniform is not None:
            self.uniform = torch.cat([uniform.flatten(), uniform.new_full((1,), 0.5)]).to(self.device)
        self.options: dict[str, Any] = {}
        self.warpers: list[LogitsProcessor] = []
        if sampling.temperature:
            self.options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            if self.uniform is None:
                self.warpers = _warpers(sampling)
        self.seen = self._tokens_of_prompts(prompts, group) if sampling.repetition_penalty != 1 else None
        # Tokens that must not be sampled: before min_new_tokens, and after.
        suppressed, ends = (
            torch.tensor([token for token in tokens if token < vocab_size], dtype=torch.int64)
            for tokens in (sampling.suppress_tokens, sampling.eos_token_id or ())
        )
        self.banned = None
        if len(suppressed) or sampling.min_new_tokens:
            banned = torch.zeros(2, vocab_size, dtype=torch.bool)
            banned[:, suppressed] = True
            banned[0, ends] = True
            self.banned = (banned if sampling.min_new_tokens else banned[1]).to(self.device)

    def __call__(self, logits: torch.Tensor, places: torch.Tensor, ends_from: torch.Tensor) -> SampledTokens:
        """Sample n tokens.

        Args:
            logits: (n, V) of the tokens.
            places: (n,) int64, the places of the tokens.
            ends_from: (n,) int64, the places from which the completions may end (``min_new_tokens`` of a turn).
        """
        options = dict(self.options)
        if self.banned is not None:
            options["banned"] = self.banned
            if self.banned.dim() == 2:
                options["banned_rows"] = (places >= ends_from).long()
        if self.seen is not None:
            completions = places // self.sampling.max_new_tokens
            options |= {"seen": self.seen[completions], "repetition_penalty": self.sampling.repetition_penalty}
        if self.sampling.temperature and self.uniform is None:
            sampled = self._as_generate(logits, places, options)
        else:
            sampled = sample_logps(logits, None if self.uniform is None else self.uniform[places], **options)
        if self.seen is not None:
            self.seen.view(-1).index_fill_(0, completions * self.vocab_size + sampled.ids.clamp(min=0), True)
        return sampled

    def see(self, completion: int, ids: torch.Tensor) -> None:
        """Apply the repetition penalty of a completion to the tokens ``ids`` (n,) of a tool's result too."""
        if self.seen is not None:
            self.seen[completion, ids] = True

    def _as_generate(self, logits: torch.Tensor, places: torch.Tensor, options: dict[str, Any]) -> SampledTokens:
        """Sample with transformers' warpers and the draws of torch.multinomial in ``generate``.

        It draws a row for every completion, whether it has ended or not.
        """
        scores, temperature = logits.float(), self.sampling.temperature
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            scores = torch.where(options["seen"], torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self.banned is not None:
            banned = self.banned[options["banned_rows"]] if self.banned.dim() == 2 else self.banned
            scores = scores.masked_fill(banned, -torch.inf)
        scores = scores / temperature
        for warper in self.warpers:
            scores = warper(None, scores)
        probabilities = scores.softmax(-1)
        noise = probabilities.new_empty(self.count, probabilities.shape[1]).exponential_()
        rows = (places // self.sampling.max_new_tokens).clamp(max=self.count - 1)
        ids = (probabilities / noise[rows]).argmax(-1)
        logps, entropy = gather_logps(logits, ids, temperature=temperature, return_entropy=True)
        log_kept_mass = logps - probabilities.gather(1, ids.unsqueeze(1)).squeeze(1).log()
        empty = (scores == -torch.inf).all(-1)
        ids = ids.masked_fill(log_kept_mass.isnan(), -1).masked_fill(empty, -2)
        return SampledTokens(ids, logps, log_kept_mass, entropy)

    def _tokens_of_prompts(self, prompts: ModelInputs, group: Sequence[int]) -> torch.Tensor:
        """Return (B + 1, V) bool, which tokens occur in the prompt of each completion. The last row is of no completion."""
        ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"].bool()
        seen = torch.zeros(len(ids) + 1, self.vocab_size, dtype=torch.bool, device=self.device)
        seen[mask.nonzero()[:, 0], ids[mask]] = True
        return seen[on_device(self.device, [*group, len(ids)])]


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
