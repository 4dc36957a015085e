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


def load_all(source: str) -> list[Adapter]:
    """Return the adapters in a file, or in the module of this package with this name; "source:Class" selects one class.

    Raises:
        FileNotFoundError: there is neither a file nor an adapter with this name.
        ImportError: the file cannot be imported.
        TypeError: it defines no adapter, or an adapter breaks a rule of ``Adapter``.
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
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ImportError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    classes = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Adapter) and value.__module__ == name and not key.startswith("_")
    ]
    chosen = [each for each in classes if not wanted or each.__name__ == wanted]
    if not chosen:
        raise TypeError(f"{path} must define a subclass of vlmkernels.conformance.Adapter{wanted and f' named {wanted}'}")
    return [_instance(each, source if len(classes) == 1 else f"{source}:{each.__name__}") for each in chosen]


def load(source: str) -> Adapter:
    """Return the only adapter of a file or name; see ``load_all``.

    Raises:
        TypeError: it defines several.
    """
    adapters = load_all(source)
    if len(adapters) > 1:
        raise TypeError(f"{source} defines {', '.join(type(each).__name__ for each in adapters)}: select one by {source}:CLASS")
    return adapters[0]


def _instance(cls: type[Adapter], source: str) -> Adapter:
    if not isinstance(getattr(cls, "name", None), str):
        raise TypeError(f"{cls.__name__}.name must be a string, got {getattr(cls, 'name', None)!r}")
    for attribute, allowed in DECLARATIONS.items():
        values = getattr(cls, attribute)
        if not isinstance(values, tuple | list) or not set(values) <= {*allowed}:
            raise TypeError(f"{cls.__name__}.{attribute} must be a tuple of some of {', '.join(allowed)}; got {values!r}")
    for method in METHODS:
        expected = inspect.signature(getattr(Adapter, method))
        given = inspect.signature(getattr(cls, method))
        if len(given.parameters) != len(expected.parameters):
            raise TypeError(f"{cls.__name__}.{method} must have the parameters {expected}, got {given}")
    adapter = cls()
    adapter.source = source
    return adapter
