"""Log-probabilities of completions that a trainer computes by running the model.

The right values are those of the same model on each sample alone, without padding, in fp64. ``rounding`` is the tolerance.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.alone import chosen_logps, double, exact, gradients, logits_alone, logps_alone, train
from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.contract import Case, Violation, close, contract
from vlmkernels.conformance.models import END_OF_TEXT, END_OF_TURN, tiny, token_ids
from vlmkernels.conformance.pixels import pixel_gradients

MODEL = "The model itself: a padded batch is an implementation of its samples"
ROUNDING = "eps of the dtype, times the layers with weights, times the largest |logit| / temperature"

SHORT, LONG, MORE = "hi", "what do you see in this picture", "and now"
END, PADDING = token_ids(END_OF_TURN, END_OF_TEXT)  # which a model may sample, and which may follow in further turns
TEXTS = (Sample(SHORT, (), (65, 66, 67)), Sample(LONG, (), (68, 69)), Sample(MORE, (), (70, 71, 72, 73, 74)))
BATCHES: dict[str, tuple[Sample, ...]] = {
    "one-token": (Sample(SHORT, (), (65,)),),
    "one": TEXTS[:1],
    "texts": TEXTS,
    "shared-prompt": (
        Sample(LONG, (), (65, 66, 67)),
        Sample(LONG, (), (68,)),
        Sample(SHORT, (), (69,)),
        Sample(SHORT, (), (70, 71)),
    ),
    "special-tokens": (
        Sample(SHORT, (), (65, PADDING, 66, PADDING)),
        Sample(LONG, (), (67, END, 68, END)),
        Sample(MORE, (), (69,)),
    ),
}
IMAGE_BATCHES: dict[str, tuple[Sample, ...]] = {
    "image": (Sample(SHORT, ((1, 28, 56),), (65, 66)),),
    "images": (
        Sample(SHORT, ((1, 28, 28),), (65, 66, 67)),
        Sample(LONG, ((2, 56, 56),), (68, 69)),
        Sample(MORE, ((3, 56, 28),), (70,)),
    ),
    "several-images": (
        Sample(SHORT, ((1, 28, 28), (2, 56, 56)), (65, 66)),
        Sample(LONG, ((3, 28, 56),), (67, 68, 69)),
        Sample(MORE, ((4, 56, 28), (5, 28, 28), (6, 28, 28)), (70,)),
    ),
    "mixed": (
        Sample(LONG, (), (65, 66)),
        Sample(SHORT, ((1, 28, 28),), (67, 68, 69)),
        Sample(SHORT, (), (70,)),
        Sample(MORE, ((2, 56, 28), (3, 28, 56)), (71, 72)),
    ),
    "equal-texts": (
        Sample(SHORT, ((1, 28, 28),), (65, 66, 67)),
        Sample(SHORT, ((2, 28, 28),), (68, 69)),
        Sample(SHORT, ((1, 28, 28),), (70, 71)),
    ),
    "shared-images": (
        Sample(MORE, ((1, 28, 28), (2, 56, 28)), (65, 66, 67)),
        Sample(MORE, ((1, 28, 28), (2, 56, 28)), (68,)),
        Sample(SHORT, ((3, 56, 56),), (69,)),
        Sample(SHORT, ((3, 56, 56),), (70, 71)),
    ),
}


def batches_of(kind: str) -> Mapping[str, tuple[Sample, ...]]:
    """Return the batches for a kind of models by name."""
    return BATCHES if kind == "text" else BATCHES | IMAGE_BATCHES


class Expected(NamedTuple):
    """The right log-probabilities of a batch, and what a tolerance depends on."""

    logps: list[torch.Tensor]
    layers: int
    logit: float  # the largest, absolute, divided by the temperature

    def rounding(self, adapter: Adapter) -> float:
        """The error of a log-probability by rounding.

        Each layer with weights rounds its output to a relative error of eps. Layers of gain 1, as those of ``tiny``, pass
        it on, so that the logits have that of all layers.
        """
        return eps(adapter) * self.layers * self.logit


def eps(adapter: Adapter) -> float:
    """The precision of the most precise dtype in which a trainer computes log-probabilities, at most that of the models."""
    return max(min(torch.finfo(dtype).eps for dtype in adapter.dtypes), torch.finfo(torch.float32).eps)


@cache
def expected(kind: str, samples: tuple[Sample, ...], temperature: float, trained: bool = False) -> Expected:
    """Return the right values for ``tiny(kind)``; trained: after ``train``."""
    model, processor = exact(kind)
    model = double(train(tiny(kind)[0])) if trained else model
    layers = sum(getattr(module, "weight", torch.empty(0)).dim() > 1 for module in model.modules())
    with torch.no_grad():
        logits = [logits_alone(model, processor, sample) for sample in samples]
    logps = [chosen_logps(rows, sample, temperature) for rows, sample in zip(logits, samples, strict=True)]
    return Expected(logps, layers, max(float(rows.abs().max()) for rows in logits) / temperature)


def compare(adapter: Adapter, got: Sequence[torch.Tensor], right: Expected) -> None:
    """Raise ``Violation`` unless the log-probabilities of all samples are right within rounding."""
    for index, (row, other) in enumerate(zip(got, right.logps, strict=True)):
        close(f"logps of sample {index}", row, other, right.rounding(adapter))


def script(kind: str, samples: Sequence[Sample], temperature: float = 1.0) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
print("got", adapter.logps(model, processor, samples, {temperature}))
print("expected", logps_alone(double(tiny("{kind}")[0]), processor, samples, {temperature}))"""


