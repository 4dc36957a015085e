"""Metrics of predictions: answers are parsed and graded in groups of samples, with intervals and paired comparisons."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vlmkernels.data.dataset import column_names, row_name, with_columns
from vlmkernels.data.images import DEFAULT_LIMITS, ImageLimits
from vlmkernels.data.samples import MEDIA_COLUMNS, Sample, prompt_text, read_sample
from vlmkernels.evaluate.metrics import REWARD, Answers, Metric
from vlmkernels.evaluate.predictions import VIEWS, Completion, Predictions, concat_runs
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
from vlmkernels.ops.checks import require_one_of
from vlmkernels.rewards import Rewards, Scores, Unparsed
from vlmkernels.rewards.answers import THINK
from vlmkernels.rewards.boxes import FRAMES
from vlmkernels.rewards.builtin import to_frame
from vlmkernels.rewards.signature import accepted
from vlmkernels.rollout.score import score

ALL = "all"  # the group of all samples
# Metrics whose values may be unknown -> the field of a completion in a file of predictions.
FIELDS = {"mean_length": "length", "truncation_rate": "truncated"}
FIELDS |= {"mean_turns": "turns", "mean_tool_calls": "tool_calls", "mean_tool_failures": "tool_failures"}
OF_TRAJECTORIES = ("environments", "environment_rewards", "tool_images")  # arguments of rewards that no file of predictions has


@dataclass(frozen=True)
class Scoring:
    """How predictions are scored.

    Args:
        task: task of every sample. Default: the dataset's column ``task``. Without that column, "exact" if there is a column
            ``answer``, otherwise "open".
        metrics: metrics to report instead of the default metrics of the tasks.
        match: the harness whose thresholds and comparisons are used, a key of ``HARNESSES``.
        by: the column whose values form the groups. Default: ``category`` if there is such a column, otherwise the task.
        frame: coordinate frame of predicted boxes and points, a key of ``FRAMES``. References are in pixels of the original
            image.
        vocabulary: names of the objects that CHAIR looks for, or a mapping of names to synonyms. Default: the names in all
            references.
        confidence, replicates, seed: see ``Bootstrap``.

    Raises:
        ValueError: a value is invalid.
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
            _check_task("task", self.task)
        for name in self.metrics:
            self.harness.metric(name)
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {self.confidence}")
        if self.replicates < 1:
            raise ValueError(f"replicates must be >= 1, got {self.replicates}")

    @property
    def harness(self) -> Harness:
        """The harness of ``match``."""
        return HARNESSES[self.match]


def _check_task(name: str, value: Any) -> None:
    if value not in TASKS:
        near = difflib.get_close_matches(str(value), TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(TASKS)}, got {value!r}{hint}")


class Result(NamedTuple):
    """A metric of a group.

    Attributes:
        estimate: the metric with its interval.
        hidden: the metric with the image hidden. None without a view that hides it.
        cost: the difference ``estimate - hidden``, that is, the effect of the image.
    """

    group: str
    metric: str
    estimate: Estimate
    hidden: Estimate | None = None
    cost: Difference | None = None


@dataclass
class Group:
    """Samples that are reported together, with their metrics by name and their answers by view."""

    name: str
    metrics: dict[str, Metric]
    answers: dict[str, Answers]
    _statistics: dict[tuple[str, str], Statistic] = field(default_factory=dict)

    def statistic(self, metric: str, view: str = "image") -> Statistic:
        """Return the statistic of a metric for the answers of a view. It is computed once."""
        if (metric, view) not in self._statistics:
            self._statistics[metric, view] = self.metrics[metric].statistic(self.answers[view])
        return self._statistics[metric, view]


