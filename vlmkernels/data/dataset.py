"""Datasets of samples: loading them from files, checking their rows before training and reading them one by one.

A dataset is any sequence of rows with a length, for example a list of dicts or a ``datasets.Dataset``; see
``vlmkernels.data.samples`` for the columns of a row.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset
from transformers.utils import logging

from vlmkernels.data.conversations import MEDIA_KEYS, is_absent, map_media_values
from vlmkernels.data.images import DEFAULT_LIMITS, IMAGE_ERRORS, ImageLimits, scheme_of
from vlmkernels.data.samples import (
    MEDIA_COLUMNS,
    Sample,
    SampleError,
    check_media,
    prompt_ids,
    read_sample,
    render,
    tokenizer_of,
)
from vlmkernels.data.sizes import SizeCheck
from vlmkernels.models.families import TEXT, Family
from vlmkernels.ops.checks import did_you_mean
from vlmkernels.ops.decode_image import map_on_threads

logger = logging.get_logger(__name__)

Encoded = TypeVar("Encoded")
_READ_ROWS = 64  # rows that are checked together
_IMAGE_COLUMNS = ("image", "images")
_READERS = 8  # threads that read the headers of images


class JsonLines(list):
    """The rows of a .jsonl file, with their lines for error messages.

    Args:
        path: the file.
        lines: the number of each row's line.
        rows: the rows.
    """

    def __init__(self, path: Path, lines: list[int], rows: Iterable[dict]):
        super().__init__(rows)
        self.path, self.lines = path, lines

    @classmethod
    def read(cls, path: Path) -> "JsonLines":
        """Read a file. Relative paths of images are joined to its folder."""
        rows = cls(path, [], ())
        for line, row in read_json_lines(path):
            rows.lines.append(line)
            rows.append(_resolve_paths(row, path.parent))
        return rows

    def __getitem__(self, key: Any) -> Any:
        rows = super().__getitem__(key)
        return JsonLines(self.path, self.lines[key], rows) if isinstance(key, slice) else rows


def row_name(dataset: Any, index: int, name: str = "") -> str:
    """Return the name of a row in error messages: the dataset, its file and line if they are known, and the index.

    Args:
        dataset: the rows.
        index: index of the row.
        name: name of the dataset, for example "train_dataset".
    """
    place = getattr(dataset, "loaded_from", None)
    if isinstance(dataset, JsonLines):
        place = f"{dataset.path}, line {dataset.lines[index]}"
    return ": ".join(str(part) for part in (name, place, f"sample {index}") if part)


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
        columns: the columns of the dataset; rows get None for those that they lack.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        limits: ImageLimits = DEFAULT_LIMITS,
        on_bad: str = "raise",
        bad: dict[int, str] | None = None,
        columns: Iterable[str] = (),
    ):
        self.dataset, self.name, self.limits, self.on_bad, self.bad = dataset, name, limits, on_bad, dict(bad or {})
        self.columns = list(columns)
        # ``datasets`` would decode these columns one image after another, and before the limits are checked.
        self.stored = undecoded(dataset, _IMAGE_COLUMNS)

    def __len__(self) -> int:
        return len(self.dataset)

    def _sample(self, row: Any, index: int) -> Sample:
        where = row_name(self.dataset, index, self.name)
        sample = _read(with_columns(row, self.columns), index, where, limits=self.limits)
        return sample if self.stored is self.dataset else _with_decoded_columns(sample)

    def _skip(self, index: int, error: Exception) -> None:
        self.bad[index] = str(error)
        logger.warning("%s; using the next sample instead (on_bad_sample='skip')", error)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        for offset in range(len(self)):
            other = (index + offset) % len(self)
            if other in self.bad:
                continue
            try:
                return index, self._sample(_row_or_error(self.stored, other), other)
            except (ValueError, TypeError) as error:
                if self.on_bad == "raise":
                    raise
                self._skip(other, error)
        raise ValueError(f"{self.name} must have a sample that can be read, got {next(iter(self.bad.values()), 'no rows')}")

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Sample]]:
        """Return ``[self[index] for index in indices]``. Images are decoded in parallel, on torch's number of threads."""

        def read(numbered: tuple[int, Any]) -> Sample | Exception:
            try:
                return self._sample(numbered[1], numbered[0])
            except (ValueError, TypeError) as error:
                return error

        known = [index for index in indices if index not in self.bad]
        found = dict(
            zip(known, map_on_threads(read, [(index, _row_or_error(self.stored, index)) for index in known]), strict=True)
        )
        rows = []
        for index in indices:
            sample = found.get(index)
            if isinstance(sample, Exception) and index not in self.bad:
                if self.on_bad == "raise":
                    raise sample
                self._skip(index, sample)
            rows.append((index, sample) if isinstance(sample, Sample) else self[index])
        return rows

    def encode(
        self, rows: list[tuple[int, Sample]], encode: Callable[[list[Sample]], Encoded]
    ) -> tuple[list[tuple[int, Sample]], Encoded]:
        """Encode samples. With ``on_bad="skip"`` the next usable sample takes the place of one that cannot be encoded.

        Args:
            rows: pairs as ``self[index]`` returns them.
            encode: encodes the samples, and raises ``SampleError`` for one that it cannot encode.

        Returns:
            The rows, perhaps with other samples, and the result of ``encode``.
        """
        while True:
            try:
                return rows, encode([sample for _, sample in rows])
            except SampleError as error:
                if self.on_bad == "raise":
                    raise
                self._skip(error.index, error)
                rows = [self[index] if sample.index == error.index else (index, sample) for index, sample in rows]


