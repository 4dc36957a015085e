"""Completions of a dataset's samples, written to a file as they are sampled, so that a killed run resumes where it stopped.

A file of predictions has one JSON object per line. The first has ``settings``: everything that the completions depend on. Each
of the others has:

- ``index``: index of the sample.
- ``view``: "image", or how the image was hidden. Default: "image".
- ``completions``: a list of texts, or of objects with ``text`` and optionally ``ids``, ``length`` (tokens), ``truncated`` and
  ``think_opened`` (whether the prompt ends with ``<think>``). One text may be given as ``completion`` instead.
- ``resized``: width and height of the sample's images as the model saw them, optional.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from vlmkernels.data.dataset import read_json_lines, row_name
from vlmkernels.data.images import DEFAULT_LIMITS, ImageLimits
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, encode, read_sample, tokenizer_of
from vlmkernels.models.families import family_of
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import inference
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.generate import Generate, report_prefix_sharing
from vlmkernels.rollout.score import Size, decode_completions, opens_think, resized_sizes

GRAY = 128
VIEWS = ("image", "grey", "none")  # unchanged, a gray image of the same size, removed from the prompt


@dataclass(frozen=True)
class Completion:
    """One completion. ``length`` is the number of tokens, ``think_opened`` whether its prompt ends with ``<think>``.

    All fields except ``text`` are None if unknown.
    """

    text: str
    ids: list[int] | None = None
    length: int | None = None
    truncated: bool | None = None
    think_opened: bool | None = None

    @classmethod
    def from_json(cls, value: Any) -> "Completion":
        """Build from a text or an object with ``text``. Raises TypeError for other values."""
        value = {"text": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise TypeError(f"completion must be a text or an object with 'text', got {value!r:.80}")
        return cls(value["text"], *(value.get(name) for name in ("ids", "length", "truncated", "think_opened")))


class Predictions:
    """Completions by sample and view, and the file that holds them. Every sample has the same number of completions.

    Attributes:
        path: the file.
        settings: everything that the completions depend on; None if unknown.
        by_sample: completions by index and view.
        resized: sizes of each sample's images as the model saw them.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.settings: dict[str, Any] | None = None
        self.by_sample: dict[tuple[int, str], list[Completion]] = {}
        self.resized: dict[int, list[Size]] = {}

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Predictions":
        """Read a file of predictions.

        Raises:
            FileNotFoundError: there is no file. TypeError, ValueError: a line is invalid; the message has its number.
        """
        found = cls(path)
        if not found.path.is_file():
            raise FileNotFoundError(f"predictions must be an existing file, got {path}")
        for number, value in read_json_lines(found.path):
            if "settings" in value:
                found.settings = value["settings"]
                continue
            try:
                found._add(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}, line {number}: {error}") from error
        return found

    def _add(self, value: dict[str, Any]) -> None:
        index, view = value.get("index"), value.get("view", "image")
        if type(index) is not int or index < 0:
            raise ValueError(f"index must be a sample's number, from 0, got {index!r}")
        if view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
        given = value.get("completions", [value["completion"]] if "completion" in value else None)
        if not isinstance(given, list) or not given:
            raise ValueError(f"completions must be a list with at least one completion, got {given!r}")
        if (index, view) in self.by_sample:
            raise ValueError(f"index must occur only once per view, got {index} again")
        self.by_sample[index, view] = [Completion.from_json(completion) for completion in given]
        if value.get("resized") is not None and view == "image":
            self.resized[index] = [(width, height) for width, height in value["resized"]]

    def resume(self, settings: dict[str, Any]) -> "Predictions":
        """Start the file or continue it. An incomplete last line, left by a killed run, is removed.

        Raises:
            ValueError: the file was made with other settings. The file is then unchanged.
        """
        self.settings = settings
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
            return self
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if not complete:
            raise ValueError(f"{self.path} must be a file of predictions, got one without a complete line")
        _, first = next(read_json_lines(self.path))
        before = first.get("settings") or {}
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            changes = "; ".join(f"{name} {before.get(name)!r}, now {settings[name]!r}" for name in changed)
            raise ValueError(f"{self.path} was made with other settings: {changes}")
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        found = Predictions.read(self.path)
        self.by_sample, self.resized = found.by_sample, found.resized
        return self

    @property
    def views(self) -> set[str]:
        """The views that have completions."""
        return {view for _, view in self.by_sample}

    def append(
        self, view: str, completions: dict[int, list[Completion]], resized: dict[int, list[Size] | None] | None = None
    ) -> None:
        """Add the completions of samples and flush them to disk.

        Args:
            view: the view that they were sampled in.
            completions: completions by index of the sample.
            resized: sizes of a sample's images as the model saw them, by index of the sample.
        """
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

    def resized_sizes(self, num_samples: int) -> list[list[Size] | None]:
        """Return (width, height) of each sample's images as the model saw them; None if unknown."""
        return [self.resized.get(index) for index in range(num_samples)]

    def completions_for(self, num_samples: int, view: str = "image") -> list[list[Completion]]:
        """Return the completions of every sample.

        Raises:
            ValueError: samples have different numbers of completions or none, or there are more samples than ``num_samples``.
        """
        groups = []
        for index in range(num_samples):
            group = self.by_sample.get((index, view))
            if group is None:
                raise ValueError(f"sample {index}: {self.path} has no completions of this sample (view {view!r})")
            groups.append(group)
            if len(group) != len(groups[0]):
                raise ValueError(f"sample {index}: must have {len(groups[0])} completions like sample 0, got {len(group)}")
        extra = [index for index, name in self.by_sample if index >= num_samples and name == view]
        if extra:
            raise ValueError(f"predictions must have no samples beyond the dataset's {num_samples}, got index {min(extra)}")
        return groups


