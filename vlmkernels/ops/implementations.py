"""Ops that libraries serve: which implementation takes a call, and why the others do not. Own kernels: backend.py."""

import importlib
from typing import NamedTuple

import torch

from vlmkernels.ops.checks import require


class Implementations(NamedTuple):
    """Of an op: the module of its folder for each name, loaded on first use, and the order of "auto" on each type of device.

    A module has ``unsupported(query) -> str | None``, the one place that states what it cannot do, and ``run``.
    """

    op: str
    modules: dict[str, str]
    preference: dict[str, tuple[str, ...]]
    otherwise: tuple[str, ...]  # the order on any other device

    def load(self, name: str):
        return importlib.import_module(f"{__package__}.{self.op}.{self.modules[name]}")

    def choose(self, name: str, query: torch.Tensor) -> str:
        """The implementation that serves ``query``; a named one does or raises ``NotImplementedError`` with the reason."""
        rule = f"be auto or one of {', '.join(self.modules)}"
        require(name in ("auto", *self.modules), "implementation", rule, repr(name))
        candidates = self.preference.get(query.device.type, self.otherwise) if name == "auto" else (name,)
        reasons = []
        for candidate in candidates:
            reason = self.load(candidate).unsupported(query)
            if reason is None:
                return candidate
            reasons.append(f"{candidate}: {reason}")
        raise NotImplementedError(f"no implementation serves {self.op}: {'; '.join(reasons)}")