def read_samples(dataset: Any, indices: Sequence[int], limits: ImageLimits = DEFAULT_LIMITS) -> list[Sample]:
    """Read samples; see ``read_sample``. Images are decoded in parallel, on torch's number of threads."""
    rows = [(index, dataset[index]) for index in indices]
    return map_on_threads(lambda r: read_sample(r[1], r[0], limits=limits, where=row_name(dataset, r[0])), rows)


def _with_decoded_columns(sample: Sample) -> Sample:
    """Return a sample whose row has decoded images in its columns, as a row of ``datasets`` has."""
    row = dict(sample.row)
    for name in _IMAGE_COLUMNS:
        value = row.get(name)
        if isinstance(value, list) and not all(map(is_absent, value)):
            row[name] = list(sample.images)
        elif isinstance(value, dict) and not is_absent(value):
            (row[name],) = sample.images
    return replace(sample, row=row)


def with_columns(row: Any, columns: Iterable[str]) -> Any:
    """Return a row with None for each of the columns, other than the prompt, that it lacks."""
    return {name: None for name in columns if name != "prompt"} | row if isinstance(row, dict) else row


def column_names(dataset: Any) -> list[str]:
    """Return ``dataset.column_names``. Without this attribute, read all rows and return the union of their keys."""
    names = getattr(dataset, "column_names", None)
    if names is None:
        rows = (dataset[index] for index in range(len(dataset)))
        names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    return list(names)


def undecoded(dataset: Any, columns: Iterable[str] | None = None) -> Any:
    """Return the dataset with images as stored bytes or paths, so that reading a row does not decode their pixels.

    Args:
        dataset: the rows.
        columns: only these columns, unless the dataset has a format such as "torch", which needs pixels; None: all columns.
    """
    if not hasattr(dataset, "cast_column") or (columns is not None and dataset.format["type"] is not None):
        return dataset
    from datasets import Image as ImageFeature
    from datasets import List

    def stored(feature: Any) -> Any:
        if isinstance(feature, ImageFeature):  # that of a mode converts the pixels
            return feature if columns is not None and feature.mode else ImageFeature(decode=False)
        if isinstance(feature, List):
            return List(stored(feature.feature))
        if isinstance(feature, dict):
            return {name: stored(value) for name, value in feature.items()}
        return feature

    wanted = {name: stored(feature) for name, feature in dataset.features.items() if columns is None or name in columns}
    changed = {name: feature for name, feature in wanted.items() if feature != dataset.features[name]}
    if changed:
        dataset = dataset.with_format(**dataset.format)  # a copy that shares the rows
        dataset.info.features.update(changed)  # cast_column would write the rows again for a list of images
    return dataset


