"""Functions of other libraries replaced where they stand, and put back."""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from typing import ClassVar

from vlmkernels.ops.checks import require

# Where a function stands, "module:name", and what is put there.
Replacements = dict[str, Callable]


def parameters(function: Callable) -> list[tuple]:
    """What a caller may pass: kind, name and default of each parameter; of a class, those of the methods it defines itself."""
    if isinstance(function, type):
        methods = [vars(function).get(name) for name in ("__init__", "forward", "apply")]
        return [row for method in methods if method is not None for row in parameters(method)]
    function = getattr(function, "__func__", function)  # of a staticmethod
    return [(str(p.kind), p.name, p.default) for p in inspect.signature(function).parameters.values()]


def held_by(value: object, name: str) -> list[dict]:
    """The namespaces of all loaded modules in which ``name`` is ``value``."""
    spaces = (getattr(module, "__dict__", {}) for module in list(sys.modules.values()))
    return [space for space in spaces if space.get(name) is value]


class Patch:
    """Replaces functions in every loaded module that holds them, until ``undo()`` or the end of a ``with`` block.

    Whoever imported a function before, or imports it from the library later, gets ours; afterwards everyone has the library's
    again, except what held ours before. An object made of a replaced class stays what it is.

    Args:
        name: of the call that makes it, for errors.
        library: the distribution patched, for errors.
        version: those whose functions are known to mean what ours do, as prefixes.
        replacements: ours, which take the same parameters: "module:name" -> function or class.

    Raises:
        ModuleNotFoundError: the library is not installed.
        RuntimeError: it is patched already, or it is of another version, or a function is not there or has other parameters.
            Nothing has been replaced then.
    """

    _active: ClassVar[dict[str, "Patch"]] = {}

    def __init__(self, name: str, library: str, version: tuple[str, ...], replacements: Replacements) -> None:
        require(name not in self._active, name, "be undone before it is called again", "a second call", RuntimeError)
        try:
            installed = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"{name} needs {library}, which is not installed") from error
        rule = f"be given {library} {' or '.join(v + '*' for v in version)}"
        require(installed.startswith(version), name, rule, installed, RuntimeError)
        found = []
        for place, ours in replacements.items():
            module, attribute = place.split(":")
            theirs = vars(importlib.import_module(module)).get(attribute)
            rule = f"find {place} with the parameters of {library} {version[0]}*"
            same = theirs is not None and parameters(theirs) == parameters(ours)
            require(same, name, rule, f"{theirs} of {installed}", RuntimeError)
            found.append((attribute, theirs, ours))
        self.name = name
        self._active[name] = self
        self._replaced = [(attribute, theirs, ours, held_by(ours, attribute)) for attribute, theirs, ours in found]
        for attribute, theirs, ours, _ in self._replaced:
            for space in held_by(theirs, attribute):
                space[attribute] = ours

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        for attribute, theirs, ours, before in self._replaced:
            for space in held_by(ours, attribute):
                if not any(space is own for own in before):
                    space[attribute] = theirs
        self._replaced = []
        if self._active.get(self.name) is self:
            del self._active[self.name]

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
