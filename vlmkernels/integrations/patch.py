"""Functions of other libraries replaced where they stand, and put back."""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from vlmkernels.ops.checks import require


def parameters(function: Callable) -> list[tuple]:
    """What a caller may pass: kind, name and default of each parameter; of a class, those of the methods it defines itself."""
    if isinstance(function, type):
        methods = [vars(function).get(name) for name in ("__init__", "forward", "apply")]
        return [row for method in methods if method is not None for row in parameters(method)]
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return parameters(owner.forward)[1:]  # its apply takes what forward takes after ctx
    function = getattr(function, "__func__", function)  # of a staticmethod
    return [(str(p.kind), p.name, p.default) for p in inspect.signature(function).parameters.values()]


def places_of(values: list[object]) -> list[tuple[dict, str]]:
    """Where loaded modules hold one of ``values``, under whatever name: their namespaces, and the names."""
    wanted = {id(value) for value in values}
    spaces = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    return [(space, name) for space in spaces for name, value in list(space.items()) if id(value) in wanted]


class Patch:
    """Replaces functions in every loaded module that holds them, until ``undo()`` or the end of a ``with`` block.

    Whoever imported a function before, or imports it from the library later, gets ours; afterwards everyone has the library's
    again, except what held ours before. An object made of a replaced class stays what it is.

    Args:
        name: of the call that makes it, for errors.
        library: the distribution patched, for errors.
        versions: those whose functions are known to mean what ours do, as prefixes.
        replacements: "module:name" -> our function or class, which takes the same parameters.
        entries: "module:name" of a dict -> what to add to it.

    Raises:
        ModuleNotFoundError: the library is not installed.
        RuntimeError: it is patched already, or it is of another version, or a function is not there or has other parameters.
            Nothing has been replaced then.
    """

    _active: ClassVar[dict[str, "Patch"]] = {}

    def __init__(
        self,
        name: str,
        library: str,
        versions: tuple[str, ...],
        replacements: Mapping[str, Callable],
        entries: Mapping[str, Mapping] | None = None,
    ) -> None:
        require(name not in self._active, name, "be undone before it is called again", "a second call", RuntimeError)
        try:
            installed = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"{name} needs {library}, which is not installed") from error
        rule = f"be given {library} {' or '.join(v + '*' for v in versions)}"
        require(installed.startswith(versions), name, rule, installed, RuntimeError)
        pairs, self._entries = [], []
        for place, ours in (*replacements.items(), *(entries or {}).items()):
            module, attribute = place.split(":")
            theirs = vars(importlib.import_module(module)).get(attribute)
            if place in replacements:
                same = theirs is not None and parameters(theirs) == parameters(ours)
                pairs.append((theirs, ours))
            else:
                same = isinstance(theirs, dict)
                self._entries.append((theirs, ours))
            require(same, name, f"find {place} as in {library} {versions[0]}*", f"{theirs} of {installed}", RuntimeError)
        self.name, self._pairs = name, pairs
        self._own = {(id(space), key) for space, key in places_of([ours for _, ours in pairs])}
        self._active[name] = self
        self._replace({id(theirs): ours for theirs, ours in pairs})
        for registry, ours in self._entries:
            registry.update(ours)

    def _replace(self, new: dict[int, object]) -> None:
        for space, key in places_of([value for pair in self._pairs for value in pair]):
            if id(space[key]) in new and (id(space), key) not in self._own:
                space[key] = new[id(space[key])]

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        if self._active.get(self.name) is not self:
            return
        del self._active[self.name]
        self._replace({id(ours): theirs for theirs, ours in self._pairs})
        for registry, ours in self._entries:
            for key in ours:
                registry.pop(key, None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