@dataclass(frozen=True)
class RowChecks:
    """What ``check_dataset`` checks besides prompts, images and videos.

    Args:
        columns: called once with the names of all columns; raises ValueError if one is missing.
        row: called with each row and its name for error messages; raises ValueError or TypeError for a bad row.
        sample: called with each sample, of which only the sizes of images are known, and its rendered prompt; raises
            ``SampleError`` for a bad one.
        num_embeddings: number of rows of the model's input embedding; None leaves the ids of prompts unchecked.
        family: the model's family, for ``check_media``: all rows may be in one batch. The default allows everything.
    """

    columns: Callable[[list[str]], None] | None = None
    row: Callable[[dict, str], None] | None = None
    num_embeddings: int | None = None
    family: Family = TEXT
    sample: Callable[[Sample, str], None] | None = None


def check_dataset(
    dataset: Any,
    name: str,
    processor: Any,
    chat_template_kwargs: dict[str, Any] | None = None,
    checks: RowChecks | None = None,
    bad: dict[int, str] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[set[str], list[str]]:
    """Check that every row can be trained on. Reads all rows, but only the headers of their images.

    Args:
        dataset: the rows.
        name: name of the dataset in error messages.
        processor: the model's processor, or its tokenizer for a text model.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        checks: further checks.
        bad: if given, bad rows do not raise, but are added to it: the reason by index.
        limits: limits of images.

    Returns:
        The kinds of media in the rows, "image" and "video", and the names of all columns.

    Raises:
        TypeError, ValueError: for the first bad row, or if no row is usable. The message names the dataset or the row.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of rows with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one sample, got 0")
    checks = checks or RowChecks()
    if hasattr(dataset, "column_names") or isinstance(dataset, (list, tuple)):  # known without much work, so checked first
        _check_columns(column_names(dataset), name, checks)
    ids, sizes = _IdCheck(processor, checks.num_embeddings), SizeCheck(processor)
    first: dict[str, Sample] = {}  # with an image, with a video
    columns: dict[str, None] = {}
    for index, row, sample in _read_headers(dataset, name, limits):
        columns.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        try:
            if isinstance(sample, Exception):
                raise sample
            text = render(sample, processor, **(chat_template_kwargs or {}))
            check_media([sample], checks.family)
            sizes(sample)
            ids(sample, text)
            if checks.sample is not None:
                checks.sample(sample, text)
            if checks.row is not None:
                checks.row(row, sample.name)
        except (ValueError, TypeError) as error:
            if bad is None:
                raise
            bad[index] = str(error)
        else:
            first = {kind: sample for kind, media in (("image", sample.images), ("video", sample.videos)) if media} | first
    if bad and len(bad) == len(dataset):
        raise ValueError(f"{name} must hold a sample that can be used, got none: {next(iter(bad.values()))}")
    check_media([*first.values()], checks.family)
    _check_columns(list(columns), name, checks)
    return {*first}, list(columns)


def _check_columns(columns: list[str], name: str, checks: RowChecks) -> None:
    if "prompt" not in columns:
        raise ValueError(f"{name} must have a column 'prompt', got {', '.join(columns)}{did_you_mean('prompt', columns)}")
    if checks.columns is not None:
        checks.columns(columns)


def _read_headers(dataset: Any, name: str, limits: ImageLimits) -> Iterator[tuple[int, Any, Sample | Exception]]:
    """Yield the index of each row, the row, and its sample without pixels, or why it cannot be read.

    Threads read the headers of images, because a file system on a network answers slowly.
    """

    def read(numbered: tuple[int, Any]) -> Sample | Exception:
        index, row = numbered
        try:
            return _read(row, index, row_name(dataset, index, name), decode=False, limits=limits)
        except (ValueError, TypeError) as error:
            return error

    with ThreadPoolExecutor(_READERS) as readers:
        for batch in _batches(dataset):
            for (index, row), sample in zip(batch, readers.map(read, batch), strict=True):
                yield index, row, sample


def _batches(dataset: Any) -> Iterator[list[tuple[int, Any]]]:
    """Yield rows with their indices, without decoding images. An exception stands for a row that cannot be read."""
    stored = undecoded(dataset)
    is_table = hasattr(stored, "cast_column") and stored.format["type"] is None
    for start in range(0, len(stored), _READ_ROWS):
        indices = range(start, min(start + _READ_ROWS, len(stored)))
        if is_table:
            try:  # datasets reads several rows at once much faster
                columns = stored[start : indices.stop]
                rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                yield list(zip(indices, rows, strict=True))
                continue
            except IMAGE_ERRORS:  # of one of the rows
                pass
        yield [(index, _row_or_error(stored, index)) for index in indices]


def _row_or_error(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except IMAGE_ERRORS as error:  # datasets decodes images here, except those that ``undecoded`` has stored
        return error


def _read(row: Any, index: int, where: str, **options: Any) -> Sample:
    """Return ``read_sample`` of a row, or raise ValueError if the row is an exception in its place."""
    if isinstance(row, Exception):
        raise ValueError(f"{where}: cannot be read: {row}") from row
    return read_sample(row, index, where=where, **options)


class _IdCheck:
    """Checks that the tokens of prompts have a row in the model's embedding.

    Args:
        processor: the model's processor or tokenizer.
        num_embeddings: number of rows; None checks nothing.

    Raises:
        ValueError: the tokenizer pads or ends a text with a token without a row.
    """

    def __init__(self, processor: Any, num_embeddings: int | None):
        self.processor, self.num_embeddings, self.needed = processor, num_embeddings, False
        if num_embeddings is None:
            return
        tokenizer = tokenizer_of(processor)
        for name in ("pad_token", "eos_token"):
            if (token := getattr(tokenizer, f"{name}_id")) is not None and token >= num_embeddings:
                raise ValueError(f"{name} of processing_class must have an id {self._rule(token)}")
        self.needed = max(tokenizer.get_vocab().values(), default=0) >= num_embeddings

    def _rule(self, token: int) -> str:
        text = tokenizer_of(self.processor).convert_ids_to_tokens(token)
        return (
            f"below the {self.num_embeddings} rows of the model's embedding (model.resize_token_embeddings adds rows), "
            f"got {token} for {text!r}"
        )

    def __call__(self, sample: Sample, text: str) -> None:
        """Raise SampleError if a token of the rendered prompt has no row."""
        if self.needed and (token := max(prompt_ids(sample, text, self.processor), default=0)) >= self.num_embeddings:
            raise SampleError(sample, f"prompt must have token ids {self._rule(token)}")


def _resolve_paths(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the row with relative paths of images and frames joined to ``folder``; URLs stay as they are.

    The paths are in columns, and in the parts of conversations.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):  # as datasets and OpenAI's APIs store it
            return {key: resolve(item) if key in ("path", "url") else item for key, item in value.items()}
        return str(folder / value) if isinstance(value, str) and value and scheme_of(value) is None else value

    def resolved(name: str, value: Any) -> Any:
        if name == "prompt" and isinstance(value, list):
            return [map_media_values(message, resolve) for message in value]
        return resolve(value) if name in MEDIA_COLUMNS else value

    return {name: resolved(name, value) for name, value in row.items()}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a .jsonl file with their line numbers, from 1. Empty lines and a byte order mark are skipped.

    Raises:
        ValueError: a line is not a JSON object in UTF-8; the message has the file and the line number.
    """
    with path.open("rb") as lines:
        for number, content in enumerate(lines, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if not line.strip():
                    continue
                value = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: must be UTF-8, got {content[:80]!r} ({error})") from error
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
        return JsonLines.read(path)
    import datasets

    if path.suffix == ".parquet":
        import pyarrow.parquet

        dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        texts = {name: str(dataset.features.get(name)) for name in (*MEDIA_COLUMNS, "prompt")}
        names = [name for name in MEDIA_COLUMNS if "string" in texts[name]]
        names += ["prompt"] * any(f"'{key}':" in texts["prompt"] for key in MEDIA_KEYS)
        if names:  # reading the other columns would decode their images

            def resolve(*values: Any) -> dict[str, Any]:
                return _resolve_paths(dict(zip(names, values, strict=True)), path.parent)

            dataset = dataset.map(resolve, input_columns=names, keep_in_memory=True)
        return _loaded_from(dataset, path)
    if not path.is_dir():
        raise ValueError(f"dataset must end in .jsonl or .parquet or be a folder, got {path}")
    dataset = datasets.load_from_disk(str(path))
    if not isinstance(dataset, datasets.DatasetDict):
        return _loaded_from(dataset, path)
    if split not in dataset:
        raise ValueError(f"split must be one of {', '.join(dataset)}, got {split!r}")
    return _loaded_from(dataset[split], path / split)


def _loaded_from(dataset: Any, path: Path) -> Any:
    """Note the path of a dataset for the names of its rows."""
    dataset.loaded_from = path
    return dataset
