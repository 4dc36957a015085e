"""The arguments and results of the operator and the kernels of ``sample_logps``, for N rows of logits."""

import math
from typing import NamedTuple

import torch


class SampledTokens(NamedTuple):
    """N sampled tokens.

    Attributes:
        ids: (N,) int64. -1: the row has a logit that is NaN or +inf. -2: no token of the row can be sampled.
        logps: (N,) fp32, log-probabilities of the tokens under the softmax over the whole vocabulary.
        log_kept_mass: (N,) fp32, log of the probability, under this softmax, of the tokens that could be sampled. ``logps -
            log_kept_mass`` is the log-probability that a token was sampled with; with a repetition penalty, log_kept_mass is
            defined by this and is not the log of a probability.
        entropy: (N,) fp32, the entropy of this softmax in nats.
    """

    ids: torch.Tensor
    logps: torch.Tensor
    log_kept_mass: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def empty(cls, source: torch.Tensor) -> "SampledTokens":
        """Allocate the results for logits or hidden states (N, ...)."""
        num, dtype = len(source), torch.promote_types(source.dtype, torch.float32)
        floats = (torch.empty(num, dtype=dtype, device=source.device) for _ in range(3))
        return cls(torch.empty(num, dtype=torch.int64, device=source.device), *floats)


class Filters(NamedTuple):
    """Which tokens can be sampled, and the temperature. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep all tokens."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    @property
    def removable(self) -> float:
        """The share of the mass that top_p removes at most. transformers compares it in fp32."""
        return torch.tensor(1 - self.top_p, dtype=torch.float32, device="cpu").item()

    @property
    def min_p_distance(self) -> float:
        """How much less than the greatest logit a logit can be that min_p keeps, as a negative number; -inf: any."""
        return self.temperature * math.log(self.min_p) if self.min_p else -math.inf


class Inputs(NamedTuple):
    """The tensors of the operator, in the order of its schema."""

    logits: torch.Tensor  # (N, V)
    uniform: torch.Tensor | None  # (N,) fp64; None: greedy
    seen: torch.Tensor | None  # (N, V) bool; None: no repetition penalty
    banned: torch.Tensor | None  # (A, V) bool
    banned_rows: torch.Tensor | None  # (N,) int64; None: row 0
