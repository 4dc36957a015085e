"""The interface of reward functions, and helpers that inspect their signatures."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vlmkernels.ops.checks import did_you_mean
from vlmkernels.rewards.answers import Messages

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import TrainerState

# The keys of a reward's dict that are not options of the reward itself.
SETTINGS = ("name", "log_as", "weight", "timeout", "on_error")
# The arguments that every reward function receives, besides the columns of the dataset.
PROVIDED = (
    *("prompts", "completions", "completion_ids", "think_opened"),
    *("images", "image_sizes", "resized_sizes", "trainer_state"),
    *("sampled_ids", "tool_images", "environments", "environment_rewards"),
)


class RewardFunction(Protocol):
    """Score N completions. A function, a coroutine function or an object with ``__call__``, as in TRL.

    The arguments that the function names are passed by keyword, and with ``**kwargs`` all others, too::

        def mentions_answer(completions, answer):
            texts = [text_of(completion) for completion in completions]  # vlmkernels.rewards.answers.text_of
            return [None if a is None else float(a in text) for text, a in zip(texts, answer)]

    Every argument except ``trainer_state`` is a list with one entry per completion. The completions of a prompt are adjacent,
    and their entries in ``prompts``, ``images`` and the columns are equal.

    Args:
        prompts: the dataset's column ``prompt``: strings, or conversations (lists of messages with ``role`` and ``content``).
        completions: the decoded completions, without special tokens other than tags such as ``<think>`` and
            ``<|box_start|>``: strings if the prompts are strings, else conversations of one message,
            ``[{"role": "assistant", "content": "..."}]``. With tools, all messages of the trajectory: those of the assistant,
            with ``tool_calls`` and ``reasoning_content`` where they have some, and those of tools,
            ``{"role": "tool", "name": "...", "content": ...}``, whose content is a string, or a list of text and image parts.
        completion_ids: token ids of each completion, including the token that ended it and the results of tools.
        think_opened: whether the prompt of each completion ends with ``<think>``, as chat templates of models that always think
            do. The completion then begins within this element. None if unknown.
        images: the decoded images of each sample; an empty list for a sample without images.
        image_sizes: (width, height) in pixels of each image in the dataset.
        sampled_ids: with tools, the token ids that the model sampled: ``completion_ids`` without results.
        tool_images: with tools, the images that they returned.
        environments: with tools, the environment of each trajectory after its last turn: an object of its class with its
            attributes; None without an environment, or if its process was lost.
        environment_rewards: with tools, the reward of each trajectory's environment, by the name of the environment's class; an
            empty dict if it has none.
        resized_sizes: (width, height) in pixels of each image after the processor has resized it. None for a sample whose model
            inputs do not contain the size.
        trainer_state: the state of the trainer, with ``global_step``. Not passed by ``vlmkernels eval``.
        columns: the other columns of the dataset, by name; None for a sample without the column.

    Returns:
        One number per completion, as a list or a tensor (N,). None means "not scored": the completion gets no reward from this
        function, as in a mixture of tasks. With tools, a completion can have a list instead, with one number or None per turn
        of the model; see ``vlmkernels.rewards.Scores``. An exception instead of a number means that scoring this completion
        failed; see ``on_error`` of ``vlmkernels.rewards.calls.Entry``.
    """

    def __call__(
        self,
        *,
        prompts: list[str] | list[Messages],
        completions: list[str] | list[Messages],
        completion_ids: list[list[int]],
        sampled_ids: list[list[int]],
        think_opened: list[bool | None],
        images: "list[list[Image]]",
        image_sizes: list[list[tuple[int, int]]],
        resized_sizes: list[list[tuple[int, int]] | None],
        trainer_state: "TrainerState",
        tool_images: "list[list[Image]]",
        environments: list[Any],
        environment_rewards: list[dict[str, float]],
        **columns: list[Any],
    ) -> Sequence[float | list[float | None] | Exception | None] | torch.Tensor: ...


def options_of(target: Callable[..., Any]) -> dict[str, object]:
    """Return the keyword-only parameters of a function or class, with their defaults."""
    return {p.name: p.default for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY}


def arguments_of(reward: Callable[..., Any], required: bool = False) -> list[str]:
    """List the columns and options that a function or class accepts by name.

    Args:
        reward: a function or class.
        required: list only parameters without a default.
    """
    parameters = inspect.signature(reward).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in PROVIDED]
    return [p.name for p in by_name if not required or p.default is p.empty]


def required_columns(reward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the dataset columns that a reward needs: its attribute ``columns``, else its parameters without a default."""
    declared = getattr(reward, "columns", None)
    return tuple(arguments_of(reward, required=True) if declared is None else declared)


def _parameters_of(reward: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the parameters of a function, or None if they are unknown, as for some functions written in C."""
    try:
        return list(inspect.signature(reward).parameters.values())
    except (ValueError, TypeError):
        return None


def accepted(reward: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function accepts by keyword: all if it has ``**kwargs``, else those that it names."""
    parameters = _parameters_of(reward)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in arguments.items() if name in named}


def check_signature(name: str, reward: Callable[..., Any]) -> None:
    """Raise ValueError if a reward needs arguments by position."""
    refused = [p.name for p in _parameters_of(reward) or () if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if refused:
        raise ValueError(
            f"reward {name} must accept its arguments by keyword, got {inspect.signature(reward)} with {', '.join(refused)} by "
            f"position"
        )


def check_options(name: str, options: dict[str, Any], valid: list[str]) -> None:
    """Raise ValueError if an option is not one of ``valid``."""
    unknown = [option for option in options if option not in valid]
    if unknown:
        listed = ", ".join(valid) or "none"
        hint = did_you_mean(unknown[0], [*valid, *SETTINGS])
        raise ValueError(f"options of the reward {name} must be among {listed}, got {', '.join(unknown)}{hint}")
