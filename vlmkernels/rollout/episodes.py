"""The conversations of trajectories with their tools. An engine reports the turns of the model and gets what follows them."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from vlmkernels.data.conversations import text_of_parts
from vlmkernels.data.samples import Sample, SampleError
from vlmkernels.rollout.turns import Observation, ResultError, TurnEncoder
from vlmkernels.tools.calls import CallParser
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.pool import UNKNOWN, Seeds, ToolPool, ToolResult
from vlmkernels.tools.results import Part, error_parts

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True)
class Episode:
    """A trajectory that has ended.

    Args:
        messages: what reward functions get as its completion: messages of the assistant, with ``tool_calls``, and of tools. The
            content of a tool's message is a string, or a list of parts if it has images.
        images: the images in the messages of tools.
        tool_calls: the number of calls of each tool. ``UNKNOWN`` counts those of tools that do not exist.
        failures: the number of calls of each tool that failed.
        num_turns: the number of turns of the model.
        seconds: time that its tools ran.
        refused: whether the results of its last turn did not fit and were removed.
        environment: its environment after its last turn, see ``vlmkernels.tools.pool.Ended``; None without an environment.
        rewards: the reward of its environment by the name of the environment's class; empty if the environment has none.
        lost: why its environment was lost, for example because a call timed out; None if it was not. Such a trajectory is not
            scored.
    """

    messages: list[Message]
    images: list[Image.Image]
    tool_calls: Counter[str]
    failures: Counter[str]
    num_turns: int
    seconds: float
    refused: bool
    environment: Any
    rewards: dict[str, float]
    lost: str | None = None

    def summary(self) -> "Episode":
        """Return a copy without messages, images and environment, to send to other processes."""
        return replace(self, messages=[], images=[], environment=None)


@dataclass
class _Conversation:
    """A trajectory that has not ended."""

    environment: str | None
    messages: list[Message] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    tool_calls: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    num_turns: int = 0
    num_rounds: int = 0  # turns whose calls were run
    seconds: float = 0.0
    refused: bool = False
    last_token: int | None = None
    prefix: list[int] = field(default_factory=list)  # the last tokens before the current turn, if it is not the first
    before_results: tuple[int, int] = (0, 0)  # the numbers of messages and images before the last results


class Episodes:
    """B = P * G conversations.

    Args:
        samples: the P samples, whose prompts must be conversations.
        num_generations: G.
        pool: runs them. Its keys 0 to B - 1 must be free, and are free again after ``results``.
        encoder: encodes results.
        parser: reads the calls in a turn.
        max_iterations: after how many turns with calls a trajectory ends if it calls a tool again, as
            ``max_tool_calling_iterations`` of TRL. None: no limit.
        seed: of the random numbers of tools and environments, to repeat a batch. None: they differ in each run.

    Attributes:
        samples: the distinct prompts, with the observations of ``reset`` at the end of their last messages, and the tools.
        group: (B,) int64 on the CPU, ascending, the prompt of each trajectory in ``samples``.
        rows: for each trajectory the index of its sample in the given ``samples``: 0, ..., 0, 1, ..., P - 1.

    Raises:
        SampleError: a prompt is a string, or ``environment`` is not the name of an environment.
        RuntimeError, TimeoutError: the ``reset`` of an environment failed.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        num_generations: int,
        tools: Tools,
        pool: ToolPool,
        encoder: TurnEncoder,
        parser: CallParser,
        *,
        max_iterations: int | None = None,
        seed: int | None = None,
    ) -> None:
        self._tools, self._pool, self._encoder, self._parser = tools, pool, encoder, parser
        self._max_iterations = max_iterations
        self.rows = [row for row in range(len(samples)) for _ in range(num_generations)]
        environments = [_environment_of(sample, tools) for sample in samples]
        self._conversations = [_Conversation(environments[row]) for row in self.rows]
        observations = pool.begin(
            (key, environments[row], samples[row].row, _seeds(seed, samples[row].index, key % num_generations))
            for key, row in enumerate(self.rows)
        )
        self.samples: list[Sample] = []
        group: list[int] = []
        self._keys: list[int] = []
        for row, sample in enumerate(samples):
            keys = range(row * num_generations, (row + 1) * num_generations)
            equal: dict[Any, list[int]] = {}  # content of an observation -> keys; those of a prompt must be adjacent
            for key in keys:
                equal.setdefault(_content_key(observations[key]), []).append(key)
            for same in equal.values():
                group += [len(self.samples)] * len(same)
                self._keys += same
                observed = _with_observation(sample, observations[same[0]])
                self.samples.append(replace(observed, tools=tuple(tools.schemas(environments[row]))))
        self.group = torch.tensor(group, dtype=torch.int64)
        self._prefixes: dict[int, list[int]] = {}
        self._trajectory_of = {key: k for k, key in enumerate(self._keys)}

    def end_turn(self, k: int, ids: list[int], ended: bool) -> bool:
        """Record a turn of the model and start its calls.

        Args:
            k: the trajectory.
            ids: the tokens that the model sampled in this turn.
            ended: whether the turn ended by itself. The calls of a turn that was cut off do not run.

        Returns:
            Whether an observation will follow. Otherwise the trajectory has ended.
        """
        conversation = self._conversations[k]
        parsed = self._parser(ids, self._tools.schemas(conversation.environment), conversation.prefix or self._prefix(k))
        conversation.messages.append(parsed.message())
        conversation.num_turns += 1
        conversation.last_token = ids[-1] if ids else None
        at_limit = self._max_iterations is not None and conversation.num_rounds >= self._max_iterations
        if not ended or not parsed.calls or at_limit:
            return False
        conversation.num_rounds += 1
        self._pool.submit(self._keys[k], parsed.calls)
        return True

    def _prefix(self, k: int) -> list[int]:
        """Return the last tokens of the prompt of a trajectory."""
        prompt = int(self.group[k])
        if prompt not in self._prefixes:
            self._prefixes[prompt] = self._encoder.last_tokens(self.samples[prompt])
        return self._prefixes[prompt]

    def ready(self, wait: bool) -> list[tuple[int, Observation]]:
        """Return what follows the turns whose calls are all done, with their trajectories.

        Args:
            wait: wait until there is at least one, if calls are running.
        """
        finished = [(self._trajectory_of[key], results) for key, results in self._pool.finished(wait)]
        if wait and not finished:
            raise RuntimeError("an engine must not wait for results when no calls run")
        return [(k, self._observe(self._conversations[k], results)) for k, results in finished]

    def refuse(self, k: int) -> None:
        """Remove the last results of a trajectory, for which the engine has no room. The trajectory has ended."""
        conversation = self._conversations[k]
        num_messages, num_images = conversation.before_results
        del conversation.messages[num_messages:], conversation.images[num_images:]
        conversation.refused = True

    def results(self) -> list[Episode]:
        """Return the trajectories after all have ended, and end them in the pool. Must be called once."""
        episodes = []
        for conversation, ended in zip(self._conversations, self._pool.end(self._keys), strict=True):
            name = self._tools.reward_name(conversation.environment)
            episodes.append(
                Episode(
                    messages=conversation.messages,
                    images=conversation.images,
                    tool_calls=conversation.tool_calls,
                    failures=conversation.failures,
                    num_turns=conversation.num_turns,
                    seconds=conversation.seconds,
                    refused=conversation.refused,
                    environment=ended.state,
                    rewards={} if name is None or ended.reward is None else {name: ended.reward},
                    lost=ended.lost,
                )
            )
        return episodes

    def _observe(self, conversation: _Conversation, results: list[ToolResult]) -> Observation:
        """Append the results of a turn to its conversation, and return them encoded."""
        conversation.before_results = len(conversation.messages), len(conversation.images)
        known = self._tools.names(conversation.environment)
        try:
            observation = self._encode(conversation, results)
        except ResultError:
            results = [self._encodable(conversation, result) for result in results]
            observation = self._encode(conversation, results)
        for result in results:
            name = result.name if result.name in known else UNKNOWN
            conversation.tool_calls[name] += 1
            conversation.failures[name] += result.error is not None
            conversation.seconds += result.seconds
        conversation.prefix = observation.prompt_ids
        conversation.messages += map(_message, results)
        conversation.images += observation.images
        return observation

    def _encode(self, conversation: _Conversation, results: list[ToolResult]) -> Observation:
        return self._encoder([_message(result) for result in results], conversation.last_token)

    def _encodable(self, conversation: _Conversation, result: ToolResult) -> ToolResult:
        """Return a result, or if it cannot be encoded, the error that the model gets instead."""
        try:
            self._encode(conversation, [result])
            return result
        except ResultError as error:
            logger.warning("a result of the tool %s cannot be encoded: %s", result.name, error)
            reason = str(error)
        for text in (reason, "the result cannot be encoded"):  # the reason may quote what cannot be encoded
            failed = replace(result, parts=error_parts(text), error=text)
            try:
                self._encode(conversation, [failed])
                break
            except ResultError:
                continue
        return failed


