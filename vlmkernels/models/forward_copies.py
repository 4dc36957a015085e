"""Replace global functions in the ``forward`` of single modules: how this package changes code of transformers.

The layers of transformers call functions such as ``apply_rotary_pos_emb`` and ``causal_conv1d_fn``, globals of the Python
module that defines their class::

    class Attention(nn.Module):                       model.layers[0].attn.forward  (after replace)
        def forward(self, x, ...):          ---->     a copy of the same code in whose globals
            q, k = apply_rotary_pos_emb(...)          "apply_rotary_pos_emb" is another function

``replace`` gives one module a copy of its ``forward`` in which such a global is another function. Classes, Python modules of
transformers and all other models do not change, and ``restore`` removes the copy.
"""

from collections.abc import Collection, Mapping
from types import CellType, FunctionType, MethodType

import torch


def calling(function: object, names: Collection[str], seen: tuple[FunctionType, ...] = ()) -> tuple[FunctionType, ...]:
    """Return ``function``, a function in its closure, and so on to one that uses one of the global ``names``; () if none does.

    A decorator has the function that it wraps in its closure: transformers decorates the ``forward`` of many layers.
    """
    if not isinstance(function, FunctionType) or function in seen:
        return ()
    seen = (*seen, function)
    if set(names) & set(function.__code__.co_names):
        return seen
    return next((path for cell in function.__closure__ or () if (path := calling(_content(cell), names, seen))), ())


def replace(module: torch.nn.Module, replaced: Mapping[str, object], owner: str) -> None:
    """Replace globals in the ``forward`` of one module.

    Args:
        module: a module whose class has a ``forward`` that uses one of the names, see ``calling``.
        replaced: the new values of the globals.
        owner: the name of the Python module that makes the change, for ``restore``.

    Raises:
        NotImplementedError: the module has a ``forward`` of its own that ``owner`` did not set.
    """
    if "forward" in vars(module) and not is_replaced(module, owner):
        raise NotImplementedError(f"model must have the forward of its classes, got another in {type(module).__name__}")
    copied = _with_globals(calling(type(module).forward, replaced), replaced)
    copied.__module__ = owner  # marks the copy
    module.forward = MethodType(copied, module)


def is_replaced(module: torch.nn.Module, owner: str) -> bool:
    """Return whether ``replace`` was called on a module by ``owner``. Pickling loses it, ``copy.deepcopy`` does not."""
    own = vars(module).get("forward")
    return own is not None and own.__module__ == owner


def restore(model: torch.nn.Module, owner: str) -> None:
    """Undo ``replace`` by ``owner`` in all modules of ``model``."""
    for module in model.modules():
        if is_replaced(module, owner):
            del module.forward


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _with_globals(path: tuple[FunctionType, ...], replaced: Mapping[str, object]) -> FunctionType:
    """Return a copy of ``path[0]``, from ``calling``, in which some globals of ``path[-1]`` are replaced."""
    function, *inner = path
    scope, closure, wrapped = function.__globals__, function.__closure__, getattr(function, "__wrapped__", None)
    if inner:
        bound = _with_globals(path[1:], replaced)
        closure = tuple(CellType(bound) if _content(cell) is inner[0] else cell for cell in closure or ())
        wrapped = bound if wrapped is inner[0] else wrapped
    else:
        # torch.compile would find the globals of transformers again by __name__.
        scope = {name: value for name, value in scope.items() if name != "__name__"} | dict(replaced)
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    if wrapped is not None:
        copied.__wrapped__ = wrapped
    return copied
