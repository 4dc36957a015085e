"""Import a project without the packages that the code under test does not use: clusters, inference engines, CUDA kernels."""

import contextlib
import importlib.machinery
import inspect
import logging
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any


class Placeholder(type):
    """The type of the attributes of a stand-in.

    They can be base classes, annotations and decorators, and have any attributes; they compute nothing.
    """

    def __getattr__(cls, name: str) -> Any:
        return _attribute(f"{cls.__module__}.{cls.__name__}", name)

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "stand_in" not in vars(cls):
            return super().__call__(*args, **kwargs)  # a class of the project, whose base is a placeholder
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else cls  # a decorator without or with arguments


def _attribute(owner: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"{owner}, a stand-in, has no attribute {name}")
    return Placeholder(name, (), {"__module__": owner, "stand_in": True})


class _Finder:
    """Makes the modules of packages that are not installed: ``sys.meta_path`` has it last."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(f"{name}.".startswith(f"{package}.") for package in self.packages):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.made.append(spec.name)
        module = types.ModuleType(spec.name)
        vars(module)["__version__"] = "0"
        vars(module)["__getattr__"] = lambda name: _attribute(spec.name, name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stand_ins(*packages: str) -> Iterator[None]:
    """Within the block, importing any of these packages or their modules gives a stand-in, unless they are installed.

    The project keeps the stand-ins that it imported; ``sys.modules`` is as without them afterwards. Name a package only if the
    code under test does not use it: a stand-in computes nothing.
    """
    finder = _Finder(packages)
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in finder.made:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def restored(*modules: str) -> Iterator[None]:
    """Undo, after the block, what importing a project changes in other packages, in the environment and in the root logger.

    Args:
        modules: the modules and packages in which the project replaces functions, or attributes of classes. They are imported
            before the block.
    """
    for name in modules:
        importlib.import_module(name)
    inside = tuple(f"{name}." for name in modules)
    found = [module for name, module in sys.modules.items() if f"{name}.".startswith(inside) and module is not None]
    classes = {
        value
        for module in found
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    before = [(place, dict(vars(place))) for place in (*found, *classes)]
    environment, handlers = dict(os.environ), [*logging.root.handlers]
    try:
        yield
    finally:
        for place, attributes in before:
            _restore(place, attributes)
        os.environ.clear()
        os.environ.update(environment)
        logging.root.handlers[:] = handlers


def _restore(place: Any, before: dict[str, Any]) -> None:
    """Give a module or a class its attributes again. Added ones stay in modules, where they may be submodules."""
    now = dict(vars(place))
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            setattr(place, name, value)
    for name in now.keys() - before.keys() if inspect.isclass(place) else ():
        delattr(place, name)


_MISSING = object()
