"""Find adapters: those of this package by name, and others by file."""

import importlib.util
import inspect
import sys
from pathlib import Path

from vlmkernels.conformance.adapter import METHODS, Adapter
from vlmkernels.conformance.models import KINDS
from vlmkernels.ops.group_advantages import BASELINES, SCALES
from vlmkernels.ops.grpo_loss.config import CORRECTIONS, KL_ESTIMATORS, LEVELS, LOSSES

# The attributes of an adapter that are tuples of names.
DECLARATIONS = {
    "loss_types": (*LOSSES,),
    "levels": LEVELS,
    "kl_estimators": KL_ESTIMATORS,
    "corrections": CORRECTIONS,
    "masks": ("padding", "holes", "nonfinite"),
    "scales": SCALES,
    "baselines": BASELINES,
    "models": KINDS,
}
BUILT_IN = Path(__file__).parent / "adapters"


def names() -> list[str]:
    """Return the names of the adapters in this package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.py") if not path.stem.startswith("_"))


def find(source: str) -> dict[str, type[Adapter]]:
    """Return the classes in a file, or in the module of this package with this name, by what ``load`` finds each by.

    Args:
        source: "source:Class" selects one class. The folder of a file is appended to ``sys.path``, for modules beside it.

    Raises:
        FileNotFoundError: there is neither a file nor an adapter with this name.
        ImportError: the file cannot be imported.
        TypeError: it defines no adapter.
    """
    source, _, wanted = source.partition(":")
    path = BUILT_IN / f"{source}.py" if source in names() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"conformance must name a file or one of {', '.join(names())}; got {source!r}")
    name = f"vlmkernels_conformance_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if path.parent != BUILT_IN and (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit and pytest.skip
        raise ImportError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    classes = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Adapter) and value.__module__ == name and not key.startswith("_")
    ]
    chosen = [each for each in classes if not wanted or each.__name__ == wanted]
    if not chosen:
        raise TypeError(f"{path} must define a subclass of vlmkernels.conformance.Adapter{wanted and f' named {wanted}'}")
    return {source if len(classes) == 1 else f"{source}:{each.__name__}": each for each in chosen}


def load_all(source: str) -> list[Adapter]:
    """Return the adapters in a file, or in the module of this package with this name; see ``find``.

    Raises:
        TypeError: an adapter breaks a rule of ``Adapter``.
    """
    return [create(each, name) for name, each in find(source).items()]


def load(source: str) -> Adapter:
    """Return the only adapter of a file or name; see ``load_all``.

    Raises:
        TypeError: it defines several.
    """
    adapters = load_all(source)
    if len(adapters) > 1:
        raise TypeError(f"{source} defines {', '.join(type(each).__name__ for each in adapters)}: select one by {source}:CLASS")
    return adapters[0]


def create(cls: type[Adapter], source: str) -> Adapter:
    """Return an adapter that ``load(source)`` finds.

    Raises:
        TypeError: it breaks a rule of ``Adapter``, or its constructor raises an error.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise TypeError(f"{cls.__name__}.name must be a string of one line, got {name!r}")
    if isinstance(cls.packages, str):
        raise TypeError(f"{cls.__name__}.packages must be a tuple of names, got {cls.packages!r}")
    for attribute, allowed in DECLARATIONS.items():
        values = getattr(cls, attribute)
        if not isinstance(values, tuple | list) or not set(values) <= {*allowed}:
            raise TypeError(f"{cls.__name__}.{attribute} must be a tuple of some of {', '.join(allowed)}; got {values!r}")
    try:
        adapter = cls()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TypeError(f"{cls.__name__}() must return an adapter, it raises {type(error).__name__}: {error}") from error
    adapter.source = source
    for method in filter(cls.has, METHODS):
        expected = inspect.signature(getattr(Adapter, method))
        given = inspect.signature(getattr(adapter, method))
        _, *parameters = expected.parameters
        try:
            given.bind(*parameters)
        except TypeError:
            raise TypeError(f"{cls.__name__}.{method} must have the parameters {expected}, got {given}") from None
    return adapter
