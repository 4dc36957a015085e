"""Contracts of log-probabilities from logits ("logits/...") and from hidden states and the output head ("hidden/...")."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlmkernels import gather_logps, linear_logps
from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.contract import Case, Violation, close, contract
from vlmkernels.conformance.synthetic import grid, upstream

PAPER = "DeepSeekMath, equation 3 (https://arxiv.org/abs/2402.03300)"
TEMPERATURE = "softmax(z / temperature): Hinton et al., equation 1 (https://arxiv.org/abs/1503.02531)"
HEAD_PRECISION = (
    "autocast computes log_softmax in fp32 (https://docs.pytorch.org/docs/stable/amp.html); MiniMax-M1, which also has the head"
    " in fp32 (https://arxiv.org/abs/2506.13585)"
)
SOFTMAX = "the log-softmax of each row by itself (https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSoftmax.html)"

BUDGET = (
    "2 eps (|z of the target| + max |z| + log V + 1) + V eps(fp32), where z are the logits / temperature"
    " and for hidden states |hidden| |weight| instead of |z|, and H V instead of V"
)
SUFFIXES = {torch.float64: ".double()", torch.float32: "", torch.bfloat16: ".bfloat16()", torch.float16: ".half()"}


@dataclass(frozen=True)
class Problem:
    """The arguments of a call as expressions, which are evaluated for each call and printed in a reproduction."""

    inputs: dict[str, str]  # "logits", or "hidden" and "weight"
    targets: str
    temperature: float = 1.0
    view: str = ""  # what the trainer takes from the first input: "[:, :-1]"

    def tensors(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the inputs, which require gradients, and the targets."""
        names = {"torch": torch, "grid": grid}
        values = [eval(text, names).requires_grad_() for text in self.inputs.values()]
        return values, eval(self.targets, names)

    def viewed(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs of the call."""
        first, *rest = inputs
        return [eval(f"x{self.view}", {"x": first}), *rest]


def move(adapter: Adapter) -> str:
    """Return the method that moves a tensor to the device of the adapter."""
    return "" if adapter.device == "cpu" else f".to({adapter.device!r})"


def to(adapter: Adapter, dtype: torch.dtype) -> str:
    """Return the methods that convert an fp32 tensor on the CPU to ``dtype`` on the device of the adapter."""
    return SUFFIXES.get(dtype, f".to({dtype})") + move(adapter)


class Route(NamedTuple):
    """A method of the adapter, and how to make its arguments."""

    group: str
    method: str
    expected: Callable[..., torch.Tensor]  # the oracle
    problem: Callable[..., Problem]  # (adapter, dtype, B, T, V, temperature, view) -> inputs of these sizes
    literal: Callable[..., Problem]  # (adapter, dtype, rows, targets, temperature) -> B = 1, and these logits


def _logits(adapter: Adapter, dtype: torch.dtype, B: int, T: int, V: int, temperature: float = 1.0, view: str = "") -> Problem:
    return Problem({"logits": f"grid({B}, {T}, {V}){to(adapter, dtype)}"}, _targets(adapter, B, T, V, view), temperature, view)


def _hidden(adapter: Adapter, dtype: torch.dtype, B: int, T: int, V: int, temperature: float = 1.0, view: str = "") -> Problem:
    suffix = to(adapter, dtype)
    inputs = {"hidden": f"grid({B}, {T}, 3){suffix}", "weight": f"grid({V}, 3){suffix}"}
    return Problem(inputs, _targets(adapter, B, T, V, view), temperature, view)


def _targets(adapter: Adapter, B: int, T: int, V: int, view: str) -> str:
    length = T - 1 if view else T
    return f"torch.arange({B * length}).view({B}, {length}).mul(3).add(1).remainder({V}){move(adapter)}"


def _literal_targets(adapter: Adapter, targets: Sequence[int]) -> str:
    return f"torch.tensor([{[*targets]}]){move(adapter)}"


def _literal_logits(
    adapter: Adapter, dtype: torch.dtype, rows: Sequence[Sequence[float]], targets: Sequence[int], temperature: float = 1.0
) -> Problem:
    text = str([[*map(float, row)] for row in rows]).replace("inf", "torch.inf")
    inputs = {"logits": f"torch.tensor([{text}]){to(adapter, dtype)}"}
    return Problem(inputs, _literal_targets(adapter, targets), temperature)


def _literal_hidden(
    adapter: Adapter, dtype: torch.dtype, rows: Sequence[Sequence[float]], targets: Sequence[int], temperature: float = 1.0
) -> Problem:
    """The head is a rotation of the vocabulary, so that these are the logits, exactly."""
    vocab, suffix = len(rows[0]), to(adapter, dtype)
    turned = [[*map(float, row[-1:]), *map(float, row[:-1])] for row in rows]
    inputs = {"hidden": f"torch.tensor([{turned}]){suffix}", "weight": f"torch.eye({vocab}).roll(1, 1){suffix}"}
    return Problem(inputs, _literal_targets(adapter, targets), temperature)


ROUTES = (
    Route("logits", "logps_from_logits", gather_logps, _logits, _literal_logits),
    Route("hidden", "logps_from_hidden", linear_logps, _hidden, _literal_hidden),
)
BY_INPUTS = {("logits",): ROUTES[0], ("hidden", "weight"): ROUTES[1]}


class Answer(NamedTuple):
    """Log-probabilities and the gradients of the inputs: results, the right values, or tolerances."""

    logps: torch.Tensor
    gradients: Sequence[torch.Tensor]


def answer(logps: torch.Tensor, inputs: Sequence[torch.Tensor], gradients: bool) -> Answer:
    return Answer(logps, torch.autograd.grad(logps, inputs, upstream(logps)) if gradients else ())


def given(adapter: Adapter, problem: Problem, gradients: bool = True) -> Answer:
    """Return the results of the adapter."""
    inputs, targets = problem.tensors()
    call = getattr(adapter, BY_INPUTS[(*problem.inputs,)].method)
    return answer(call(*problem.viewed(inputs), targets, problem.temperature), inputs, gradients)


def exact(problem: Problem, gradients: bool = True) -> Answer:
    """Return the right values in fp64."""
    inputs, targets = problem.tensors()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    call = BY_INPUTS[(*problem.inputs,)].expected
    logps = call(*problem.viewed(wide), targets, temperature=problem.temperature, backend="reference")
    return answer(logps, wide, gradients)


class Sizes(NamedTuple):
    """The numbers from which tolerances follow, in fp64."""

    values: list[torch.Tensor]  # the inputs of the call
    z: torch.Tensor  # (B, T, V): the logits / temperature
    error: torch.Tensor  # (B, T): of a log-probability
    targets: torch.Tensor


def sizes(problem: Problem, dtype: torch.dtype) -> Sizes:
    """Return the sizes of a problem, and the errors of log-probabilities that are computed in ``dtype``.

    The errors are those of z = logits / temperature, of z - lse and of the sum of V terms. Each step errs by eps / 2 of its
    result; a factor of two is for another order of operations.
    """
    inputs, targets = problem.tensors()
    values = [x.detach().double() for x in problem.viewed(inputs)]
    terms = 1 if len(values) == 1 else values[0].shape[-1]
    z, absolute = (_head([f(x) for x in values]) / problem.temperature for f in (torch.clone, torch.abs))
    absolute = absolute.masked_fill(absolute.isinf(), 0)
    eps, wide = (torch.finfo(x).eps for x in (dtype, torch.promote_types(dtype, torch.float32)))
    own = absolute.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    vocab = z.shape[-1]
    error = 2 * eps * (own + absolute.amax(-1) + math.log(vocab) + 1) + wide * vocab * terms
    return Sizes(values, z, error, targets)


def _head(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else values[0] @ values[1].T


def gradient_errors(problem: Problem, size: Sizes) -> list[torch.Tensor]:
    """Return the errors of gradients: the chain rule with absolute values.

    The softmax has the error of a log-probability as its relative error; products add the rounding of their results, and sums
    of n terms n eps of fp32.
    """
    inputs, _ = problem.tensors()
    vocab, storage = size.z.shape[-1], torch.finfo(inputs[0].dtype)
    wide = torch.finfo(torch.promote_types(inputs[0].dtype, torch.float32)).eps
    p, onehot = size.z.softmax(-1), torch.nn.functional.one_hot(size.targets, vocab)
    scale = upstream(size.error).abs().unsqueeze(-1) / problem.temperature
    largest = scale * (p + onehot)  # at least |dz|
    dz = scale * p * size.error.unsqueeze(-1) + 2 * storage.eps * largest
    if len(size.values) == 1:
        return [_unviewed(problem, inputs, dz + storage.tiny)]
    hidden, weight = (x.abs().flatten(0, -2) for x in size.values)
    by_hidden = (dz + (2 * storage.eps + wide * vocab) * largest) @ weight
    by_weight = (dz + (2 * storage.eps + wide * len(hidden)) * largest).flatten(0, 1).T @ hidden
    return [_unviewed(problem, inputs, by_hidden + storage.tiny), by_weight + storage.tiny]


def allowed(problem: Problem, dtype: torch.dtype, result: torch.dtype | None = None, gradients: bool = True) -> Answer:
    """Return the errors of a computation in ``dtype`` whose log-probabilities are rounded to ``result`` in the end."""
    size = sizes(problem, dtype)
    rounding = torch.finfo(result).eps / 2 * exact(problem, gradients=False).logps.abs() if result else 0
    return Answer(size.error + rounding, gradient_errors(problem, size) if gradients else ())


def _unviewed(problem: Problem, inputs: Sequence[torch.Tensor], tolerance: torch.Tensor) -> torch.Tensor:
    """Return the tolerances of the whole first input: 0 for the rows that the trainer did not take."""
    out = torch.zeros_like(inputs[0], dtype=torch.float64, requires_grad=False)
    eval(f"x{problem.view}", {"x": out}).copy_(tolerance)
    return out


def compare(problem: Problem, got: Answer, tolerance: Answer) -> None:
    """Compare with the right values: log-probabilities, and the gradients if there are any."""
    right = exact(problem, bool(got.gradients))
    close("log-probabilities", got.logps, right.logps, tolerance.logps)
    for label, *each in zip(problem.inputs, got.gradients, right.gradients, tolerance.gradients, strict=False):
        close(f"gradient of {label}", *each)


def in_dtype(adapter: Adapter, problem: Problem, gradients: bool) -> None:
    """Compare with the tolerance of a computation in the dtype of the inputs."""
    got = given(adapter, problem, gradients)
    compare(problem, got, allowed(problem, problem.tensors()[0][0].dtype, None, gradients))


def in_fp32(adapter: Adapter, problem: Problem, gradients: bool) -> None:
    """Compare with the tolerance of a computation in fp32, whose result may be rounded."""
    got = given(adapter, problem, gradients)
    dtype = torch.promote_types(problem.tensors()[0][0].dtype, torch.float32)
    compare(problem, got, allowed(problem, dtype, got.logps.dtype, gradients))


def script(problem: Problem, gradients: bool = False) -> str:
    """Return the lines of a reproduction."""
    names, temperature = [*problem.inputs], problem.temperature
    viewed = [names[0] + problem.view, *names[1:]]
    wide = [f"{name}.double()" for name in viewed]
    logits = wide[0] if len(wide) == 1 else f"({' @ '.join(wide)}.T)"
    show = 'print("{0}", {0})'
    if gradients:
        show = f'print("{{0}}", {{0}}, *torch.autograd.grad({{0}}, [{", ".join(names)}], upstream({{0}})))'
    lines = [
        *(f"{name} = {text}{'.requires_grad_()' if gradients else ''}" for name, text in problem.inputs.items()),
        f"targets = {problem.targets}",
        f"got = adapter.{BY_INPUTS[(*names,)].method}({', '.join(viewed)}, targets, {temperature})",
        f"expected = ({logits} / {temperature}).log_softmax(-1).gather(-1, targets[..., None])[..., 0]",
        show.format("got"),
        show.format("expected"),
    ]
    return "\n".join(lines)


def both(
    rule: str,
    *,
    source: str,
    tolerance: str,
    cases: Callable[[Route, Adapter], Iterator[Case]],
    reproduce: Callable[..., str] = script,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated check as a contract of each method."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        for route in ROUTES:
            chosen = functools.partial(cases, route)
            label = f"{route.group}/{rule}"
            contract(label, route.method, source=source, tolerance=tolerance, cases=chosen, reproduce=reproduce)(check)
        return check

    return register


ROWS = ((1, -0.5, 2, 0.25), (0.5, 1.5, -1, -2), (-1.5, 0, 0.75, 1.25))
TARGETS = (2, 0, 3)
TEMPERATURES = (1.0, 0.5, 2.0, 0.7)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sixteen_bit(adapter: Adapter) -> list[torch.dtype]:
    return [dtype for dtype in adapter.dtypes if dtype.itemsize == 2]


def temperatures(route: Route, adapter: Adapter) -> Iterator[Case]:
    for dtype in adapter.dtypes:
        for temperature in TEMPERATURES:
            problem = route.literal(adapter, dtype, ROWS, TARGETS, temperature)
            yield Case(f"{name(dtype)}-{temperature}", {"problem": problem})


@both("value", source=f"{PAPER}; {TEMPERATURE}", tolerance=BUDGET, cases=temperatures)
def value(adapter: Adapter, problem: Problem) -> None:
    """A log-probability is that of the target at the same position, from the softmax of logits / temperature."""
    in_dtype(adapter, problem, gradients=False)


@both(
    "gradient",
    source=f"{PAPER}; the gradient by z is onehot(target) - softmax(z)",
    tolerance="the chain rule with absolute values: that of the log-probability as a relative error of the softmax, and 2 eps",
    cases=temperatures,
    reproduce=functools.partial(script, gradients=True),
)
def gradient(adapter: Adapter, problem: Problem) -> None:
    """Gradients of the logits, or of the hidden states and the head, are those of fp64."""
    in_dtype(adapter, problem, gradients=True)


def double(route: Route, adapter: Adapter) -> Iterator[Case]:
    if torch.float64 in adapter.dtypes:
        for temperature in TEMPERATURES:
            yield Case(f"{temperature}", {"problem": route.literal(adapter, torch.float64, ROWS, TARGETS, temperature)})


STEP = 2.0**-12


def slopes(adapter: Adapter, problem: Problem) -> list[torch.Tensor]:
    """Return the central differences of sum(upstream * log-probabilities) of the adapter by each input."""
    call = getattr(adapter, BY_INPUTS[(*problem.inputs,)].method)
    inputs, targets = problem.tensors()

    def total(index: int, changed: torch.Tensor) -> torch.Tensor:
        values = [changed if i == index else x.detach() for i, x in enumerate(inputs)]
        logps = call(*problem.viewed(values), targets, problem.temperature)
        return (logps.detach() * upstream(logps)).sum()

    out = []
    for index, x in enumerate(inputs):
        slope = torch.empty_like(x, requires_grad=False)
        for place in range(x.numel()):
            offset = torch.zeros_like(x, requires_grad=False)
            offset.view(-1)[place] = STEP
            slope.view(-1)[place] = (total(index, x.detach() + offset) - total(index, x.detach() - offset)) / (2 * STEP)
        out.append(slope)
    return out


@both(
    "finite_differences",
    source="central differences of the adapter's own log-probabilities in fp64",
    tolerance="step² |third derivative|, at most sum |upstream| / temperature³; and the error of the log-probabilities / step",
    cases=double,
    reproduce=functools.partial(script, gradients=True),
)
def finite_differences(adapter: Adapter, problem: Problem) -> None:
    """Gradients are the slopes of the log-probabilities, in fp64."""
    got = given(adapter, problem)
    error = allowed(problem, torch.float64)
    weights = upstream(got.logps).abs()
    largest = max(x.detach().abs().max().item() for x in problem.tensors()[0]) if len(problem.inputs) == 2 else 1.0
    truncation = STEP**2 * weights.sum() * (largest / problem.temperature) ** 3
    rounding = (weights * error.logps).sum() / STEP
    for each, slope, own, tolerance in zip(
        problem.inputs, slopes(adapter, problem), got.gradients, error.gradients, strict=True
    ):
        close(f"gradient of {each}", own, slope, truncation + rounding + tolerance)


EXTREMES = {
    "negative": ([(-1e4, -1e4, -1e4, -1e4)], [2]),
    "spread": ([(1e4, -1e4, 0)] * 3, [0, 1, 2]),
    "dominating": ([(0, 100, 0)] * 2, [1, 2]),
    "equal": ([(3, 3, 3, 3, 3)] * 2, [0, 4]),
    "banned": ([(1, -torch.inf, 2, -torch.inf)] * 2, [0, 2]),
}


def extremes(route: Route, adapter: Adapter) -> Iterator[Case]:
    for dtype in adapter.dtypes:
        for label, (rows, targets) in EXTREMES.items():
            if label != "banned" or route.group == "logits":  # no finite head gives -inf
                yield Case(f"{label}-{name(dtype)}", {"problem": route.literal(adapter, dtype, rows, targets, 0.5)})


@both(
    "extreme",
    source="the definition: log-softmax is finite for all targets whose logit is finite",
    tolerance=f"{BUDGET}; eps of fp32 also for 16-bit logits, and the rounding of the result",
    cases=extremes,
    reproduce=functools.partial(script, gradients=True),
)
def extreme(adapter: Adapter, problem: Problem) -> None:
    """Very negative, distant, dominating, equal and banned (-inf) logits give right values and gradients."""
    in_fp32(adapter, problem, gradients=True)


def shapes(sizes: dict[str, tuple[int, int, int]], view: str = "") -> Callable[[Route, Adapter], Iterator[Case]]:
    """Return the cases of problems of these sizes (B, T, V)."""

    def cases(route: Route, adapter: Adapter) -> Iterator[Case]:
        for dtype in adapter.dtypes:
            for label, size in sizes.items():
                yield Case(f"{label}-{name(dtype)}", {"problem": route.problem(adapter, dtype, *size, 0.7, view)})

    return cases


def shaped(rule: str, text: str, sizes: dict[str, tuple[int, int, int]], view: str = "") -> None:
    """Register a contract of values and gradients of problems of these sizes; ``text`` is the rule."""

    def check(adapter: Adapter, problem: Problem) -> None:
        in_dtype(adapter, problem, gradients=True)

    check.__doc__ = text
    reproduce = functools.partial(script, gradients=True)
    both(rule, source=SOFTMAX, tolerance=BUDGET, cases=shapes(sizes, view), reproduce=reproduce)(check)


shaped("vocabulary", "Any size of the vocabulary is right.", {"7": (2, 3, 7), "129": (2, 3, 129), "1000": (2, 3, 1000)})
shaped("strided", "A view such as x[:, :-1], which shifts targets, is right.", {"shifted": (2, 4, 7)}, "[:, :-1]")
shaped("one_token", "A batch of one token is right.", {"one": (1, 1, 5)})
shaped("empty", "Without samples or tokens, the result is empty and gradients are 0.", {"B=0": (0, 3, 5), "T=0": (2, 0, 5)})
shaped("long", "A sequence of 70,000 tokens is right.", {"70000": (1, 70_000, 5)})


def neighbours(route: Route, adapter: Adapter) -> Iterator[Case]:
    for dtype in adapter.dtypes:
        for other in ("1e4", "torch.nan"):
            problem = route.problem(adapter, dtype, 2, 3, 5, 0.7)
            (first, text), *rest = problem.inputs.items()
            changed = f"{text}.index_fill(0, torch.tensor([1]){move(adapter)}, {other})"
            problem = dataclasses.replace(problem, inputs={first: changed, **dict(rest)})
            yield Case(f"{other.removeprefix('torch.')}-{name(dtype)}", {"problem": problem})


@both("independent", source=SOFTMAX, tolerance=BUDGET, cases=neighbours)
def independent(adapter: Adapter, problem: Problem) -> None:
    """The log-probabilities of a sample do not depend on other samples, also if these hold large values or NaN."""
    got = given(adapter, problem, gradients=False)
    error = allowed(problem, problem.tensors()[0][0].dtype, gradients=False)
    close("log-probabilities[0]", got.logps[0], exact(problem, gradients=False).logps[0], error.logps[0])


LARGE = ((20.5, 19.25, 18, 4), (-20.25, -21, -19.5, -30), (25, 25.5, 24.75, 26))


def large(route: Route, adapter: Adapter) -> Iterator[Case]:
    for dtype in sixteen_bit(adapter):
        for temperature in (1.0, 0.7):
            problem = route.literal(adapter, dtype, LARGE, (0, 2, 1), temperature)
            yield Case(f"{name(dtype)}-{temperature}", {"problem": problem})


@both(
    "precision",
    source=HEAD_PRECISION,
    tolerance=f"{BUDGET} with eps of fp32, as the logits are exact in 16 bits; and the rounding of the result to its dtype",
    cases=large,
)
def precision(adapter: Adapter, problem: Problem) -> None:
    """Log-probabilities of 16-bit logits are computed in fp32, also the division by the temperature."""
    in_fp32(adapter, problem, gradients=False)


@both(
    "result_dtype",
    source="|log-probability| eps / 2 is the rounding of a result; a ratio of two of them errs by as much relative to 1",
    tolerance="none",
    cases=large,
)
def result_dtype(adapter: Adapter, problem: Problem) -> None:
    """Log-probabilities of 16-bit logits are returned in fp32, so that ratios of them are not rounded to 16 bits."""
    dtype = given(adapter, problem, gradients=False).logps.dtype
    if dtype.itemsize < 4:
        error = 2 * torch.finfo(dtype).eps
        raise Violation(f"log-probabilities are {dtype}, expected torch.float32 (one of -4 can differ by {error:.0e})")
