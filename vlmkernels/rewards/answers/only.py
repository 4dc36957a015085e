"""The rule against ambiguous answers."""

from typing import TypeVar

T = TypeVar("T")


def only(found: list[T]) -> T | None:
    """Return the common value of a list, or None if the list is empty or its values differ."""
    return found[0] if found and all(value == found[0] for value in found) else None
