"""``Patch``: replaces functions, methods and registry entries of another library, and restores them.

An integration first checks the installed version (``Library``), then replaces everything or nothing. The patch lasts until
``undo()`` or the end of a ``with`` block, and cannot be applied twice.
"""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

import torch

_ABSENT = object()


def parameters(function: Callable) -> list[tuple]:
    """Return the kind, name and default of each parameter; for a class, of its own __init__, forward and apply."""
    if isinstance(function, type):
        methods = [vars(function).get(name) for name in ("__init__", "forward", "apply")]
        return [row for method in methods if method is not None for row in parameters(method)]
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return parameters(owner.forward)[1:]  # apply takes the parameters of forward after ctx
    function = getattr(function, "__func__", function)  # the function of a staticmethod
    return [(str(p.kind), p.name, p.default) for p in inspect.signature(function).parameters.values()]


@dataclass(frozen=True)
class Library:
    """A library that a patch supports.

    Attributes:
        caller: the name of the function that patches the library, for error messages.
        distribution: the name of the library on PyPI.
        versions: prefixes of the supported versions, in which the replaced functions compute the same as ours.
    """

    caller: str
    distribution: str
    versions: tuple[str, ...]

    def error(self, installed: str, reason: str = "") -> NotImplementedError:
        """Return the error for an installed version that is not supported."""
        supported = " or ".join(f"{version}*" for version in self.versions)
        detail = f": {reason}" if reason else ""
        return NotImplementedError(f"{self.caller} needs {self.distribution} {supported}, got {installed}{detail}")

    def version(self) -> str:
        """Return the installed version.

        Raises:
            ModuleNotFoundError: the library is not installed.
        """
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"{self.caller} needs {self.distribution}, which is not installed") from error

    def check_version(self) -> None:
        """Raise NotImplementedError if the installed version is not among ``versions``."""
        if not (installed := self.version()).startswith(self.versions):
            raise self.error(installed)

    def find_functions(self, replacements: Mapping[str, Callable]) -> list[tuple[Callable, Callable]]:
        """Return pairs of a function or class of the library and ours.

        Args:
            replacements: "module:name" in the library -> our function or class.

        Raises:
            NotImplementedError: the library lacks one of them, or its parameters differ from ours.
        """
        pairs = []
        for place, ours in replacements.items():
            theirs = self._find(place)
            if theirs is None:
                raise self.error(self.version(), f"{place} is missing")
            if parameters(theirs) != parameters(ours):
                raise self.error(self.version(), f"{place} has other parameters")
            pairs.append((theirs, ours))
        return pairs

    def find_registry(self, place: str) -> dict:
        """Return the dict at "module:name".

        Raises:
            NotImplementedError: there is no such dict.
        """
        registry = self._find(place)
        if not isinstance(registry, dict):
            raise self.error(self.version(), f"{place} is missing or not a dict")
        return registry

    def _find(self, place: str) -> object:
        module, attribute = place.split(":")
        return vars(importlib.import_module(module)).get(attribute)


class Patch:
    """Replaces parts of another library until ``undo()`` or the end of a ``with`` block::

        with patch_liger():  # or: patch = patch_liger(); ...; patch.undo()
            ...

    Functions are replaced in every loaded module that holds them, under any name, so that code that imported a function before
    the patch calls ours too. ``undo`` restores the library's functions everywhere except in modules that held ours before the
    patch. Objects created while the patch lasts keep their class.

    Args:
        name: the name of the function that patches. Only one patch of each name can be in effect.
        functions: pairs of a function or class of the library and ours.
        entries: pairs of a dict of the library and the entries to add to it.
        attributes: class of the library -> attributes to set on it. ``undo`` deletes attributes that the class did not have.

    Raises:
        RuntimeError: a patch of this name is in effect. Nothing is replaced.
    """

    active: ClassVar[dict[str, "Patch"]] = {}  # the patches in effect, by name

    def __init__(
        self,
        name: str,
        *,
        functions: Sequence[tuple[Callable, Callable]] = (),
        entries: Sequence[tuple[dict, Mapping]] = (),
        attributes: Mapping[type, Mapping[str, object]] | None = None,
    ) -> None:
        if name in self.active:
            raise RuntimeError(f"{name} must be undone before it is called again, got a second call")
        self.name, self._functions, self._entries = name, functions, entries
        self._kept = {(id(space), key) for space, key in _holders([ours for _, ours in functions])}
        self._attributes = {cls: {key: vars(cls).get(key, _ABSENT) for key in new} for cls, new in (attributes or {}).items()}
        self.active[name] = self
        self._replace({id(theirs): ours for theirs, ours in functions})
        for registry, new in entries:
            registry.update(new)
        for cls, new in (attributes or {}).items():
            for key, value in new.items():
                setattr(cls, key, value)

    def undo(self) -> None:
        """Restore everything. A second call does nothing."""
        if self.active.get(self.name) is not self:
            return
        del self.active[self.name]
        self._replace({id(ours): theirs for theirs, ours in self._functions})
        for registry, new in self._entries:
            for key in new:
                registry.pop(key, None)
        for cls, previous in self._attributes.items():
            for key, value in previous.items():
                if value is _ABSENT:
                    delattr(cls, key)
                else:
                    setattr(cls, key, value)

    def _replace(self, new: dict[int, object]) -> None:
        for space, key in _holders([value for pair in self._functions for value in pair]):
            if id(space[key]) in new and (id(space), key) not in self._kept:
                space[key] = new[id(space[key])]

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()


def _holders(values: list[object]) -> list[tuple[dict, str]]:
    """Return the places that hold one of ``values``: pairs of the namespace of a loaded module and a name in it."""
    wanted = {id(value) for value in values}
    spaces = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    return [(space, name) for space in spaces for name, value in list(space.items()) if id(value) in wanted]