def cases(adapter: Adapter, *names: str) -> Iterator[Case]:
    """Yield the batches with these names, by default all, for each kind of models that the adapter declares."""
    for kind in adapter.models:
        for name, samples in batches_of(kind).items():
            if not names or name in names:
                yield Case(f"{kind}-{name}", {"kind": kind, "samples": samples})


def value_cases(adapter: Adapter) -> Iterator[Case]:
    for case in cases(adapter):
        yield Case(case.id, {**case.arguments, "temperature": 1.0})
    for case in cases(adapter, "texts", "images"):
        yield Case(f"{case.id}-temperature", {**case.arguments, "temperature": 0.5})


@contract("logps/value", "logps", source=MODEL, tolerance=ROUNDING, cases=value_cases, reproduce=script)
def value(adapter: Adapter, kind: str, samples: tuple[Sample, ...], temperature: float) -> None:
    """Log-probabilities of completions are those of the model on each sample alone, at the temperature."""
    got = adapter.logps(*tiny(kind, adapter.device), samples, temperature)
    compare(adapter, got, expected(kind, samples, temperature))


def batch_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "texts", "images", "several-images", "mixed")


def batch_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
print("got", adapter.logps(model, processor, samples, 1.0))
print("expected", [adapter.logps(model, processor, [sample], 1.0)[0] for sample in samples])"""


@contract("logps/batch", "logps", source=MODEL, tolerance=f"2 {ROUNDING}", cases=batch_cases, reproduce=batch_script)
def batch(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """The log-probabilities of a sample do not depend on the other samples of its batch."""
    model, processor = tiny(kind, adapter.device)
    rounding = 2 * expected(kind, samples, 1.0).rounding(adapter)
    got = adapter.logps(model, processor, samples, 1.0)
    for index, sample in enumerate(samples):
        (other,) = adapter.logps(model, processor, [sample], 1.0)
        close(f"logps of sample {index} in the batch, compared with those of the sample alone,", got[index], other, rounding)


def order_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
print("got", adapter.logps(model, processor, samples[::-1], 1.0)[::-1])
print("expected", adapter.logps(model, processor, samples, 1.0))"""


@contract("logps/order", "logps", source=MODEL, tolerance=f"2 {ROUNDING}", cases=batch_cases, reproduce=order_script)
def order(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """Results are in the order of the samples, and do not depend on it."""
    model, processor = tiny(kind, adapter.device)
    rounding = 2 * expected(kind, samples, 1.0).rounding(adapter)
    got = adapter.logps(model, processor, samples[::-1], 1.0)[::-1]
    for index, (row, other) in enumerate(zip(got, adapter.logps(model, processor, samples, 1.0), strict=True)):
        close(f"logps of sample {index} in reversed order", row, other, rounding)


def train_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "texts", "images")


