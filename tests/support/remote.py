"""A function for tests of processes. It is in a module of its own because the process imports it."""

import os
from typing import Any

from vlmkernels.rewards import formula_equality, text


def act(action: str, value: Any = None) -> Any:
    """Return ``value``, or do what ``action`` says."""
    match action:
        case "formula":  # whether this process compares formulas without another process
            return [text.math_equal(["2x"], ["x+x"]), formula_equality._PROCESS._process is None]
        case "print":
            print("printed by the process")
        case "tower":  # one operation that takes minutes and holds the interpreter's lock
            return value**value**value
        case "raise":
            raise KeyError(value)
        case "unsendable":
            return lambda: value
        case "iterator":
            return iter(value)
        case "end":
            os._exit(value)
    return value
