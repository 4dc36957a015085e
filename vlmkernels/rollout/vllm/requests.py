"""Requests to vLLM that run at the same time, and their replies."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image


class Video(NamedTuple):
    """The frames of a video, (T, 3, H, W) uint8, and how many of them there are per second."""

    frames: torch.Tensor
    fps: float


class Prompt(NamedTuple):
    """A prompt as it is sent to vLLM.

    Attributes:
        token_ids: tokens of the prompt, with one placeholder per image and video.
        images: the images, in the order of their placeholders.
        videos: the videos, in the order of theirs.
    """

    token_ids: list[int]
    images: list[Image.Image]
    videos: list[Video] = []  # noqa: RUF012 (no caller changes it)


class VLLMCompletion(NamedTuple):
    """A completion as vLLM returned it.

    Attributes:
        token_ids: the sampled tokens.
        logps: for each position, log-probabilities by token id, among them the sampled token's. None if not requested.
        ended: whether the completion ended; False if it was truncated.
        version: version of the weights that sampled it; None if vLLM did not return it.
        sampling_mask: for each position, the tokens that sampling did not exclude. None if vLLM did not return them.
        experts: (T, L, K) integers, the experts that each of L layers chose for each token of the prompt and the completion
            except the last; layers without experts count too. None if vLLM did not return them.
    """

    token_ids: list[int]
    logps: list[dict[int, float]] | None
    ended: bool
    version: str | None
    sampling_mask: list[list[int]] | None = None
    experts: np.ndarray | None = None


class Reply(NamedTuple):
    """vLLM's reply to one prompt.

    Attributes:
        token_ids: tokens of the prompt, with all placeholder tokens of each image.
        completions: the completions.
        prompt_logps: log-probabilities of the prompt's tokens except the first. None if not requested.
    """

    token_ids: list[int]
    completions: list[VLLMCompletion]
    prompt_logps: list[float] | None = None


Key = tuple[int, ...]
"""Identifies a request: the trajectories that its completions belong to."""


class Requests(ABC):
    """Requests that vLLM has not finished. ``len()`` is their number; leaving the context drops them."""

    def __enter__(self) -> "Requests":
        return self

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def send(self, key: Key, prompt: Prompt, params: dict[str, Any]) -> None:
        """Send a request, without waiting for its reply. ``params`` are arguments of ``vllm.SamplingParams``."""

    @abstractmethod
    def replies(self, timeout: float | None) -> list[tuple[Key, Reply]]:
        """Return the replies that arrived since the last call, with the keys of their requests.

        Args:
            timeout: seconds to wait for the first reply. None: until it arrives.
        """
