"""Sampling the next tokens of completions from logits, or from hidden states."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, MinPLogitsWarper, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from vlmkernels.models.head import logit_arguments
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.tree_cache import on_device
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.ops.linear_sample_logps import linear_sample_logps
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


class PlainHead(NamedTuple):
    """An output head that tokens are sampled from as training scores them, with the arithmetic of ``linear_logps``.

    Attributes:
        module: the head.
        arguments: of ``linear_sample_logps``: the weight in the dtype of the hidden states, the bias, and how the model changes
            its logits.
    """

    module: torch.nn.Module
    arguments: dict[str, Any]


_LOGIT_ARGUMENTS: WeakKeyDictionary[torch.nn.Module, dict[str, float] | None] = WeakKeyDictionary()


def plain_head(model: torch.nn.Module) -> PlainHead | None:
    """Return the output head of a model; None if tokens are sampled from the model's logits.

    That is so for heads with adapters, for models that change their logits otherwise than ``logit_arguments`` supports, and in
    fp32 on the CPU, where the results are equal up to rounding.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return None
    device, dtype = head.weight.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or (device, dtype) == ("cpu", torch.float32):
        return None
    if head not in _LOGIT_ARGUMENTS:
        try:
            _LOGIT_ARGUMENTS[head] = logit_arguments(model, head)
        except NotImplementedError:
            _LOGIT_ARGUMENTS[head] = None
    arguments = _LOGIT_ARGUMENTS[head]
    if arguments is None:
        return None
    bias = None if head.bias is None else head.bias.to(dtype)
    return PlainHead(head, {"weight": head.weight.to(dtype), "bias": bias, **arguments})


class TokenSampler:
    """Samples the next tokens of completions. Calls do not wait for the device.

    The place of a token in the B completions of up to C = max_new_tokens tokens is the index ``completion * C + index``. A slot
    without a completion has the place B * C.

    Args:
        sampling: how tokens are sampled. ``eos_token_id`` must be set.
        prompts: P prompts. The repetition penalty applies to their tokens too.
        group: the prompt of each of the B completions.
        vocab_size: V. Other token ids in ``sampling`` are ignored: a generation config may name tokens that the model lacks.
        uniform: (B, C) fp64 in [0, 1), one number for every token, so that the tokens of a completion do not depend on which
            completions share a step. None: draw from the device's random state as ``generate`` does. Not used if the
            temperature is 0.

    Attributes:
        head: samples from hidden states instead of logits; None samples from logits.
        version: changes with what a graph of a call depends on besides the contents of buffers.
    """

    def __init__(
        self, sampling: Sampling, prompts: ModelInputs, group: Sequence[int], vocab_size: int, uniform: torch.Tensor | None
    ) -> None:
        self.sampling, self.count, self.vocab_size = sampling, len(group), vocab_size
        self.device = prompts.inputs["input_ids"].device
        self.head: PlainHead | None = None
        self.uniform = None
        if uniform is not None and sampling.temperature:  # greedy sampling draws no numbers
            self.uniform = torch.cat([uniform.flatten(), uniform.new_full((1,), 0.5)]).to(self.device)
        self.options: dict[str, Any] = {}
        self.warpers: list[LogitsProcessor] | None = None  # with which generate samples
        if sampling.temperature:
            self.options = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            if self.uniform is None:
                self.warpers = _warpers(sampling)
        self.version = 0
        self.draw_for(range(self.count))
        self.seen = self._tokens_of_prompts(prompts, group) if sampling.repetition_penalty != 1 else None
        # Tokens that must not be sampled: before min_new_tokens, and after.
        suppressed, ends = (
            torch.tensor([token for token in tokens if 0 <= token < vocab_size], dtype=torch.int64)
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
            logits: (n, V) of the tokens, or with ``head`` hidden states (n, H).
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
        if self.warpers is not None:
            sampled = self._as_generate(logits, places, self.warpers, options)
        else:
            uniform = None if self.uniform is None else self.uniform[places]
            if self.head is None:
                sampled = sample_logps(logits, uniform, **options)
            else:
                sampled = linear_sample_logps(logits, uniform=uniform, **self.head.arguments, **options)
        if self.seen is not None:
            self.seen.view(-1).index_fill_(0, completions * self.vocab_size + sampled.ids.clamp(min=0), True)
        return sampled

    def draw_for(self, completions: Sequence[int]) -> None:
        """Without ``uniform``, draw the random numbers that ``generate`` draws for these completions."""
        self.version += 1
        self.draws = len(completions)
        self.draw_of = torch.zeros(self.count + 1, dtype=torch.int64, device=self.device)
        self.draw_of[on_device(self.device, list(completions))] = torch.arange(self.draws, device=self.device)

    def see(self, completion: int, ids: torch.Tensor) -> None:
        """Apply the repetition penalty of a completion to the tokens ``ids`` (n,) of a tool's result too."""
        if self.seen is not None:
            self.seen[completion, ids] = True

    def _as_generate(
        self, logits: torch.Tensor, places: torch.Tensor, warpers: list[LogitsProcessor], options: dict[str, Any]
    ) -> SampledTokens:
        """Sample with transformers' warpers and the draws of torch.multinomial in ``generate``.

        These draw a row for each completion of ``draw_for``, whether it has ended or not.
        """
        scores, temperature = logits.float(), self.sampling.temperature
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            scores = torch.where(options["seen"], torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self.banned is not None:
            banned = self.banned[options["banned_rows"]] if self.banned.dim() == 2 else self.banned
            scores = scores.masked_fill(banned, -torch.inf)
        scores = scores / temperature
        for warper in warpers:
            scores = warper(None, scores)
        probabilities = scores.softmax(-1)
        noise = probabilities.new_empty(self.draws, probabilities.shape[1]).exponential_()
        ids = (probabilities / noise[self.draw_of[places // self.sampling.max_new_tokens]]).argmax(-1)
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
