"""The completions of a batch while they are sampled, and the result of decoding."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.models.trajectories import Turns, chain, text_inputs
from vlmkernels.rollout.base import Sampling, pad_token_ids
from vlmkernels.rollout.token_sampler import stops


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
    """The tokens of B completions.

    Attributes:
        tokens: the tokens of each completion so far, with the results of tools.
        parts: the segments of each completion; the last one is the current turn of the model.
    """

    def __init__(self, count: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.sampling, self.tokenizer = sampling, tokenizer
        self.eos = frozenset(sampling.eos_token_id or ())
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.parts: list[list[list[int] | ModelInputs]] = [[[]] for _ in range(count)]
        self.truncated = [True] * count

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of a completion; None: no limit."""
        return self.sampling.max_new_tokens

    def index(self, k: int) -> int:
        """Return the index of the next token of a completion among the tokens that ``max_new_tokens`` counts."""
        return len(self.tokens[k])

    def turn(self, k: int) -> list[int]:
        """Return the tokens of the current turn of a completion."""
        turn = self.parts[k][-1]
        assert isinstance(turn, list)
        return turn

    def append(self, k: int, token: int) -> bool:
        """Append a token to a completion and return whether its turn has ended."""
        turn = self.turn(k)
        self.tokens[k].append(token)
        turn.append(token)
        stopped = token in self.eos or stops(turn, self.sampling.stop_strings, self.tokenizer)
        self.truncated[k] = not stopped
        return stopped or self.index(k) == self.sampling.max_new_tokens

    def append_turn(self, k: int, ids: list[int], *, truncated: bool) -> None:
        """Append the tokens of a whole turn."""
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

    def decoded(self, prompts: ModelInputs, *, with_turns: bool, values: torch.Tensor | None = None) -> Decoded:
        """Return the completions.

        Args:
            values: (2, B, max_new_tokens), logps and log_kept_mass.
        """
        device = prompts.inputs["input_ids"].device
        pad_token_id = self.sampling.pad_token_id
        ids, mask = pad_token_ids(self.tokens, pad_token_id)
        logps, log_kept_mass = (None, None) if values is None else values[..., : ids.shape[1]].clone()
        turns = None
        if with_turns:
            assert pad_token_id is not None
            turns = Turns.from_parts(self.parts, prompts.family, device, pad_token_id)
        truncated = torch.tensor(self.truncated, device=device)
        return Decoded(ids.to(device), mask.to(device), truncated, logps=logps, log_kept_mass=log_kept_mass, turns=turns)