def train_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
before = adapter.logps(model, processor, samples, 1.0)
print("got", adapter.logps(train(model), processor, samples, 1.0))
print("expected", logps_alone(double(train(tiny("{kind}")[0])), processor, samples, 1.0))"""


@contract("logps/trained", "logps", source=MODEL, tolerance=ROUNDING, cases=train_cases, reproduce=train_script)
def trained(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """After a step of the optimizer, log-probabilities are those of the new weights, also of the head and the vision tower."""
    model, processor = tiny(kind, adapter.device)
    adapter.logps(model, processor, samples, 1.0)
    compare(adapter, adapter.logps(train(model), processor, samples, 1.0), expected(kind, samples, 1.0, trained=True))


def exchange_cases(adapter: Adapter) -> Iterator[Case]:
    """Yield pairs of samples that differ in their images only."""
    pairs = {
        "other": (((1, 28, 28),), ((2, 28, 28),)),
        "swapped": (((1, 28, 28), (2, 28, 28)), ((2, 28, 28), (1, 28, 28))),
        "swapped-sizes": (((1, 28, 56), (2, 56, 56)), ((2, 56, 56), (1, 28, 56))),
    }
    for kind in adapter.models:
        for name, pair in pairs.items() if kind != "text" else ():
            samples = tuple(Sample(SHORT, images, (65, 66, 67)) for images in pair)
            yield Case(f"{kind}-{name}", {"kind": kind, "samples": samples})


@contract("logps/image", "logps", source=MODEL, tolerance=f"2 {ROUNDING}", cases=exchange_cases, reproduce=script)
def image(adapter: Adapter, kind: str, samples: tuple[Sample, Sample]) -> None:
    """Log-probabilities change with the image, and with the order of two images, by as much as those of the model."""
    model, processor = tiny(kind, adapter.device)
    one, other = (adapter.logps(model, processor, [sample], 1.0)[0].detach().double().cpu() for sample in samples)
    right = expected(kind, samples, 1.0)
    if torch.equal(one, other):
        raise Violation(f"the log-probabilities are {one.tolist()} for both {samples[0].images} and {samples[1].images}")
    close("the change of the log-probabilities", other - one, right.logps[1] - right.logps[0], 2 * right.rounding(adapter))


def pixel_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "image", "images", "several-images", "mixed")


def pixel_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
print("got", pixel_gradients(adapter, model, processor, samples))
print("expected not 0:", [[i == j and bool(x.images) for j in range({len(samples)})] for i, x in enumerate(samples)])"""


@contract(
    "logps/pixels",
    "logps",
    source=MODEL,
    tolerance="0 for the pixels of other samples",
    cases=pixel_cases,
    reproduce=pixel_script,
)
def pixels(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """Log-probabilities have a gradient by the pixels of their own sample, and none by those of other samples."""
    model, processor = tiny(kind, adapter.device)
    norms = pixel_gradients(adapter, model, processor, samples)
    for row, sample in enumerate(samples):
        for column in range(len(samples)):
            norm, wanted = float(norms[row, column]), bool(sample.images) and row == column
            if (norm > 0) != wanted:
                rule = "not be 0" if wanted else "be 0"
                raise Violation(
                    f"the gradient of the log-probabilities of sample {row} by the pixels of sample {column} must {rule},"
                    f" its norm is {norm:.3g}"
                )


def gradient_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "one", "texts", "shared-prompt", "images", "mixed", "shared-images")


def gradient_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
right = gradients(exact := double(model), logps_alone(exact, processor, samples, 1.0))
got = gradients(model, adapter.logps(model, processor, samples, 1.0))
print("got norms of", {{name: round(float(x.norm()), 4) for name, x in got.items()}})
print("expected norms of", {{name: round(float(x.norm()), 4) for name, x in right.items()}})
print("differences", {{name: float((got[name] - x).norm()) for name, x in right.items() if name in got}})"""


@contract(
    "logps/gradient",
    "logps",
    source=MODEL,
    tolerance="3 eps of the dtype (a layer has three products: forward, by inputs, by weights), times the layers with weights,"
    " times the norm of the gradient of the part of the model",
    cases=gradient_cases,
    reproduce=gradient_script,
)
def gradient(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """The gradient of log-probabilities by the parameters is the sum of those of the samples alone."""
    model, processor = tiny(kind, adapter.device)
    right = gradients(exact(kind)[0], logps_alone(*exact(kind), samples, 1.0))
    got = gradients(model, adapter.logps(model, processor, samples, 1.0))
    norms: dict[str, float] = {}  # of the vision tower, of the text model, ...
    for name, x in right.items():
        part = ".".join(name.split(".")[:2])
        norms[part] = (norms.get(part, 0.0) ** 2 + float(x.norm()) ** 2) ** 0.5
    layers = expected(kind, samples, 1.0).layers
    for name, x in right.items():
        tolerance = 3 * eps(adapter) * layers * norms[".".join(name.split(".")[:2])]
        close(f"the gradient by {name}", got.get(name, torch.zeros_like(x)), x, tolerance)