def episode_metrics(episodes: Sequence[Episode], tools: Tools) -> dict[str, float]:
    """Compute the metrics of tools. ``tools/call_frequency`` and ``tools/failure_frequency`` are those of TRL.

    Returns:
        Means over episodes: turns, seconds in tools, calls in total and by tool. Shares of the episodes whose last results did
        not fit, and whose environment was lost. Shares of calls that failed, in total and by tool. The largest number of turns.
    """
    turns = [episode.num_turns for episode in episodes]
    calls = sum((episode.tool_calls for episode in episodes), Counter[str]())
    failures = sum((episode.failures for episode in episodes), Counter[str]())
    result = {
        "tools/call_frequency": calls.total() / len(episodes),
        "tools/failure_frequency": failures.total() / max(calls.total(), 1),
        "tools/turns/mean": fmean(turns),
        "tools/turns/max": max(turns),
        "tools/seconds": fmean(episode.seconds for episode in episodes),
        "tools/refused": fmean(episode.refused for episode in episodes),
        "tools/lost_environments": fmean(episode.lost is not None for episode in episodes),
    }
    for name in _names(tools):
        result[f"tools/{name}/calls"] = calls[name] / len(episodes)
        result[f"tools/{name}/failures"] = failures[name] / max(calls[name], 1)
    return result


