"""Datasets of samples: loading them from files, checking their rows before training and reading them one by one.

A dataset is any sequence of rows with a length, for example a list of dicts or a ``datasets.Dataset``; see
``vlmkernels.data.samples`` for the columns of a row.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.utils import logging

from vlmkernels.data.images import DEFAULT_LIMITS, IMAGE_ERRORS, ImageLimits, scheme_of
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, read_sample, render

logger = logging.get_logger(__name__)


class SampleDataset(Dataset):
    """Reads a dataset's rows as samples.

    ``self[index]`` returns a pair ``(index, sample)``. A row that cannot be read raises ``ValueError`` with its index, or with
    ``on_bad="skip"`` the next readable row takes its place, so that every rank gets the same number of samples. The
    replacement of a row is always the same.

    Args:
        dataset: the rows.
        name: name of the dataset in error messages, for example "train_dataset".
        limits: limits of its images.
        on_bad: what to do with a row that cannot be read: "raise" or "skip".
        bad: indices of rows that are known to be unusable, with the reasons.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        limits: ImageLimits = DEFAULT_LIMITS,
        on_bad: str = "raise",
        bad: dict[int, str] | None = None,
    ):
        self.dataset, self.name, self.limits, self.on_bad, self.bad = dataset, name, limits, on_bad, dict(bad or {})

    def __len__(self) -> int:
        return len(self.dataset)

    def _read(self, index: int) -> Sample:
        try:
            row = self.dataset[index]
        except IMAGE_ERRORS as error:  # datasets decodes images here
            raise ValueError(f"sample {index}: cannot be read: {error}") from error
        return read_sample(row, index, limits=self.limits)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        for offset in range(len(self)):
            other = (index + offset) % len(self)
            if other in self.bad:
                continue
            try:
                return index, self._read(other)
            except (ValueError, TypeError) as error:
                if self.on_bad == "raise":
                    raise
                self.bad[other] = str(error)
                logger.warning("%s: %s; using the next sample instead (on_bad_sample='skip')", self.name, error)
        raise ValueError(f"{self.name} must have a sample that can be read, got {next(iter(self.bad.values()), 'no rows')}")


def column_names(dataset: Any) -> list[str]:
    """Return ``dataset.column_names``, or the keys of the first row if the dataset has no such attribute."""
    return list(getattr(dataset, "column_names", None) or dataset[0])


def undecoded(dataset: Any) -> Any:
    """Return the dataset with images as stored bytes or paths, so that reading a row does not decode any pixels."""
    if not hasattr(dataset, "cast_column"):
        return dataset
    from datasets import Image as ImageFeature
    from datasets import List

    def stored(feature: Any) -> Any:
        if isinstance(feature, List):
            return List(stored(feature.feature))
        return ImageFeature(decode=False) if isinstance(feature, ImageFeature) else feature

    for name in dataset.features.keys() & MEDIA_COLUMNS:
        dataset = dataset.cast_column(name, stored(dataset.features[name]))
    return dataset


def check_dataset(
    dataset: Any,
    name: str,
    processor: Any,
    chat_template_kwargs: dict[str, Any] | None = None,
    check_row: Callable[[dict, str], None] | None = None,
    bad: dict[int, str] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> set[str]:
    """Check that every row can be trained on. Reads all rows, but only the headers of their images.

    Args:
        dataset: the rows.
        name: name of the dataset in error messages.
        processor: the model's processor, or its tokenizer for a text model.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        check_row: called with each row and its name for error messages; raises ValueError or TypeError for a bad row.
        bad: if given, bad rows do not raise, but are added to it: the reason by index.
        limits: limits of images.

    Returns:
        The kinds of media in the rows: "image", "video".

    Raises:
        TypeError, ValueError: for the first bad row, or if no row is usable. The message names the dataset or the row.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one sample, got 0")
    columns = column_names(dataset)
    if "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt', got {', '.join(columns)}")
    rows, kinds = undecoded(dataset), set()
    for index in range(len(rows)):
        try:
            if "prompt" not in rows[index]:
                raise ValueError(f"{name}: sample {index} must have 'prompt', got {', '.join(rows[index])}")
            sample = read_sample(rows[index], index, decode=False, limits=limits)
            render(sample, processor, **(chat_template_kwargs or {}))
            if check_row is not None:
                check_row(rows[index], f"{name}: sample {index}")
        except (ValueError, TypeError) as error:
            if bad is None:
                raise
            if len(bad) + 1 == len(rows):
                raise ValueError(f"{name} must hold a sample that can be used, got none: {error}") from error
            bad[index] = str(error)
            continue
        kinds |= {kind for kind, media in (("image", sample.images), ("video", sample.videos)) if media}
    return kinds


def _resolve_paths(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the row with relative paths of images and frames joined to ``folder``; URLs stay as they are."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return str(folder / value) if isinstance(value, str) and scheme_of(value) is None else value

    return {name: resolve(value) if name in MEDIA_COLUMNS else value for name, value in row.items()}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a .jsonl file with their line numbers, from 1. Empty lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; the message has the file and the line number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate((line.removesuffix("\n") for line in lines), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: must be JSON, got {line[:80]!r} ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, got {line[:80]!r}")
            yield number, value


def load_dataset(path: str | os.PathLike, split: str | None = None) -> Any:
    """Load a ``.jsonl`` or ``.parquet`` file, or a folder written by ``datasets.Dataset.save_to_disk``.

    Args:
        path: the file or folder. Relative paths of images are resolved against the file's folder.
        split: name of a split, if the folder has several.

    Returns:
        A list of dicts for ``.jsonl``, otherwise a ``datasets.Dataset``.

    Raises:
        FileNotFoundError, ValueError: ``path`` is not such a file or folder, a line is not a JSON object, or the folder does
            not have the split.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"dataset must be an existing file or folder, got {path}")
    if path.suffix == ".jsonl":
        return [_resolve_paths(row, path.parent) for _, row in read_json_lines(path)]
    import datasets

    if path.suffix == ".parquet":
        import pyarrow.parquet

        dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        if not any("string" in str(dataset.features.get(name)) for name in MEDIA_COLUMNS):
            return dataset
        return dataset.map(lambda row: _resolve_paths(row, path.parent), keep_in_memory=True)
    if not path.is_dir():
        raise ValueError(f"dataset must end in .jsonl or .parquet or be a folder, got {path}")
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"split must be one of {', '.join(dataset)}, got {split!r}")
    return dataset[split]
