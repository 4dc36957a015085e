"""Calls on the main process whose result every rank gets."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vlmkernels.rollout.base import RolloutError

T = TypeVar("T")


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Call ``function`` on the main process and return its result, or raise its exception, on every rank.

    Other ranks raise ``RolloutError`` with the exception's message, because not every exception can be pickled.
    """
    result: Any = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except Exception as caught:
            error = caught
    if accelerator.num_processes > 1:
        outcome = [result, error and f"{type(error).__name__} on the main process: {error}"]
        broadcast_object_list(outcome)
        if not accelerator.is_main_process:
            result, error = outcome[0], RolloutError(outcome[1]) if outcome[1] else None
    if error:
        raise error
    return result
