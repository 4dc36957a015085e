"""Files of predictions: the completions of a dataset's samples, which an interrupted run continues.

A file has one JSON object per line. The first has ``settings``: everything that the completions depend on. The others have:

- ``index``: index of the sample.
- ``view``: "image", or how the image was hidden. Default: "image".
- ``completions``: a list of texts, or of objects with ``text`` and optionally ``ids``, ``length`` (tokens), ``truncated`` and
  ``think_opened`` (whether the prompt ends with ``<think>``). One text may be given as ``completion`` instead.
- ``resized``: width and height of the sample's images as the model saw them, optional.

A completion that was sampled with tools is a trajectory. Its ``text`` is that of its last turn, and its ``length`` counts only
tokens that the model sampled. It also has ``turns`` (see ``vlmkernels.record.turns``), the numbers ``tool_calls`` and
``tool_failures``, and ``rewards``: the values of the reward functions by name, which see the whole trajectory and its
environment only while it is sampled. ``tool_images`` of the line has thumbnails of the images in the turns.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmkernels.data.dataset import read_json_lines
from vlmkernels.record.html import Thumbnail
from vlmkernels.record.turns import TurnRow, count, from_json, to_json
from vlmkernels.rollout.score import Size


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))  # a bool is an int


# Optional fields of a completion -> what they must be, and whether a value is.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("length", "tool_calls", "tool_failures"), ("a number", _is_number)),
    **dict.fromkeys(("truncated", "think_opened"), ("true or false", _is_number)),
    "ids": ("a list of token ids", lambda x: x is None or (isinstance(x, list) and all(type(one) is int for one in x))),
    "rewards": ("numbers by name", lambda x: x is None or (isinstance(x, dict) and all(map(_is_number, x.values())))),
}
VIEWS = ("image", "grey", "none")  # unchanged, a gray image of the same size, removed from the prompt


@dataclass(frozen=True)
class Completion:
    """One completion. ``length`` is the number of tokens, ``think_opened`` whether its prompt ends with ``<think>``.

    All fields except ``text`` are None if unknown. The last four are known for trajectories; see the module's docstring.
    """

    text: str
    ids: list[int] | None = None
    length: int | None = None
    truncated: bool | None = None
    think_opened: bool | None = None
    turns: list[TurnRow] | None = None
    tool_calls: int | None = None
    tool_failures: int | None = None
    rewards: dict[str, float | None] | None = None

    @property
    def counts(self) -> tuple[int | None, int | None, int | None]:
        """The numbers of turns, tool calls and failed calls."""
        return None if self.turns is None else count(self.turns).turns, self.tool_calls, self.tool_failures

    @classmethod
    def from_json(cls, value: Any, tool_images: Sequence[Thumbnail] = ()) -> "Completion":
        """Build from a text or an object with ``text``. Raises TypeError or ValueError for other values."""
        value = {"text": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise TypeError(f"completion must be a text or an object with 'text', got {value!r:.80}")
        found: dict[str, Any] = {field.name: value.get(field.name) for field in fields(cls)}
        for name, (rule, fits) in _FIELDS.items():
            if not fits(found[name]):
                raise TypeError(f"{name} must be {rule}, got {found[name]!r:.80}")
        if found["turns"] is not None:
            try:
                found["turns"] = from_json(found["turns"], tool_images)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise ValueError(f"turns must be those of a trajectory, got {error!r}") from error
        return cls(**found)

    def to_json(self, places: dict[Thumbnail, int]) -> dict[str, Any]:
        """Return the JSON object. ``places`` has the position of each image in ``tool_images``; new images are added to it."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        of_tools = ("turns", "tool_calls", "tool_failures", "rewards")
        value = {name: item for name, item in value.items() if item is not None or name not in of_tools}
        return value if self.turns is None else {**value, "turns": to_json(self.turns, places)}


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
        tool_images = [Thumbnail.from_json(image) for image in value.get("tool_images", ())]
        self.by_sample[index, view] = [Completion.from_json(completion, tool_images) for completion in given]
        if value.get("resized") is not None and view == "image":
            try:
                self.resized[index] = [(width, height) for width, height in value["resized"]]
            except (TypeError, ValueError):
                raise ValueError(f"resized must be a list of widths and heights, got {value['resized']!r:.80}") from None

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
        changed = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in changed)
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
        lines = [_line(index, view, group, (resized or {}).get(index)) for index, group in completions.items()]
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


def _line(index: int, view: str, group: list[Completion], resized: list[Size] | None) -> dict[str, Any]:
    """Return the JSON object of a sample's completions."""
    places: dict[Thumbnail, int] = {}
    line = {"index": index, "view": view, "completions": [c.to_json(places) for c in group], "resized": resized}
    return {**line, "tool_images": list(places)} if places else line


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
