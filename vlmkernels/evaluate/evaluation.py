"""From predictions to metrics: samples in groups, each group's answers parsed and scored, intervals and comparisons."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.data.images import DEFAULT, ImageLimits
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, column_names, read_sample
from vlmkernels.evaluate.metrics import REWARD, Answers, Metric, score
from vlmkernels.evaluate.predictions import VIEWS, Predictions, joined
from vlmkernels.evaluate.statistics import (
    REPLICATES,
    Bootstrap,
    Difference,
    Estimate,
    Statistic,
    compare,
    estimate,
    point_value,
)
from vlmkernels.evaluate.tasks import COMMON, HARNESSES, TASKS, Harness
from vlmkernels.ops.checks import require, require_one_of
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.boxes import FRAMES
from vlmkernels.rewards.builtin import PROVIDED, to_frame
from vlmkernels.rollout.score import prompt_text

ALL = "all"


@dataclass(frozen=True)
class Scoring:
    """How predictions are scored.

    task: of every sample, by default the dataset's column ``task``, or "exact" where it has none but ``answer``.
    metrics: in place of the tasks' own. match: the harness whose thresholds and comparisons are taken, a key of ``HARNESSES``.
    by: the column whose values are reported one by one, by default ``category`` or else the task.
    frame: of the predicted boxes and points, a key of ``FRAMES``; references are in pixels of the original image.
    vocabulary: names of the objects that CHAIR looks for, or a mapping of names to synonyms; by default all that occur in the
    references. confidence, replicates, seed: of the bootstrap.
    """

    task: str | None = None
    metrics: tuple[str, ...] = ()
    match: str = "vlmkernels"
    by: str | None = None
    frame: str = "original"
    vocabulary: Any = None
    confidence: float = 0.95
    replicates: int = REPLICATES
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("match", self.match, HARNESSES)
        require_one_of("frame", self.frame, FRAMES)
        if self.task is not None:
            _require_task("task", self.task)
        for name in self.metrics:
            self.harness.metric(name)
        require(0 < self.confidence < 1, "confidence", "be in (0, 1)", self.confidence)
        require(self.replicates >= 1, "replicates", "be >= 1", self.replicates)

    @property
    def harness(self) -> Harness:
        return HARNESSES[self.match]


def _require_task(name: str, value: Any) -> None:
    if value not in TASKS:
        near = difflib.get_close_matches(str(value), TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(TASKS)}, got {value!r}{hint}")


class Result(NamedTuple):
    """One metric of one group. hidden: where the image was hidden; cost: the metric minus that."""

    group: str
    metric: str
    estimate: Estimate
    hidden: Estimate | None = None
    cost: Difference | None = None


@dataclass
class Group:
    """Samples that are reported together: their answers by view."""

    name: str
    metrics: dict[str, Metric]
    answers: dict[str, Answers]
    _statistics: dict = field(default_factory=dict)

    def statistic(self, metric: str, view: str = "image") -> Statistic:
        if (metric, view) not in self._statistics:
            self._statistics[metric, view] = self.metrics[metric].statistic(self.answers[view])
        return self._statistics[metric, view]


class Rows:
    """A dataset's columns without its images, and what each sample is: checked when it is made, before anything is scored."""

    def __init__(self, dataset, scoring: Scoring, limits: ImageLimits = DEFAULT):
        self.limits = limits  # of images
        require(len(dataset) > 0, "dataset", "hold at least one sample", 0)
        self.dataset, names = dataset, column_names(dataset)
        plain = (
            dataset.remove_columns([n for n in MEDIA_COLUMNS if n in names]) if hasattr(dataset, "remove_columns") else dataset
        )
        self.rows = [{k: v for k, v in plain[i].items() if k not in MEDIA_COLUMNS} for i in range(len(plain))]
        if scoring.task is None and "task" not in names:
            default = "exact" if "answer" in names else "open"
            self.tasks = [default] * len(self.rows)
        else:
            self.tasks = [scoring.task or row.get("task") for row in self.rows]
        by = scoring.by or ("category" if "category" in names else None)
        require(by is None or by in names, "by", f"be a column of the dataset ({', '.join(names)})", repr(by))
        self.names = [str(row.get(by)) if by else task for row, task in zip(self.rows, self.tasks, strict=True)]
        self.references = [self._reference(index, names) for index in range(len(self.rows))]

    def _reference(self, index: int, names: Sequence[str]) -> Any:
        row, task = self.rows[index], self.tasks[index]
        if "prompt" not in row:
            raise ValueError(f"sample {index}: dataset must have a column 'prompt', got {', '.join(row)}")
        _require_task(f"sample {index}: task", task)
        column = TASKS[task].column
        if column not in row and task != "open":
            raise ValueError(
                f"sample {index}: dataset must have a column {column!r} for the task {task}, got {', '.join(names)}"
            )
        try:
            TASKS[task].reference(row.get(column))
        except (ValueError, TypeError) as error:
            raise type(error)(f"sample {index}: {column} {error}") from error
        return row.get(column)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, decode: bool = True) -> Sample:
        return read_sample(self.dataset[index], index, decode, self.limits)

    def groups(self) -> dict[str, list[int]]:
        """Indices of the samples of each group, in the order of the dataset; a group has one task."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(zip(self.names, self.tasks, strict=True)):
            found.setdefault(key, []).append(index)
        several = {name for name, _ in found if sum(other == name for other, _ in found) > 1}
        return {f"{name} ({task})" if name in several else name: indices for (name, task), indices in found.items()}


class Evaluation:
    """What predictions are worth on a dataset.

    Args:
        predictions: see ``predict`` and ``Predictions.read``; several are runs of one method, with different training seeds.
        dataset: rows with ``prompt`` and the columns that the tasks need.
        scoring: see ``Scoring``.
        rewards: by view, then by name, (num_samples, num_generations); see ``reward_parts``.
    """

    def __init__(
        self,
        predictions: Predictions | Sequence[Predictions],
        dataset,
        scoring: Scoring | None = None,
        rewards: dict[str, dict[str, np.ndarray]] | None = None,
    ):
        self.scoring = scoring or Scoring()
        self.runs = [predictions] if isinstance(predictions, Predictions) else list(predictions)
        self.rows = dataset if isinstance(dataset, Rows) else Rows(dataset, self.scoring)
        self.rewards = rewards or {}
        self.views = [view for view in VIEWS if all(view in run.views for run in self.runs)]
        require(self.views[:1] == ["image"], "predictions", "have the view 'image'", self.views)
        self.completions = {view: joined(self.runs, len(self.rows), view) for view in self.views}
        self.resized = self.runs[0].resized_sizes(len(self.rows))
        self.groups = self._groups()

    @property
    def hidden_view(self) -> str | None:
        return self.views[1] if len(self.views) > 1 else None

    def _answers(self, indices: list[int], view: str) -> Answers:
        """Completions of samples beside what the dataset says, not parsed yet."""
        rows, completions = self.rows, [self.completions[view][index] for index in indices]
        known = lambda name: np.array([[_nan(getattr(c, name)) for c in group] for group in completions])  # noqa: E731
        return Answers(
            indices=indices,
            texts=[[c.text for c in group] for group in completions],
            values=[[None for _ in group] for group in completions],
            references=[rows.references[index] for index in indices],
            rows=[rows.rows[index] for index in indices],
            prompts=[prompt_text(rows.rows[index]["prompt"]) for index in indices],
            lengths=known("length"),
            truncated=known("truncated"),
            rewards={name: values[indices] for name, values in self.rewards.get(view, {}).items()},
        )

    def _parsed(self, answers: Answers, task: str) -> Answers:
        """Answers of one task, read and told right from wrong."""
        harness, vocabulary, kind = self.scoring.harness, self.scoring.vocabulary, TASKS[task].answer
        answers = replace(answers, values=[[harness.parse(task, text) for text in group] for group in answers.texts])
        if self.scoring.frame != "original" and kind in ("box", "boxes", "point"):
            answers = self._to_pixels(answers)
        if kind == "objects" and vocabulary is None:
            vocabulary = sorted({str(name) for shown in answers.references for name in shown})
        right = harness.right(task)
        return replace(answers, correct=None if right is None else score(right, answers), vocabulary=vocabulary)

    def _to_pixels(self, answers: Answers) -> Answers:
        """Predicted boxes and points from their frame to pixels of the original image; those outside the frame are unread."""
        sizes: dict[str, list] = {"original": [], "resized": []}
        for index in answers.indices:
            images = self.rows.sample(index, decode=False).images
            if not images:
                raise ValueError(
                    f"sample {index}: dataset must have an image to convert boxes from the frame {self.scoring.frame}"
                )
            seen = self.resized[index] or [(math.nan, math.nan)]
            if self.scoring.frame == "resized" and math.isnan(seen[0][0]):
                raise ValueError(f"sample {index}: predictions must hold 'resized', the image's size as the model saw it")
            sizes["original"].append(images[0].size)
            sizes["resized"].append(seen[0])
        per_answer = {name: np.repeat(np.array(rows, dtype=np.float64), answers.shape[1], 0) for name, rows in sizes.items()}
        moved = iter(to_frame(answers.pairs()[0], self.scoring.frame, "original", per_answer))
        return replace(answers, values=[[next(moved) for _ in group] for group in answers.values])

    def _groups(self) -> dict[str, Group]:
        groups = {}
        for name, indices in self.rows.groups().items():
            task = self.rows.tasks[indices[0]]
            answers = {view: self._parsed(self._answers(indices, view), task) for view in self.views}
            groups[name] = Group(name, self._metrics(task, answers["image"]), answers)
        for metric in self.scoring.metrics:
            kind, tasks = self.scoring.harness.metric(metric).kind, sorted(set(self.rows.tasks))
            if not any(metric in group.metrics for group in groups.values()):
                able = [task for task in TASKS if self._suits(metric, task)]
                raise ValueError(f"metric {metric} needs a task of {', '.join(able)} ({kind} answers), got {', '.join(tasks)}")
            at, _, k = metric.partition("@")
            count = len(self.completions["image"][0])
            if at in ("pass", "maj"):
                require(int(k) <= count, f"metric {metric}", f"take at most the {count} completions of a sample", k)
        return {ALL: self._whole(groups), **groups} if len(groups) > 1 else groups

    def _suits(self, name: str, task: str) -> bool:
        kind = self.scoring.harness.metric(name).kind
        return kind in ("", task, TASKS[task].answer) or (kind == "right" and TASKS[task].right is not None)

    def _metrics(self, task: str, answers: Answers) -> dict[str, Metric]:
        """The metrics of a group, but those of what is not known of its completions."""
        names = [name for name in self.scoring.metrics if self._suits(name, task)]
        if not self.scoring.metrics:
            names = [*self.scoring.harness.task_metrics(task), *self._sampled(answers), *COMMON]
        names += [REWARD + name for name in answers.rewards]
        absent = {
            "mean_length": np.isnan(answers.lengths).all(),
            "truncation_rate": np.isnan(answers.truncated).all(),
        }
        return {name: self.scoring.harness.metric(name) for name in names if not absent.get(name, False)}

    @staticmethod
    def _sampled(answers: Answers) -> list[str]:
        """pass@k for powers of two, and maj@n, of n completions; pass@1 is the accuracy."""
        n = answers.shape[1]
        if n == 1 or answers.correct is None:
            return []
        powers = {2**i for i in range(1, n.bit_length()) if 2**i < n}
        return [*(f"pass@{k}" for k in sorted(powers | {n})), f"maj@{n}"]

    def _whole(self, groups: dict[str, Group]) -> Group:
        """All samples: the metrics that any task has, and those of right answers over the samples that have them."""
        answers = {}
        for view in self.views:
            whole = self._answers(list(range(len(self.rows))), view)
            correct = np.full(whole.shape, np.nan)
            for part in (group.answers[view] for group in groups.values()):
                if part.correct is not None:
                    correct[part.indices] = part.correct
                for index, values in zip(part.indices, part.values, strict=True):
                    whole.values[index] = values
            answers[view] = replace(whole, correct=None if np.isnan(correct).all() else correct)
        image = answers["image"]
        metrics = self._metrics("open", image)
        if image.correct is not None:
            names = [name for name in self.scoring.metrics if self.scoring.harness.metric(name).kind == "right"]
            names = names if self.scoring.metrics else ["accuracy", *self._sampled(image)]
            metrics = {name: self.scoring.harness.metric(name) for name in names} | metrics
        return Group(ALL, metrics, answers)

    @property
    def bootstrap(self) -> Bootstrap:
        scoring = self.scoring
        return Bootstrap(scoring.confidence, scoring.replicates, scoring.seed, len(self.runs))

    @cached_property
    def results(self) -> list[Result]:
        """Every metric of every group, with intervals; with the image hidden beside it where it was."""
        found, options = [], self.bootstrap
        for group in self.groups.values():
            for name in group.metrics:
                seen = group.statistic(name)
                hidden = group.statistic(name, self.hidden_view) if self.hidden_view else None
                found.append(
                    Result(
                        group.name,
                        name,
                        estimate(seen, options),
                        hidden and estimate(hidden, options),
                        hidden and compare(seen, hidden, options),
                    )
                )
        return found

    def value(self, group: str, metric: str) -> float:
        """The metric of a group, without its interval."""
        return point_value(self.groups[group].statistic(metric))

    def minus(self, other: "Evaluation") -> dict[tuple[str, str], Difference]:
        """Each metric minus the other run's, by group and metric, paired by sample; both are of one dataset and scoring."""
        require(len(self.rows) == len(other.rows), "the other run", f"be of {len(self.rows)} samples", len(other.rows))
        require(len(self.runs) == len(other.runs), "the other run", f"have {len(self.runs)} seeds", len(other.runs))
        return {
            (group.name, name): compare(group.statistic(name), other.groups[group.name].statistic(name), self.bootstrap)
            for group in self.groups.values()
            for name in group.metrics
            if name in other.groups[group.name].metrics
        }


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def reward_parts(
    rewards: Rewards, rows: Rows, runs: Sequence[Predictions], view: str = "image", batch: int = 256
) -> dict[str, np.ndarray]:
    """What each reward function gives each completion, by its name, (num_samples, num_generations), NaN = not scored.

    Args:
        batch: samples at a time, whose images are in memory together.
    """
    completions, resized = joined(runs, len(rows), view), runs[0].resized_sizes(len(rows))
    parts = []
    for start in range(0, len(rows), batch):
        indices = range(start, min(start + batch, len(rows)))
        samples = {index: rows.sample(index) for index in indices}
        repeated = [samples[index] for index in indices for _ in completions[index]]
        flat = [completion for index in indices for completion in completions[index]]
        columns = sorted({name for sample in samples.values() for name in sample.row} - {"prompt", *PROVIDED})
        parts.append(
            rewards(
                len(flat),
                [sample.index for sample in repeated],
                prompts=[sample.row["prompt"] for sample in repeated],
                completions=[
                    c.text if isinstance(s.prompt, str) else [{"role": "assistant", "content": c.text}]
                    for s, c in zip(repeated, flat, strict=True)
                ],
                completion_ids=[c.ids or [] for c in flat],
                images=[sample.images for sample in repeated],
                image_sizes=[[image.size for image in sample.images] for sample in repeated],
                resized_sizes=[resized[sample.index] for sample in repeated],
                **{name: [sample.row.get(name) for sample in repeated] for name in columns},
            )
        )
    values = Scores.cat(parts).rewards.double().numpy().reshape(len(rows), len(completions[0]), -1)
    return {name: values[..., place] for place, name in enumerate(rewards.names)}
