"""A completion that vLLM samples turn by turn."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rollout.vllm.requests import Prompt

if TYPE_CHECKING:
    from vlmkernels.rollout.turns import Observation


@dataclass
class Trajectory:
    """A prompt and what follows it: turns of the model and, between them, the results of its tools.

    Args:
        index: index of the prompt's sample, for error messages.
        prompt: the prompt and all that follows, as it is sent to vLLM.
        token_ids: the same tokens, with all placeholder tokens of each image.
        prompt_length: the number of tokens of the prompt in ``token_ids``.
        max_new_tokens: maximum number of tokens after the prompt.

    Attributes:
        segments: the token ids of each turn, and the model inputs of each result.
        logps: the log-probabilities of the tokens after the prompt, and those with which they were sampled; 0 for those of
            tools. Incomplete without log-probabilities.
        experts: the experts of all tokens but the last, see ``VLLMCompletion``. None if vLLM did not return them.
        truncated: whether the last turn did not end, or there was no room for the result of its calls.
    """

    index: int
    prompt: Prompt
    token_ids: list[int]
    prompt_length: int
    max_new_tokens: int
    segments: list[list[int] | ModelInputs] = field(default_factory=list)
    logps: list[tuple[float, float]] = field(default_factory=list)
    truncated: bool = False
    experts: np.ndarray | None = None

    @property
    def name(self) -> str:
        """The name of the next turn in error messages."""
        turn = 1 + len(self.segments) // 2
        return f"sample {self.index}" if turn == 1 else f"sample {self.index}, turn {turn}"

    @property
    def completion_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.token_ids[self.prompt_length :]

    @property
    def room(self) -> int:
        """The number of tokens that may follow."""
        return self.prompt_length + self.max_new_tokens - len(self.token_ids)

    def add_turn(self, token_ids: list[int], logps: list[tuple[float, float]], ended: bool) -> None:
        """Append a turn of the model."""
        self._append(token_ids, Prompt(token_ids, []), token_ids)
        self.logps += logps
        self.truncated = not ended

    def add_result(self, observation: "Observation", max_length: int) -> bool:
        """Append the result of a turn's calls if at least one token can follow it; otherwise the trajectory is truncated.

        Args:
            observation: the result.
            max_length: maximum number of tokens with the prompt.

        Returns:
            Whether the result was appended.
        """
        token_ids = observation.inputs.inputs["input_ids"][0].tolist()
        self.truncated = len(token_ids) >= min(self.room, max_length - len(self.token_ids))
        if not self.truncated:
            self._append(observation.inputs, Prompt(observation.prompt_ids, observation.images), token_ids)
            self.logps += [(0.0, 0.0)] * len(token_ids)
        return not self.truncated

    def _append(self, segment: list[int] | ModelInputs, sent: Prompt, token_ids: list[int]) -> None:
        # New lists: trajectories of a group begin with the same prompt, and a request may still hold the old ones.
        before = self.prompt
        self.prompt = before._replace(token_ids=[*before.token_ids, *sent.token_ids], images=[*before.images, *sent.images])
        self.token_ids = [*self.token_ids, *token_ids]
        self.segments.append(segment)
