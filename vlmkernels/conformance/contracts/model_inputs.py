"""The inputs of a model: those that a trainer makes from prompts and images, its micro-batches, and its position ids."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.alone import exact, last_logps, positions_alone
from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.contract import Case, Violation, close, contract
from vlmkernels.conformance.contracts.model import ROUNDING, cases, expected
from vlmkernels.conformance.models import PLACEHOLDER, encode, tiny, token_ids

PROCESSOR = "The processor of the model (https://huggingface.co/docs/transformers/main/processors)"
ROPE_INDEX = "get_rope_index of the model; Qwen2-VL, section 2.1 (https://arxiv.org/abs/2409.12191)"
EXACT = "0 for integers; 4 eps of fp32 times the largest value for pixels, which are scaled, shifted and divided"
IMAGES = ("pixel_values", "image_grid_thw")  # inputs with rows of images


def attended_ids(inputs: Mapping[str, torch.Tensor]) -> list[list[int]]:
    """Return the tokens of each row without padding."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def rounding(pixels: torch.Tensor) -> float:
    """The difference by rounding of pixels that are scaled, shifted and divided in another order."""
    return 4 * torch.finfo(torch.float32).eps * float(pixels.abs().max()) if pixels.is_floating_point() else 0.0


def each_alone(kind: str, samples: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of each prompt."""
    return [encode(exact(kind)[1], [sample]) for sample in samples]


def check_tokens(where: str, inputs: Mapping[str, torch.Tensor], alone: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise ``Violation`` unless a batch has the tokens of its samples, with padding of any kind and width.

    Args:
        where: follows the name of an input in the message.
        alone: the inputs of each sample.
    """
    got, right = attended_ids(inputs), [attended_ids(each)[0] for each in alone]
    if len(got) != len(right):
        raise Violation(f"input_ids{where} has {len(got)} rows, expected {len(right)}")
    for row, (ids, other) in enumerate(zip(got, right, strict=True)):
        if ids != other:
            raise Violation(f"input_ids{where} has in row {row}, without padding, {ids}, expected {other}")


def check_images(where: str, inputs: Mapping[str, torch.Tensor], alone: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Raise ``Violation`` unless a batch has the rows of images of its samples, in order. See ``check_tokens``."""
    for name in IMAGES:
        parts = [each[name] for each in alone if name in each]
        rows = inputs.get(name)
        if parts and rows is None:
            raise Violation(f"{name}{where} is missing, expected {sum(map(len, parts))} rows")
        if parts:
            right = torch.cat(parts)
            close(f"{name}{where}", rows, right, rounding(right))
        elif rows is not None and len(rows):
            raise Violation(f"{name}{where} has {len(rows)} rows, expected none, because no sample has an image")


def process_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "one", "texts", "image", "images", "several-images", "mixed")


def process_script(kind: str, samples: Sequence[Sample]) -> str:
    return f"""\
_, processor = tiny("{kind}")
samples = {list(samples)!r}
print("got", adapter.process(processor, samples))
print("expected, without padding", [encode(processor, [sample]) for sample in samples])"""


@contract("process/tokens", "process", source=PROCESSOR, tolerance=EXACT, cases=process_cases, reproduce=process_script)
def tokens(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """The tokens of a batch of prompts are those of the processor for each prompt alone, in order."""
    check_tokens("", adapter.process(tiny(kind)[1], samples), each_alone(kind, samples))


def process_image_cases(adapter: Adapter) -> Iterator[Case]:
    return cases(adapter, "image", "images", "several-images", "mixed")


@contract("process/images", "process", source=PROCESSOR, tolerance=EXACT, cases=process_image_cases, reproduce=process_script)
def images(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """The images of a batch of prompts are those of the processor for each prompt alone, in order."""
    check_images("", adapter.process(tiny(kind)[1], samples), each_alone(kind, samples))


@contract(
    "process/placeholders",
    "process",
    source=PROCESSOR,
    tolerance=EXACT,
    cases=process_image_cases,
    reproduce=process_script,
)
def placeholders(adapter: Adapter, kind: str, samples: tuple[Sample, ...]) -> None:
    """Each prompt has as many image tokens as its images have features, so that features fall on their own sample."""
    inputs = adapter.process(tiny(kind)[1], samples)
    counts = (inputs["input_ids"] == token_ids(PLACEHOLDER[kind])[0]).sum(1).tolist()
    # 4 patches of 14 x 14 pixels have one feature in Qwen2.5-VL; LLaVA resizes each image to 4 patches.
    features = {"qwen2_5_vl": lambda height, width: height * width // 28**2, "llava": lambda height, width: 4}[kind]
    for row, (count, sample) in enumerate(zip(counts, samples, strict=True)):
        right = sum(features(height, width) for _, height, width in sample.images)
        if count != right:
            raise Violation(f"row {row} of input_ids has {count} image tokens, expected {right}, the features of its images")


def split_cases(adapter: Adapter) -> Iterator[Case]:
    chunks = {
        "texts": (3,),
        "shared-prompt": (2,),
        "images": (3,),
        "several-images": (3,),
        "mixed": (4, 2),
        "shared-images": (2,),
    }
    for case in cases(adapter, *chunks):
        for count in chunks[case.id.removeprefix(case.arguments["kind"] + "-")]:
            yield Case(f"{case.id}-{count}", {**case.arguments, "num_chunks": count})


def split_script(kind: str, samples: Sequence[Sample], num_chunks: int) -> str:
    size = len(samples) // num_chunks
    return f"""\
_, processor = tiny("{kind}")
samples = {list(samples)!r}
num_images = [len(sample.images) for sample in samples]
print("got", adapter.split(encode(processor, samples, device=adapter.device), num_images, {num_chunks}))
print("expected", [encode(processor, samples[i : i + {size}]) for i in range(0, {len(samples)}, {size})])"""


@contract("split/value", "split", source=PROCESSOR, tolerance=EXACT, cases=split_cases, reproduce=split_script)
def split(adapter: Adapter, kind: str, samples: tuple[Sample, ...], num_chunks: int) -> None:
    """Each micro-batch has the tokens and the images of its own samples, all of them, once, and in order."""
    inputs = encode(exact(kind)[1], samples, device=adapter.device)
    size = len(samples) // num_chunks
    chunks = adapter.split(inputs, [len(sample.images) for sample in samples], num_chunks)
    for index, chunk in enumerate(chunks):
        alone = each_alone(kind, samples[index * size : (index + 1) * size])
        check_tokens(f" of chunk {index}", chunk, alone)
        check_images(f" of chunk {index}", chunk, alone)


def forward_script(kind: str, samples: Sequence[Sample], num_chunks: int) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
inputs, num_images = encode(processor, samples, "left", True, adapter.device), [len(sample.images) for sample in samples]
print("got", [last_logps(model, chunk, inputs) for chunk in adapter.split(inputs, num_images, {num_chunks})])
print("expected", last_logps(model, inputs, inputs))"""


@contract(
    "split/forward",
    "split",
    source=PROCESSOR,
    tolerance=f"2 {ROUNDING}",
    cases=split_cases,
    reproduce=forward_script,
)
def forward(adapter: Adapter, kind: str, samples: tuple[Sample, ...], num_chunks: int) -> None:
    """A model accepts each micro-batch, also one without images, and has the outputs of the whole batch."""
    model, processor = tiny(kind, adapter.device)
    inputs = encode(processor, samples, completions=True, device=adapter.device)
    right = last_logps(model, inputs, inputs)
    size, rounding = len(samples) // num_chunks, 2 * expected(kind, samples, 1.0).rounding(adapter)
    for index, chunk in enumerate(adapter.split(inputs, [len(sample.images) for sample in samples], num_chunks)):
        try:
            got = last_logps(model, chunk, inputs)
        except Exception as error:
            raise Violation(f"the model raises {type(error).__name__} for chunk {index}: {error}") from error
        close(f"the log-probabilities of chunk {index}", got, right[index * size : (index + 1) * size], rounding)


def position_cases(adapter: Adapter) -> Iterator[Case]:
    for case in cases(adapter, "one", "texts", "image", "images", "several-images", "mixed"):
        for side in ("left", "right"):
            yield Case(f"{case.id}-{side}", {**case.arguments, "side": side})


def position_script(kind: str, samples: Sequence[Sample], side: str) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(samples)!r}
print("got", adapter.positions(model, encode(processor, samples, "{side}", True, adapter.device)))
print("expected, without padding", positions_alone(*tiny("{kind}"), samples))"""


def check_positions(positions: torch.Tensor, inputs: Mapping[str, torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    """Raise ``Violation`` unless the positions at attended tokens are right, up to a number for each sample.

    Rotary embeddings depend on differences of positions only.
    """
    axes = positions.reshape(-1, *positions.shape[-2:])[-3:]
    axes = axes.expand(3, -1, -1) if len(axes) == 1 else axes
    for row, (mask, other) in enumerate(zip(inputs["attention_mask"].bool(), right, strict=True)):
        got = axes[:, row][:, mask.to(axes.device)].cpu()
        close(f"position_ids of sample {row}, relative to its first token,", got - got[0, 0], other - other[0, 0], 0)


@contract("positions/value", "positions", source=ROPE_INDEX, tolerance=EXACT, cases=position_cases, reproduce=position_script)
def positions(adapter: Adapter, kind: str, samples: tuple[Sample, ...], side: str) -> None:
    """The position ids of a padded batch are those of the model for each sample alone, up to a constant per sample."""
    model, processor = tiny(kind, adapter.device)
    inputs = encode(processor, samples, side, completions=True, device=adapter.device)
    right = positions_alone(*exact(kind), samples)
    check_positions(adapter.positions(model, inputs), inputs, right)


def after_script(kind: str, samples: Sequence[Sample], before: Sequence[Sample]) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
before, samples = {list(before)!r}, {list(samples)!r}
adapter.positions(model, encode(processor, before, "left", True, adapter.device))
print("got", adapter.positions(model, encode(processor, samples, "left", True, adapter.device)))
print("expected, without padding", positions_alone(*tiny("{kind}"), samples))"""


def after_cases(adapter: Adapter) -> Iterator[Case]:
    batches = {case.id: case.arguments for case in cases(adapter)}
    for kind in adapter.models:
        for name, before in {"texts": "images", "images": "several-images", "mixed": "images"}.items():
            if f"{kind}-{before}" in batches:
                before_samples = batches[f"{kind}-{before}"]["samples"]
                yield Case(f"{kind}-{name}-after-{before}", {**batches[f"{kind}-{name}"], "before": before_samples})


@contract(
    "positions/after-another",
    "positions",
    source=ROPE_INDEX,
    tolerance=EXACT,
    cases=after_cases,
    reproduce=after_script,
)
def after_another(adapter: Adapter, kind: str, samples: tuple[Sample, ...], before: tuple[Sample, ...]) -> None:
    """Position ids do not depend on the batch before, whose rope_deltas the model may keep."""
    model, processor = tiny(kind, adapter.device)
    adapter.positions(model, encode(processor, before, completions=True, device=adapter.device))
    inputs = encode(processor, samples, completions=True, device=adapter.device)
    check_positions(adapter.positions(model, inputs), inputs, positions_alone(*exact(kind), samples))
