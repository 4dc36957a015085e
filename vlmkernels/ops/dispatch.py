"""Schemas of ops, and direct calls of an op's implementation without torch's dispatcher."""

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any, get_type_hints

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    bool: "bool",
    str: "str",
    list[bool]: "bool[]",
}


def schema(*fields: type, mutates: Collection[str] = ()) -> str:
    """Return the arguments or the results of an operator's schema: the fields of NamedTuples, in order.

    The caller passes the values of these NamedTuples, and the implementation reads them back with ``unpack``, so the arguments
    are listed only once.

    Args:
        fields: NamedTuple classes.
        mutates: names of the tensors that the operator writes to.
    """
    arguments, alias = [], iter("abc")
    for name, kind in ((name, kind) for row in fields for name, kind in get_type_hints(row).items()):
        text = _SCHEMA_TYPES[kind]
        arguments.append(f"{text.replace('Tensor', f'Tensor({next(alias)}!)') if name in mutates else text} {name}")
    return ", ".join(arguments)


def unpack(args: Iterable[Any], *fields: type) -> list[Any]:
    """Return the NamedTuples ``fields`` filled from ``args``, the arguments of an operator with ``schema(*fields)``."""
    values = iter(args)
    return [row(*islice(values, len(row._fields))) for row in fields]  # type: ignore[attr-defined]


def needs_dispatcher(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors must use the registered operator.

    torch.compile, torch.export, fake and meta tensors, functorch transforms, dispatch modes, tensor subclasses and the profiler
    act on the operator. Without any of these, a ``torch.autograd.Function`` that calls the implementation computes the same,
    and skips the dispatcher, whose Python code takes longer than the kernels of a small op.

    The first tensor must not be None. All tensors are on one type of device, except scalars.
    """
    first = tensors[0]
    assert first is not None
    if (
        torch.compiler.is_compiling()  # first: torch.compile cannot trace the other conditions
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or first.is_meta
    ):
        return True
    for x in tensors:  # noqa: SIM110 (a generator expression is slower)
        # The memory of a lazily negated tensor or a symbolic zero does not hold its values.
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor()):
            return True
    return False