def _names(tools: Tools) -> list[str]:
    """Return the names of the tools of all environments, and ``UNKNOWN``."""
    environments: list[str | None] = list(tools.environments) or [None]
    return list(dict.fromkeys([*(name for e in environments for name in tools.names(e)), UNKNOWN]))


def _seeds(seed: int | None, index: int, generation: int) -> Seeds | None:
    """Return seeds that do not depend on the other samples of the batch."""
    return None if seed is None else Seeds(f"{seed} {index}", f"{seed} {index} {generation}")


def environment_of(row: Mapping[str, Any], tools: Tools) -> str | None:
    """Return the name of the environment of a row of a dataset; None unless there are several.

    Raises:
        ValueError: the prompt is a string, or ``environment`` is not the name of an environment.
    """
    if isinstance(prompt := row["prompt"], str):
        raise ValueError(f"prompt must be a conversation, as the model has tools, got the string {prompt!r:.80}")
    return tools.environment_of(row)


def _environment_of(sample: Sample, tools: Tools) -> str | None:
    try:
        return environment_of(sample.row, tools)
    except ValueError as error:
        raise SampleError(sample, error) from error


def _message(result: ToolResult) -> Message:
    """Return the message of a tool."""
    has_images = any(part["type"] == "image" for part in result.parts)
    return {"role": "tool", "name": result.name, "content": result.parts if has_images else _text(result.parts)}


def _text(parts: list[Part]) -> str:
    return "".join(part["text"] for part in parts)


def _content_key(observation: str | list[Part] | None) -> Any:
    """Return a hashable value that is equal for equal observations."""
    if observation is None or isinstance(observation, str):
        return observation
    images = [part.get("image") for part in observation]
    return tuple(
        part["text"] if image is None else (image.mode, image.size, image.tobytes())
        for part, image in zip(observation, images, strict=True)
    )


def _with_observation(sample: Sample, observation: str | list[Part] | None) -> Sample:
    """Append the observation of ``reset`` to the last message of a prompt, also in the row that reward functions see."""
    if not observation:
        if len(sample.prompt) == 1 and not text_of_parts(sample.prompt[0]) and not (sample.images or sample.videos):
            raise SampleError(sample, "reset must return the prompt of a row without a prompt, got nothing")
        return sample
    parts = [{"type": "text", "text": observation}] if isinstance(observation, str) else observation
    shown = [part if part["type"] == "text" else {"type": "image"} for part in parts]
    row = {**sample.row, "prompt": _appended(sample.row["prompt"], observation, parts)}
    images: list[Any] = [part["image"] for part in parts if part["type"] == "image"]
    prompt = _appended(sample.prompt, observation, shown)
    return replace(sample, prompt=prompt, row=row, images=[*sample.images, *images])


def _appended(messages: Any, observation: str | list[Part], parts: list[Part]) -> list[Message]:
    """Append an observation, or its parts if the content is not a string, to the last of some messages."""
    *earlier, last = messages
    content = last.get("content") or ""
    if isinstance(content, str):
        if isinstance(observation, str):
            return [*earlier, {**last, "content": content + observation}]
        content = [{"type": "text", "text": content}]
    content = list(content)
    if isinstance(observation, str) and content and content[-1].get("type") == "text":  # one text, as TRL joins strings
        content[-1] = {**content[-1], "text": content[-1]["text"] + observation}
        return [*earlier, {**last, "content": content}]
    return [*earlier, {**last, "content": content + parts}]
