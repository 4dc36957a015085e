"""Contracts of adapters themselves: what the suite assumes of each method."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vlmkernels.conformance.adapter import METHODS, Adapter
from vlmkernels.conformance.batches import AdvantageBatch, LossBatch, Sample
from vlmkernels.conformance.contract import Case, Violation, contract
from vlmkernels.conformance.guard import tensors
from vlmkernels.conformance.models import encode, tiny
from vlmkernels.conformance.synthetic import grid
from vlmkernels.ops.grpo_loss import GRPOLossConfig

SOURCE = "the interface of the suite: vlmkernels.conformance.Adapter"


def first(values: Sequence[str], default: str) -> str:
    """Return the first value that an adapter declares; ``default`` if it declares none."""
    return next(iter(values), default)


def advantages(adapter: Adapter, to: str) -> str:
    options = f"scale={first(adapter.scales, 'group')!r}, baseline={first(adapter.baselines, 'mean')!r}"
    return f"AdvantageBatch(torch.tensor([[1.0], [0.0], [0.5], [3.0]]){to}, (4,), {options})"


def loss(adapter: Adapter, to: str) -> str:
    values = {
        "logps": "[[-1.0, -2.0, -0.5], [-1.5, -0.75, -3.0]]",
        "advantages": "[1.0, -0.5]",
        "loss_mask": "[[True, True, True], [True, True, False]]",
        "old_logps": "[[-1.25, -1.5, -0.75], [-1.0, -1.0, -2.0]]",
    }
    texts = [f"{name}=torch.tensor({value}){to}" for name, value in values.items()]
    texts[0] += ".requires_grad_()"
    level = f"importance_sampling_level={first(adapter.levels, 'token')!r}"
    config = f"GRPOLossConfig(loss_type={first(adapter.loss_types, 'grpo')!r}, {level}, max_completion_length=3)"
    return f"LossBatch({', '.join(texts)}), {config}"


def logps_from_logits(adapter: Adapter, to: str) -> str:
    return f"grid(2, 3, 5){to}.requires_grad_(), torch.tensor([[0, 4, 1], [2, 2, 3]]){to}, 0.5"


def logps_from_hidden(adapter: Adapter, to: str) -> str:
    inputs = f"grid(2, 3, 4){to}.requires_grad_(), grid(5, 4){to}.requires_grad_()"
    return f"{inputs}, torch.tensor([[0, 4, 1], [2, 2, 3]]){to}, 0.5"


def kind(adapter: Adapter) -> str:
    return first(adapter.models, "text")


def model(adapter: Adapter, to: str) -> str:
    return f"tiny({kind(adapter)!r})[0]{to}"


def processor(adapter: Adapter) -> str:
    return f"tiny({kind(adapter)!r})[1]"


def samples(adapter: Adapter) -> str:
    images = "" if kind(adapter) == "text" else ", images=((0, 28, 28),)"
    return f"[Sample('ab'{images}, completion_ids=(65, 66, 67)), Sample('abcd'{images}, completion_ids=(68,))]"


def inputs(adapter: Adapter, to: str) -> str:
    encoded = f"encode({processor(adapter)}, {samples(adapter)})"
    return f"{{name: x{to} for name, x in {encoded}.items()}}" if to else encoded


# The arguments of a call of each method, as code.
ARGUMENTS: dict[str, Callable[[Adapter, str], str]] = {
    "advantages": advantages,
    "loss": loss,
    "logps_from_logits": logps_from_logits,
    "logps_from_hidden": logps_from_hidden,
    "logps": lambda adapter, to: f"{model(adapter, to)}, {processor(adapter)}, {samples(adapter)}, 0.5",
    "split": lambda adapter, to: f"{inputs(adapter, to)}, {[int(kind(adapter) != 'text')] * 2}, 2",
    "positions": lambda adapter, to: f"{model(adapter, to)}, {inputs(adapter, to)}",
    "process": lambda adapter, to: f"{processor(adapter)}, {samples(adapter)}",
    "sample": lambda adapter, to: f"{model(adapter, to)}, {processor(adapter)}, {samples(adapter)}, 2, 4, 1.0",
}


NAMES = {"torch": torch, "encode": encode, "grid": grid, "tiny": tiny} | {
    each.__name__: each for each in (AdvantageBatch, GRPOLossConfig, LossBatch, Sample)
}


def evaluate(arguments: str) -> tuple[Any, ...]:
    """Return new arguments."""
    return eval(f"({arguments},)", dict(NAMES))


def cases(adapter: Adapter, methods: tuple[str, ...] = METHODS) -> Iterator[Case]:
    to = "" if adapter.device == "cpu" else f".to({adapter.device!r})"
    for method in methods:
        yield Case(method, {"method": method, "arguments": ARGUMENTS[method](adapter, to)}, method)


def repeatable(adapter: Adapter) -> Iterator[Case]:
    yield from cases(adapter, tuple(method for method in METHODS if method != "sample"))


def script(method: str, arguments: str) -> str:
    return f"""\
for name in ("got", "expected the same"):
    print(name, adapter.{method}({arguments}))"""


def state(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the weights of the models among the arguments."""
    return [x for each in arguments if isinstance(each, torch.nn.Module) for x in each.state_dict().values()]


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    )


@contract("adapter/inputs", "", source=SOURCE, tolerance="none: the bits are equal", cases=cases, reproduce=script)
def unchanged(adapter: Adapter, method: str, arguments: str) -> None:
    """A method does not change its arguments: tensors (every call checks them), weights, or the mode of a model."""
    given = evaluate(arguments)
    before = [x.clone() for x in state(given)]
    modes = [each.training for each in given if isinstance(each, torch.nn.Module)]
    getattr(adapter, method)(*given)
    if not all(map(same, before, state(given))):
        raise Violation(f"{method} changed the weights of the model")
    if modes != [each.training for each in given if isinstance(each, torch.nn.Module)]:
        raise Violation(f"{method} changed model.training")


@contract("adapter/returns", "", source=SOURCE, tolerance="none", cases=cases, reproduce=script)
def returns(adapter: Adapter, method: str, arguments: str) -> None:
    """A method returns the documented type, shape and dtype (every call checks them), with gradients by its arguments."""
    given = evaluate(arguments)
    out = getattr(adapter, method)(*given)
    leaves = [x for x in tensors(given) if x.requires_grad]
    if not leaves:
        return
    gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        if gradient is None:
            raise Violation(f"{method} returned a tensor without a gradient by argument {index}, of shape {tuple(leaf.shape)}")


@contract("adapter/deterministic", "", source=SOURCE, tolerance="none: the bits are equal", cases=repeatable, reproduce=script)
def deterministic(adapter: Adapter, method: str, arguments: str) -> None:
    """A method returns the same values if it is called again with the same arguments."""
    first, second = ([*tensors(getattr(adapter, method)(*evaluate(arguments)))] for _ in range(2))
    if len(first) != len(second):
        raise Violation(f"{method} returned {len(first)} tensors, then {len(second)}")
    for x, y in zip(first, second, strict=True):
        if not same(x, y):
            raise Violation(f"{method} returned {x.tolist()}, then {y.tolist()} for the same arguments")
