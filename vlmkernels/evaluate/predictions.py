"""Completions of a dataset's samples, written to a file as they are sampled, so that a killed run goes on where it stopped.

A file of predictions is JSON lines. The first holds ``settings``, all that decides what is sampled; each other one a sample's
``index``, ``view`` ("image", or how the image was hidden), ``completions``: a list of texts, or of objects with ``text`` and
optionally ``ids``, ``length`` (tokens) and ``truncated``; and ``resized``, width and height of its images as the model saw
them. Predictions from elsewhere need ``index`` and ``completion`` alone.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmkernels.data.images import DEFAULT, ImageLimits
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, encode, json_lines, read_sample
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import Batch
from vlmkernels.models.loading import inference
from vlmkernels.ops.checks import require
from vlmkernels.rollout.generate import Generate, Rollout, tokenizer_of
from vlmkernels.rollout.score import resized_sizes
from vlmkernels.train.config import GRPOConfig

GREY = 128
VIEWS = ("image", "grey", "none")  # as it is; grey, of its size; taken out of the prompt


@dataclass(frozen=True)
class Completion:
    """One completion. length: in tokens. ids, length, truncated: None where they are not known."""

    text: str
    ids: list[int] | None = None
    length: int | None = None
    truncated: bool | None = None

    @classmethod
    def of(cls, value: Any) -> "Completion":
        """Raises TypeError for what is neither a text nor an object with one."""
        value = {"text": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise TypeError(f"completion must be a text or an object with one, got {value!r:.80}")
        return cls(value["text"], *(value.get(name) for name in ("ids", "length", "truncated")))


class Predictions:
    """Completions by sample and view, each list as long as the others. ``path``: the file they come from or go to."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.settings = Path(path), None
        self.by_sample: dict[tuple[int, str], list[Completion]] = {}
        self.resized: dict[int, list[tuple[int, int]]] = {}

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Predictions":
        """The predictions of a file. Errors name the line."""
        found = cls(path)
        if not found.path.is_file():
            raise FileNotFoundError(f"predictions must be an existing file, got {path}")
        for number, value in json_lines(found.path):
            if "settings" in value:
                found.settings = value["settings"]
                continue
            try:
                found._add(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}, line {number}: {error}") from error
        return found

    def _add(self, value: dict) -> None:
        index, view = value.get("index"), value.get("view", "image")
        require(type(index) is int and index >= 0, "index", "be a sample's number, from 0", repr(index))
        require(view in VIEWS, "view", f"be one of {', '.join(VIEWS)}", repr(view))
        given = value.get("completions", [value["completion"]] if "completion" in value else None)
        require(isinstance(given, list) and bool(given), "completions", "be a list of at least one", repr(given))
        require((index, view) not in self.by_sample, "index", "occur once", index)
        self.by_sample[index, view] = [Completion.of(completion) for completion in given]
        if value.get("resized") is not None and view == "image":
            self.resized[index] = [(width, height) for width, height in value["resized"]]

    def resume(self, settings: dict) -> "Predictions":
        """Start the file, or go on with it; a last line that was cut off by a kill is dropped.

        Raises ValueError, and changes nothing, where the file's settings are others.
        """
        self.settings = settings
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            return self
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if not complete:
            raise ValueError(f"{self.path} must be a file of predictions, got one without a whole line")
        _, first = next(json_lines(self.path))
        theirs = first.get("settings") or {}
        differ = [name for name in settings if theirs.get(name) != settings[name]]
        if differ:
            what = "; ".join(f"{name} {theirs.get(name)!r}, now {settings[name]!r}" for name in differ)
            raise ValueError(f"{self.path} was made with other settings: {what}")
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        found = Predictions.read(self.path)
        self.by_sample, self.resized = found.by_sample, found.resized
        return self

    @property
    def views(self) -> set[str]:
        return {view for _, view in self.by_sample}

    def append(
        self, view: str, completions: dict[int, list[Completion]], resized: dict[int, list | None] | None = None
    ) -> None:
        """Add samples, and write them out before returning."""
        lines = [
            {"index": i, "view": view, "completions": [asdict(c) for c in group], "resized": (resized or {}).get(i)}
            for i, group in completions.items()
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for line in lines:
            self._add(line)

    def resized_sizes(self, num_samples: int) -> list[list[tuple[int, int]] | None]:
        """Width and height of each sample's images as the model saw them, None where that is not known."""
        return [self.resized.get(index) for index in range(num_samples)]

    def of(self, num_samples: int, view: str = "image") -> list[list[Completion]]:
        """The completions of every sample, equally many each. ValueError names the first that is missing."""
        groups = [self.by_sample.get((index, view)) for index in range(num_samples)]
        for index, group in enumerate(groups):
            if group is None:
                raise ValueError(f"sample {index}: {self.path} has no completion of it (view {view!r})")
            if len(group) != len(groups[0]):
                raise ValueError(f"sample {index}: must have {len(groups[0])} completions as sample 0, got {len(group)}")
        extra = [index for index, name in self.by_sample if index >= num_samples and name == view]
        require(not extra, "predictions", f"be of the dataset's {num_samples} samples", f"index {min(extra, default=0)}")
        return groups


def joined(runs: Sequence[Predictions], num_samples: int, view: str) -> list[list[Completion]]:
    """The completions of every sample, of all runs one after the other."""
    found = [run.of(num_samples, view) for run in runs]
    for run, groups in zip(runs, found, strict=True):
        require(len(groups[0]) == len(found[0][0]), f"{run.path}", f"have {len(found[0][0])} completions each", len(groups[0]))
    return [[completion for group in groups for completion in group] for groups in zip(*found, strict=True)]


def hidden(sample: Sample, view: str) -> Sample:
    """The sample as a view shows it."""
    if view == "image" or not (sample.images or sample.videos):
        return sample
    if view == "grey":
        images = [Image.new("RGB", image.size, (GREY, GREY, GREY)) for image in sample.images]
        return replace(sample, images=images, videos=[torch.full_like(video, GREY) for video in sample.videos])
    if isinstance(sample.prompt, str):
        rule = "be a conversation to take images out of it (use grey ones)"
        raise ValueError(f"sample {sample.index}: prompt must {rule}, got text")
    text = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample.prompt]
    return replace(sample, prompt=text, images=[], videos=[])