def concat_runs(runs: Sequence[Predictions], num_samples: int, view: str) -> list[list[Completion]]:
    """Return, for every sample, the completions of all runs one after another.

    Raises:
        ValueError: runs have different numbers of completions per sample.
    """
    found = [run.completions_for(num_samples, view) for run in runs]
    count = len(found[0][0])
    for run, groups in zip(runs, found, strict=True):
        if len(groups[0]) != count:
            raise ValueError(f"{run.path} must have {count} completions each, got {len(groups[0])}")
    return [[completion for group in groups for completion in group] for groups in zip(*found, strict=True)]


def hide_images(sample: Sample, view: str) -> Sample:
    """Return the sample in a view of ``VIEWS``.

    Raises:
        ValueError: the view is "none" and the prompt is text, from which images cannot be removed.
    """
    if view == "image" or not (sample.images or sample.videos):
        return sample
    if view == "grey":
        images = [Image.new("RGB", image.size, (GRAY, GRAY, GRAY)) for image in sample.images]
        return replace(sample, images=images, videos=[torch.full_like(video, GRAY) for video in sample.videos])
    if isinstance(sample.prompt, str):
        raise ValueError(
            f"sample {sample.index}: prompt must be a conversation to remove images from it (use the view grey), got text"
        )
    prompt = [{**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample.prompt]
    return replace(sample, prompt=prompt, images=[], videos=[])


def model_digest(model: torch.nn.Module) -> str:
    """Return a hash of the names, shapes and sums of all weights, which changes when the weights do."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        value = weight.detach().double()
        digest.update(f"{name} {tuple(value.shape)} {value.sum().item():.17g} {value.abs().sum().item():.17g}\n".encode())
    return digest.hexdigest()[:16]


def dataset_digest(dataset: Any) -> str:
    """Return a hash of the prompts and of the paths of images, but not of their pixels."""
    if hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns(["prompt"])
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        inputs = {name: dataset[index][name] for name in ("prompt", *MEDIA_COLUMNS) if name in dataset[index]}
        digest.update(json.dumps(inputs, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Decoding:
    """How predictions are sampled.

    Args:
        num_generations: completions per prompt.
        temperature: 0 is greedy decoding.
        max_completion_length: maximum number of tokens of a completion.
        top_p, top_k: see ``vlmkernels.rollout.base.Sampling``.
        seed: seed of the random numbers.
        batch_size: number of completions that are sampled together. It only changes the speed.

    Raises:
        ValueError: a value is out of range.
    """

    num_generations: int = 1
    temperature: float = 0.0
    max_completion_length: int = 512
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_generations", "max_completion_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        self.sampling()
        if self.num_generations > 1 and self.temperature == 0:
            raise ValueError(f"temperature must be > 0 for several completions (greedy ones are equal), got {self.temperature}")

    def sampling(self) -> Sampling:
        """Return the options of the rollout engine."""
        return Sampling(self.max_completion_length, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    def settings(self) -> dict[str, Any]:
        """Return everything that the completions depend on."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


class Predictor:
    """Samples the completions of a dataset's samples.

    The completions of a sample depend on the seed, its index and the view, but not on the batch size. Prompts are therefore
    processed one by one if ``model.generate`` is used (see ``Generate``) and the temperature is not 0.

    Args:
        model, processor: the model and its processor or tokenizer.
        decoding: how completions are sampled.

    Attributes:
        samples_per_batch: maximum number of samples of a call.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, decoding: Decoding):
        self.model, self.processor, self.decoding = model, with_fast_images(processor), decoding
        self.tokenizer, self.family = tokenizer_of(self.processor), family_of(model.config)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.engine = Generate(model, self.processor, decoding.sampling())
        if self.engine.copies_reason is not None:
            report_prefix_sharing({"sampling": self.engine.copies_reason})
        self.is_random = decoding.temperature > 0
        batched = self.engine.shares_prefix or not self.is_random
        self.samples_per_batch = max(1, decoding.batch_size // decoding.num_generations) if batched else 1

    def _seed(self, sample: Sample, view: str) -> int:
        key = f"{self.decoding.seed} {view} {sample.index}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1

    def _rollout(self, samples: list[Sample], view: str, prompts: ModelInputs) -> Rollout:
        decoding, uniform = self.decoding, None
        if self.is_random and self.engine.shares_prefix:
            shape = decoding.num_generations, decoding.max_completion_length
            generators = [torch.Generator().manual_seed(self._seed(sample, view)) for sample in samples]
            uniform = torch.cat([torch.rand(shape, generator=g, dtype=torch.float64) for g in generators])
        with torch.random.fork_rng(enabled=self.is_random), inference(self.model):
            if self.is_random:
                torch.manual_seed(self._seed(samples[0], view))
            return self.engine(self.model, prompts, decoding.num_generations, decoding.temperature, uniform=uniform)

    def __call__(self, samples: list[Sample], view: str) -> tuple[dict[int, list[Completion]], dict[int, list[Size] | None]]:
        """Return the completions of each sample, and the sizes of its images as the model sees them, both by index."""
        prompts = encode([hide_images(sample, view) for sample in samples], self.processor, self.family)
        rollout = self._rollout(samples, view, prompts.to(self.model.device))
        ids = rollout.token_ids()
        opened = opens_think(samples, prompts, self.tokenizer)
        texts = decode_completions(self.tokenizer, ids)
        found: dict[int, list[Completion]] = {sample.index: [] for sample in samples}
        columns = rollout.group.tolist(), texts, ids, rollout.truncated.tolist()
        for place, text, tokens, truncated in zip(*columns, strict=True):
            found[samples[place].index].append(Completion(text, tokens, len(tokens), truncated, opened[place]))
        sizes = resized_sizes(prompts, self.processor)
        return found, {sample.index: size for sample, size in zip(samples, sizes, strict=True)}


def settings_of(model: torch.nn.Module, dataset: Any, decoding: Decoding) -> dict[str, Any]:
    """Return everything that predictions depend on: hashes of model and dataset, and the decoding."""
    return {"model": model_digest(model), "dataset": dataset_digest(dataset), **decoding.settings()}


def predict(
    model: PreTrainedModel,
    processor: Any,
    dataset: Any,
    decoding: Decoding,
    path: str | os.PathLike,
    views: Sequence[str] = ("image",),
    progress: Callable[[int, int], None] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Predictions:
    """Sample the completions of every sample in each view. Completions that are already in the file are not sampled again.

    Args:
        model, processor: the model and its processor or tokenizer.
        dataset: rows; see ``vlmkernels.data.samples``.
        decoding: how completions are sampled.
        path: the file of predictions.
        views: names from ``VIEWS``.
        progress: called after each batch with the number of finished samples and of all samples, over all views.
        limits: limits of images.

    Raises:
        ValueError: the file was made with other settings, or a sample cannot be read.
    """
    predictions = Predictions(path).resume(settings_of(model, dataset, decoding))
    predictor = Predictor(model, processor, decoding)
    missing = [(view, i) for view in views for i in range(len(dataset)) if (i, view) not in predictions.by_sample]
    total, step = len(views) * len(dataset), predictor.samples_per_batch
    for view in views:
        indices = [index for name, index in missing if name == view]
        for start in range(0, len(indices), step):
            batch = indices[start : start + step]
            samples = [read_sample(dataset[i], i, limits=limits, where=row_name(dataset, i)) for i in batch]
            predictions.append(view, *predictor(samples, view))
            if progress:
                progress(len(predictions.by_sample), total)
    return predictions
