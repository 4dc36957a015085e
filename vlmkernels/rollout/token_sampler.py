"""Sampling the next tokens of completions from logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, MinPLogitsWarper, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.tree_cache import on_device
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.rollout.base import Sampling


def invert_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample from categorical distributions by inverting their cumulative distribution functions.

    Args:
        probabilities: (n, V), need not be normalized.
        uniform: (n,) fp64 in [0, 1).

    Returns:
        (n,) int64 indices, never one of probability 0.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)  # in fp32, small probabilities would be lost
    total = sums[:, -1:]
    below = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(total - 1))
    # The first index with a greater sum. An index of probability 0 has the sum of the index before it, so it is never first.
    return torch.searchsorted(sums, below, right=True).squeeze(1)


def stops(tokens: list[int], stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether a stop string occurs in the text of the last tokens.

    A token has at least one byte, so it is enough to decode one token more than the longest stop string has bytes.
    """
    if not stop_strings or tokenizer is None:
        return False
    longest = max(len(text.encode()) for text in stop_strings)
    text = tokenizer.decode(tokens[-longest - 1 :])
    return any(stop in text for stop in stop_strings)


class SampledTokens(NamedTuple):
    """n sampled tokens: ``ids``, (n,) int64; ``logps`` and ``log_kept_mass``, (n,) fp32, as in ``Decoded``."""

    ids: torch.Tensor
    logps: torch.Tensor
    log_kept_mass: torch.Tensor


class TokenSampler:
    """Samples the next tokens of completions.

    Args:
        sampling: how tokens are sampled. ``eos_token_id`` must be set.
        prompts: P prompts. The repetition penalty applies to their tokens too.
        group: the prompt of each of the B completions.
        vocab_size: V. Larger token ids in ``sampling`` are ignored: a generation config may name tokens that the model lacks.
        uniform: (B, max_new_tokens) fp64 in [0, 1) on the CPU, one number for every token, so that the tokens of a completion
            do not depend on which completions share a step. None: draw from the device's random state as ``generate`` does.
    """

    def __init__(
        self, sampling: Sampling, prompts: ModelInputs, group: Sequence[int], vocab_size: int, uniform: torch.Tensor | None
    ) -> None:
        self.sampling, self.prompts, self.group, self.uniform = sampling, prompts, group, uniform
        self.count, self.device = len(group), prompts.inputs["input_ids"].device
        self.eos, self.suppressed = (
            torch.tensor([token for token in tokens if token < vocab_size], device=self.device, dtype=torch.int64)
            for tokens in (sampling.eos_token_id or (), sampling.suppress_tokens)
        )
        self.seen = self._tokens_of_prompts(vocab_size) if sampling.repetition_penalty != 1 else None
        self.warpers: list[LogitsProcessor] = []
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(
        self, completions: list[int], lengths: list[int], logits: torch.Tensor, turn_lengths: list[int] | None = None
    ) -> SampledTokens:
        """Sample one token for each of n completions.

        Args:
            completions: indices of the completions.
            lengths: number of tokens that each of them has so far.
            logits: (n, V) of the next tokens.
            turn_lengths: number of tokens of the current turn of each, for ``min_new_tokens``. Default: ``lengths``.
        """
        temperature = self.sampling.temperature
        scores = self._allowed(completions, lengths if turn_lengths is None else turn_lengths, logits.float())
        if temperature:
            scores = scores / temperature
            for warper in self.warpers:
                scores = warper(None, scores)
            probabilities = scores.softmax(-1)
            ids = self._draw(completions, lengths, probabilities)
            sampling_logps = probabilities.gather(1, ids.unsqueeze(1)).squeeze(1).log()
        else:
            ids = scores.argmax(-1)
            sampling_logps = torch.zeros(len(ids), device=self.device)
        logps = gather_logps(logits, ids, temperature=temperature or 1.0)
        if self.seen is not None:
            self.seen[on_device(self.device, completions), ids] = True
        return SampledTokens(ids, logps, logps - sampling_logps)

    def see(self, completion: int, ids: torch.Tensor) -> None:
        """Apply the repetition penalty of a completion to the tokens ``ids`` (n,) of a tool's result too."""
        if self.seen is not None:
            self.seen[completion, ids] = True

    def _draw(self, completions: list[int], lengths: list[int], probabilities: torch.Tensor) -> torch.Tensor:
        if self.uniform is not None:
            return invert_cdf(probabilities, self.uniform[completions, lengths].to(self.device))
        # The same draws as torch.multinomial in generate, which has a row for every completion, whether it has ended or not.
        noise = probabilities.new_empty(self.count, probabilities.shape[1]).exponential_()
        return (probabilities / noise[completions]).argmax(-1)

    def _tokens_of_prompts(self, vocab_size: int) -> torch.Tensor:
        """Return (B, V) bool, which tokens occur in the prompt of each completion."""
        ids, mask = self.prompts.inputs["input_ids"], self.prompts.inputs["attention_mask"].bool()
        seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=self.device)
        seen[mask.nonzero()[:, 0], ids[mask]] = True
        return seen[on_device(self.device, list(self.group))]

    def _allowed(self, completions: list[int], lengths: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Return scores (n, V) with the repetition penalty applied, and -inf for tokens that must not be sampled."""
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            seen = self.seen[on_device(self.device, completions)]
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if len(self.suppressed):
            scores = scores.index_fill(1, self.suppressed, -torch.inf)
        early = [row for row, length in enumerate(lengths) if length < self.sampling.min_new_tokens]
        if early:
            scores = scores.clone()
            scores[on_device(self.device, early).unsqueeze(1), self.eos] = -torch.inf
        return scores