def model_digest(model: torch.nn.Module) -> str:
    """Tells weights apart: a digest of each parameter's name, shape and sums."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        value = weight.detach().double()
        digest.update(f"{name} {tuple(value.shape)} {value.sum().item():.17g} {value.abs().sum().item():.17g}\n".encode())
    return digest.hexdigest()[:16]


def dataset_digest(dataset) -> str:
    """Tells datasets apart by what a model sees of them: a digest of prompts and of images' paths (not of their pixels)."""
    if hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns(["prompt"])
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        seen = {name: dataset[index][name] for name in ("prompt", *MEDIA_COLUMNS) if name in dataset[index]}
        digest.update(json.dumps(seen, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Decoding:
    """What is sampled. batch_size: completions at a time; it changes the speed alone."""

    num_generations: int = 1
    temperature: float = 0.0
    max_completion_length: int = 512
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_generations", "max_completion_length", "batch_size"):
            require(getattr(self, name) >= 1, name, "be >= 1", getattr(self, name))
        require(self.temperature >= 0 and math.isfinite(self.temperature), "temperature", "be >= 0", self.temperature)
        rule = "be > 0 for several completions: greedy ones are all alike"
        require(self.num_generations == 1 or self.temperature > 0, "temperature", rule, self.temperature)

    def settings(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


class Sampler:
    """Completions of samples, the same whatever the batch size.

    What is drawn for a sample is decided by the seed, its index and the view. A model whose completions ``generate`` samples
    (see ``Generate``) takes one prompt at a time where the temperature is not 0.
    """

    def __init__(self, model, processor, decoding: Decoding):
        self.model, self.processor, self.decoding = model, with_fast_images(processor), decoding
        self.tokenizer, self.family = tokenizer_of(self.processor), family_of(model.config)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        names = ("max_completion_length", "top_p", "top_k")
        config = GRPOConfig(output_dir="unused", report_to="none", **{name: getattr(decoding, name) for name in names})
        self.generate = Generate(model, self.processor, config)
        self.draws = decoding.temperature > 0
        together = self.generate.by_groups or not self.draws
        self.samples_at_a_time = max(1, decoding.batch_size // decoding.num_generations) if together else 1

    def _seed(self, sample: Sample, view: str) -> int:
        key = f"{self.decoding.seed} {view} {sample.index}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

    def _rollout(self, samples: list[Sample], view: str, prompts: Batch) -> Rollout:
        decoding, arguments = self.decoding, {}
        if self.draws and self.generate.by_groups:
            shape = decoding.num_generations, decoding.max_completion_length
            seeded = [torch.Generator().manual_seed(self._seed(sample, view)) for sample in samples]
            uniform = [torch.rand(shape, generator=generator, dtype=torch.float64) for generator in seeded]
            arguments["uniform"] = torch.cat(uniform)
        with torch.random.fork_rng(enabled=self.draws), inference(self.model):
            if self.draws:
                torch.manual_seed(self._seed(samples[0], view))
            return self.generate(self.model, prompts, decoding.num_generations, decoding.temperature, **arguments)

    def __call__(self, samples: list[Sample], view: str) -> tuple[dict[int, list[Completion]], dict[int, list | None]]:
        """The completions of each sample, and the sizes of its images as the model sees them."""
        prompts = encode([hidden(sample, view) for sample in samples], self.processor, self.family)
        rollout = self._rollout(samples, view, prompts.to(self.model.device))
        ids = [i[m].tolist() for i, m in zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found: dict[int, list[Completion]] = {sample.index: [] for sample in samples}
        for place, tokens, text, cut in zip(rollout.group.tolist(), ids, texts, rollout.truncated.tolist(), strict=True):
            found[samples[place].index].append(Completion(text, tokens, len(tokens), cut))
        sizes = resized_sizes(prompts, self.processor)
        return found, {sample.index: size for sample, size in zip(samples, sizes, strict=True)}


def settings_of(model, dataset, decoding: Decoding) -> dict:
    """All that decides what is sampled."""
    return {"model": model_digest(model), "dataset": dataset_digest(dataset), **decoding.settings()}


def predict(
    model,
    processor,
    dataset,
    decoding: Decoding,
    path: str | os.PathLike,
    views=("image",),
    progress=None,
    limits: ImageLimits = DEFAULT,
) -> Predictions:
    """The completions of every sample in each view; those that ``path`` holds already are not sampled again.

    Args:
        progress: called with (done, all) after each batch.
        limits: of images.
    """
    predictions = Predictions(path).resume(settings_of(model, dataset, decoding))
    sampler = Sampler(model, processor, decoding)
    todo = [(view, i) for view in views for i in range(len(dataset)) if (i, view) not in predictions.by_sample]
    total, step = len(views) * len(dataset), sampler.samples_at_a_time
    for view in views:
        indices = [index for name, index in todo if name == view]
        for start in range(0, len(indices), step):
            samples = [read_sample(dataset[index], index, limits=limits) for index in indices[start : start + step]]
            predictions.append(view, *sampler(samples, view))
            if progress:
                progress(len(predictions.by_sample), total)
    return predictions
