"""The arguments of an adapter's methods. Their ``repr`` is code that makes them, so that a report can print it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image


def code(value: Any) -> str:
    """Return an expression that makes ``value``: a tensor, a number, a dataclass, or what ``repr`` prints as code."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.Tensor):
        numbers = str(value.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
        # Python's numbers become int64, bool or the default dtype, float32.
        inferred = value.dtype in (torch.int64, torch.bool) or (value.dtype == torch.float32 and value.numel() > 0)
        return f"torch.tensor({numbers}{'' if inferred else f', dtype={value.dtype}'})"
    return repr(value)


def construct(value: Any, **codes: str) -> str:
    """Return an expression that makes a dataclass, without the fields that have their defaults. ``codes`` replaces fields."""
    given = []
    for field in fields(value):
        content = getattr(value, field.name)
        if isinstance(content, torch.Tensor) or content != field.default:
            given.append(f"{field.name}={codes.get(field.name, code(content))}")
    return f"{type(value).__name__}({', '.join(given)})"


class _Code:
    """A dataclass whose repr is the expression that makes it."""

    def __repr__(self) -> str:
        return construct(self)


@dataclass(frozen=True, repr=False)
class LossBatch(_Code):
    """One micro-batch of B completions of at most T tokens. Tokens outside of ``loss_mask`` may have any values, also NaN."""

    logps: torch.Tensor  # (B, T): the log-probabilities of the policy, which get gradients
    advantages: torch.Tensor  # (B,)
    loss_mask: torch.Tensor  # (B, T) bool: the tokens in the loss
    old_logps: torch.Tensor | None = None  # (B, T): of the policy before this step; None: the first step
    ref_logps: torch.Tensor | None = None  # (B, T): of the reference model; given if beta > 0
    rollout_logps: torch.Tensor | None = None  # (B, T): of the engine that sampled; given with a rollout correction
    entropy: torch.Tensor | None = None  # (B, T)
    num_items: int | None = None  # tokens in the loss of the whole batch: of all micro-batches of all processes
    accumulation_steps: int = 1  # the number of micro-batches of a process, each of B completions
    num_processes: int = 1  # the whole batch has accumulation_steps * num_processes * B completions

    @property
    def known_old_logps(self) -> torch.Tensor:
        """``old_logps``; in the first step ``logps``, without a gradient."""
        return self.logps.detach() if self.old_logps is None else self.old_logps

    @property
    def tokens(self) -> int:
        """``num_items``; by default the tokens of this micro-batch."""
        return int(self.loss_mask.sum()) if self.num_items is None else self.num_items


@dataclass(frozen=True, repr=False)
class AdvantageBatch(_Code):
    """The rewards of N completions. The completions of a group are adjacent."""

    rewards: torch.Tensor  # (N, R): of R reward functions; NaN means not scored
    group_sizes: tuple[int, ...]  # they add up to N
    weights: tuple[float, ...] = (1.0,)  # (R,)
    scale: str = "group"
    baseline: str = "mean"


@dataclass(frozen=True, repr=False)
class Sample(_Code):
    """A prompt with its images, and a completion."""

    text: str
    images: tuple[tuple[int, int, int], ...] = ()  # (seed, height, width): noise, see ``pictures``
    completion_ids: tuple[int, ...] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        """The images."""
        out = []
        for seed, height, width in self.images:
            pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
            out.append(Image.fromarray(pixels))
        return out

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation; images come first, in order."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self.pictures]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def pad(rows: Sequence[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Return rows of different lengths as one tensor, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=value)