class EvaluationRows:
    """A dataset's rows without images, with the task, group and reference of each sample.

    Args:
        dataset: rows with ``prompt`` and the columns that the tasks need.
        scoring: selects the tasks and the groups.
        limits: limits of images.

    Raises:
        TypeError, ValueError: a column is missing or a reference is invalid; the message has the sample's index.
    """

    def __init__(self, dataset: Any, scoring: Scoring, limits: ImageLimits = DEFAULT_LIMITS):
        if not len(dataset):
            raise ValueError("dataset must hold at least one sample, got 0")
        self.dataset, self.limits = dataset, limits
        self.columns = names = column_names(dataset)
        self.match = scoring.match
        plain = dataset
        if hasattr(dataset, "remove_columns"):  # reading the rows of datasets would decode their images
            plain = dataset.remove_columns([name for name in MEDIA_COLUMNS if name in names])
        self.rows = [{k: v for k, v in plain[i].items() if k not in MEDIA_COLUMNS} for i in range(len(plain))]
        if scoring.task is None and "task" not in names:
            self.tasks = ["exact" if "answer" in names else "open"] * len(self.rows)
        else:
            self.tasks = [scoring.task or row.get("task") for row in self.rows]
        by = scoring.by or ("category" if "category" in names else None)
        if by is not None and by not in names:
            raise ValueError(f"by must be a column of the dataset ({', '.join(names)}), got {by!r}")
        self.group_names = [str(row.get(by)) if by else task for row, task in zip(self.rows, self.tasks, strict=True)]
        self.references = [self._reference(index, names) for index in range(len(self.rows))]

    def _reference(self, index: int, names: Sequence[str]) -> Any:
        row, task, where = self.rows[index], self.tasks[index], row_name(self.dataset, index)
        if "prompt" not in row:
            raise ValueError(f"{where}: dataset must have a column 'prompt', got {', '.join(row)}")
        _check_task(f"{where}: task", task)
        column = TASKS[task].column
        if column not in row and task != "open":
            raise ValueError(f"{where}: dataset must have a column {column!r} for the task {task}, got {', '.join(names)}")
        try:
            HARNESSES[self.match].check(task, row)
        except ValueError as error:
            raise ValueError(f"{where}: with match {self.match!r}, {error}") from None
        try:
            TASKS[task].check_reference(row.get(column))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {column} {error}") from error
        return row.get(column)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, decode: bool = True) -> Sample:
        """Return a sample with its images; see ``read_sample``."""
        row = with_columns(self.dataset[index], self.columns)
        return read_sample(row, index, decode, self.limits, row_name(self.dataset, index))

    def groups(self) -> dict[str, list[int]]:
        """Return the indices of each group's samples, in the order of the dataset. All samples of a group have one task."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(zip(self.group_names, self.tasks, strict=True)):
            found.setdefault(key, []).append(index)
        ambiguous = {ALL} | {name for name, _ in found if sum(other == name for other, _ in found) > 1}
        return {f"{name} ({task})" if name in ambiguous else name: indices for (name, task), indices in found.items()}


def _with_opened_think(answers: Answers) -> list[list[str]]:
    """Return the completions, after ``<think>`` where the prompt ends with it."""
    if answers.think_opened is None:
        return answers.texts
    groups = zip(answers.texts, answers.think_opened, strict=True)
    return [[THINK + t if opened else t for t, opened in zip(*group, strict=True)] for group in groups]


class Evaluation:
    """The metrics of predictions on a dataset.

    Args:
        predictions: see ``predict`` and ``Predictions.read``. Several are runs of one method with different training seeds.
        dataset: rows with ``prompt`` and the columns that the tasks need, or ``EvaluationRows``.
        scoring: see ``Scoring``.
        rewards: rewards (num_samples, num_generations) by view and name; see ``reward_parts``.

    Attributes:
        groups: the groups by name. If there are several, the first is ``ALL``, with all samples.
        views: the views that all predictions have.
        completions: the completions of each sample, by view.

    Raises:
        TypeError, ValueError: the dataset, the predictions and the metrics are incompatible.
    """

    def __init__(
        self,
        predictions: Predictions | Sequence[Predictions],
        dataset: Any,
        scoring: Scoring | None = None,
        rewards: dict[str, dict[str, np.ndarray]] | None = None,
    ):
        self.scoring = scoring or Scoring()
        self.runs = [predictions] if isinstance(predictions, Predictions) else list(predictions)
        self.rows = dataset if isinstance(dataset, EvaluationRows) else EvaluationRows(dataset, self.scoring)
        self.rewards = rewards or {}
        self.views = [view for view in VIEWS if all(view in run.views for run in self.runs)]
        if self.views[:1] != ["image"]:
            raise ValueError(f"predictions must have the view 'image', got {self.views}")
        self.completions = {view: concat_runs(self.runs, len(self.rows), view) for view in self.views}
        self.resized = self.runs[0].resized_sizes(len(self.rows))
        self.groups = self._groups()

    @property
    def hidden_view(self) -> str | None:
        """The view in which the image is hidden; None if there is none."""
        return self.views[1] if len(self.views) > 1 else None

    def _answers(self, indices: list[int], view: str) -> Answers:
        """Collect the completions and columns of samples, without parsing the answers."""
        rows, completions = self.rows, [self.completions[view][index] for index in indices]
        lengths, truncated = (
            np.array([[_or_nan(getattr(c, name)) for c in group] for group in completions]) for name in ("length", "truncated")
        )
        turns = np.array([[[_or_nan(value) for value in c.counts] for c in group] for group in completions])
        return Answers(
            indices=indices,
            texts=[[c.text for c in group] for group in completions],
            values=[[None for _ in group] for group in completions],
            references=[rows.references[index] for index in indices],
            rows=[rows.rows[index] for index in indices],
            prompts=[prompt_text(rows.rows[index]["prompt"]) for index in indices],
            lengths=lengths,
            truncated=truncated,
            turns=turns,
            rewards={name: values[indices] for name, values in self.rewards.get(view, {}).items()},
            think_opened=[[c.think_opened for c in group] for group in completions],
        )

    def _parsed(self, answers: Answers, task: str) -> Answers:
        """Parse and grade the answers of one task."""
        harness, vocabulary, kind = self.scoring.harness, self.scoring.vocabulary, TASKS[task].answer
        # Other harnesses parse the completion alone.
        texts = zip(answers.texts if harness.rules else _with_opened_think(answers), answers.rows, strict=True)
        answers = replace(answers, values=[[harness.parse(task, text, row) for text in group] for group, row in texts])
        if kind in ("box", "boxes", "point"):
            answers = self._to_pixels(answers, harness.rules[task].to_pixels if task in harness.rules else None)
        if kind == "objects" and vocabulary is None:
            vocabulary = sorted({str(name) for shown in answers.references for name in shown})
        grade = harness.grade(task)
        if grade is None:
            return replace(answers, vocabulary=vocabulary)
        scores = grade(*answers.pairs())
        found = iter(scores)  # math_equal parses its texts itself
        values = [[None if isinstance(next(found), Unparsed) else value for value in group] for group in answers.values]
        correct = np.array([score or 0.0 for score in scores], dtype=np.float64).reshape(answers.shape)
        return replace(answers, values=values, correct=correct, vocabulary=vocabulary)

    def _to_pixels(self, answers: Answers, convert: Callable | None) -> Answers:
        """Convert predicted boxes and points to pixels of the original image. Those outside the frame become None.

        ``convert`` is ``Rule.to_pixels``.
        """
        if convert is not None:
            if self.scoring.frame != "original":
                match, frame = self.scoring.match, self.scoring.frame
                raise ValueError(f"frame must be 'original' with match {match!r}, which guesses the frame, got {frame!r}")
            images = [self.rows.sample(index, decode=False).images for index in answers.indices]
            values = [
                [None if value is None else convert(value, own[0].size if own else None) for value in group]
                for own, group in zip(images, answers.values, strict=True)
            ]
            return replace(answers, values=values)
        if self.scoring.frame == "original":
            return answers
        sizes: dict[str, list] = {"original": [], "resized": []}
        for index in answers.indices:
            images = self.rows.sample(index, decode=False).images
            if not images:
                raise ValueError(
                    f"sample {index}: dataset must have an image to convert boxes from the frame {self.scoring.frame}"
                )
            resized = self.resized[index] or [(math.nan, math.nan)]
            if self.scoring.frame == "resized" and math.isnan(resized[0][0]):
                raise ValueError(f"sample {index}: predictions must hold 'resized', the image's size as the model saw it")
            sizes["original"].append(images[0].size)
            sizes["resized"].append(resized[0])
        per_answer = {name: np.repeat(np.array(rows, dtype=np.float64), answers.shape[1], 0) for name, rows in sizes.items()}
        moved = iter(to_frame(answers.pairs()[0], self.scoring.frame, "original", per_answer, self.scoring.harness.slack))
        return replace(answers, values=[[next(moved) for _ in group] for group in answers.values])

    def _groups(self) -> dict[str, Group]:
        groups = {}
        for name, indices in self.rows.groups().items():
            task = self.rows.tasks[indices[0]]
            answers = {view: self._parsed(self._answers(indices, view), task) for view in self.views}
            groups[name] = Group(name, self._metrics(task, answers["image"]), answers)
        for metric in self.scoring.metrics:
            self._check_metric(metric, groups)
        return {ALL: self._all_samples(groups), **groups} if len(groups) > 1 else groups

    def _check_metric(self, metric: str, groups: dict[str, Group]) -> None:
        """Raise if no group or reward has the metric, or if it needs more completions than there are."""
        rewards = self.rewards.get("image", {})
        if metric.startswith(REWARD) and metric.removeprefix(REWARD) not in rewards:
            raise ValueError(f"metric {metric} needs a reward of this name, got {', '.join(rewards) or 'no rewards'}")
        if not any(metric in group.metrics for group in groups.values()):
            if metric in FIELDS:
                raise ValueError(f"metric {metric} needs completions with the field {FIELDS[metric]!r}, got none")
            kind, tasks = self.scoring.harness.metric(metric).kind, sorted(set(self.rows.tasks))
            suitable = [task for task in TASKS if self._suits(metric, task)]
            raise ValueError(f"metric {metric} needs a task of {', '.join(suitable)} ({kind} answers), got {', '.join(tasks)}")
        prefix, _, k = metric.partition("@")
        count = len(self.completions["image"][0])
        if prefix in ("pass", "maj") and int(k) > count:
            raise ValueError(f"metric {metric} must take at most the {count} completions of a sample, got {k}")

    def _suits(self, name: str, task: str) -> bool:
        kind = self.scoring.harness.metric(name).kind
        return kind in ("", task, TASKS[task].answer) or (kind == "graded" and TASKS[task].grade is not None)

    def _metrics(self, task: str, answers: Answers) -> dict[str, Metric]:
        """Return the metrics of a group, without those whose values are unknown."""
        names = [name for name in self.scoring.metrics if self._suits(name, task)]
        if not self.scoring.metrics:
            names = [*self.scoring.harness.task_metrics(task), *self._metrics_of_several(answers), *COMMON]
        names += [REWARD + name for name in answers.rewards]
        values = (answers.lengths, answers.truncated, *np.moveaxis(answers.turns, -1, 0))
        unknown = {name for name, value in zip(FIELDS, values, strict=True) if np.isnan(value).all()}
        return {name: self.scoring.harness.metric(name) for name in names if name not in unknown}

    @staticmethod
    def _metrics_of_several(answers: Answers) -> list[str]:
        """Return pass@k for powers of two and maj@n, for n > 1 completions; pass@1 is the accuracy."""
        n = answers.shape[1]
        if n == 1 or answers.correct is None:
            return []
        powers = {2**i for i in range(1, n.bit_length()) if 2**i < n}
        return [*(f"pass@{k}" for k in sorted(powers | {n})), f"maj@{n}"]

    def _all_samples(self, groups: dict[str, Group]) -> Group:
        """Return the group of all samples.

        It has the metrics that suit every task, and the metrics of graded answers over the samples whose answers are graded.
        """
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
            names = [name for name in self.scoring.metrics if self.scoring.harness.metric(name).kind == "graded"]
            names = names if self.scoring.metrics else ["accuracy", *self._metrics_of_several(image)]
            metrics = {name: self.scoring.harness.metric(name) for name in names} | metrics
        return Group(ALL, metrics, answers)

    @property
    def bootstrap(self) -> Bootstrap:
        """Options of the intervals."""
        scoring = self.scoring
        return Bootstrap(scoring.confidence, scoring.replicates, scoring.seed, len(self.runs))

    @cached_property
    def results(self) -> list[Result]:
        """All metrics of all groups with their intervals, also with the image hidden if there is such a view."""
        found, options = [], self.bootstrap
        for group in self.groups.values():
            for name in group.metrics:
                shown = group.statistic(name)
                result = Result(group.name, name, estimate(shown, options))
                if self.hidden_view:
                    hidden = group.statistic(name, self.hidden_view)
                    result = result._replace(hidden=estimate(hidden, options), cost=compare(shown, hidden, options))
                found.append(result)
        return found

    def value(self, group: str, metric: str) -> float:
        """Return a metric of a group without its interval."""
        return point_value(self.groups[group].statistic(metric))

    def minus(self, other: "Evaluation") -> dict[tuple[str, str], Difference]:
        """Return the difference of each metric from another run, by group and metric, paired by sample.

        Raises:
            ValueError: the runs have different numbers of samples or of seeds.
        """
        if len(self.rows) != len(other.rows):
            raise ValueError(f"the other run must have {len(self.rows)} samples, got {len(other.rows)}")
        if len(self.runs) != len(other.runs):
            raise ValueError(f"the other run must have {len(self.runs)} seeds, got {len(other.runs)}")
        return {
            (group.name, name): compare(group.statistic(name), other.groups[group.name].statistic(name), self.bootstrap)
            for group in self.groups.values()
            for name in group.metrics
            if name in other.groups[group.name].metrics
        }


@dataclass(frozen=True)
class Comparison:
    """A run and another one to compare it with, sample by sample, with their names."""

    name: str
    run: Evaluation
    other_name: str
    other: Evaluation

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """The difference of each metric, by group and metric."""
        return self.run.minus(self.other)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def reward_parts(
    rewards: Rewards | None, rows: EvaluationRows, runs: Sequence[Predictions], view: str = "image", batch_size: int = 256
) -> dict[str, np.ndarray]:
    """Score predictions with reward functions, except for rewards that the predictions hold.

    The functions see the text of a completion; of a trajectory that is the last turn.

    Args:
        rewards: the reward functions. Default: none.
        rows: the dataset.
        runs: predictions; the completions of a sample are concatenated over all runs.
        view: the view of the predictions to score.
        batch_size: number of samples whose images are in memory at the same time.

    Returns:
        Rewards (num_samples, num_generations) by name of the reward function; NaN if not scored.

    Raises:
        ValueError: a function needs what exists only while trajectories are sampled, and predictions do not hold its rewards.
    """
    completions, resized = concat_runs(runs, len(rows), view), runs[0].resized_sizes(len(rows))
    found = _held_rewards(completions)
    missing = [spec for spec, name in zip(rewards.specs, rewards.names, strict=True) if name not in found] if rewards else []
    if not missing:
        return found
    rewards, parts = Rewards(missing), []
    for entry in rewards.entries:
        named = accepted(entry.function, dict.fromkeys((*OF_TRAJECTORIES, "any_other_argument")))
        if named and "any_other_argument" not in named:
            raise ValueError(
                f"reward {entry.name} needs {', '.join(named)}, which exist only while completions are sampled with tools, and"
                f" {', '.join(str(run.path) for run in runs)} has no values of this reward"
            )
    for start in range(0, len(rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows)))
        samples = {index: rows.sample(index) for index in indices}
        repeated = [samples[index] for index in indices for _ in completions[index]]
        flat = [completion for index in indices for completion in completions[index]]
        texts, ids, sizes = [c.text for c in flat], [c.ids or [] for c in flat], [resized[s.index] for s in repeated]
        opened = [c.think_opened for c in flat]
        parts.append(score(rewards, repeated, texts, ids, sizes, think_opened=opened).scores)
    values = Scores.cat(parts).rewards.double().numpy().reshape(len(rows), len(completions[0]), -1)
    return found | {name: values[..., place] for place, name in enumerate(rewards.names)}


def _held_rewards(completions: list[list[Completion]]) -> dict[str, np.ndarray]:
    """Return the rewards that all predictions hold, by name, (num_samples, num_generations); NaN if not scored."""
    names = completions[0][0].rewards or {}
    held = [name for name in names if all(name in (c.rewards or {}) for group in completions for c in group)]
    return {name: np.array([[_or_nan((c.rewards or {})[name]) for c in group] for group in completions]) for name in held}
