"""The datasets of a run: the prompts that environments leave out, checks of every row, and the samples of the rows."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers.utils import logging

from vlmkernels.data.dataset import RowChecks, SampleDataset, check_dataset
from vlmkernels.data.resolution import LengthCheck
from vlmkernels.models.families import TEXT, Family
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.agent import Agent
from vlmkernels.train.config import GRPOConfig

logger = logging.get_logger(__name__)

_PROMPT = [{"role": "user", "content": ""}]  # to which an environment that owns the data appends its observation


def with_prompts(train_dataset: Any, eval_dataset: Any, agent: Agent | None, args: GRPOConfig) -> tuple[Any, Any]:
    """Return the datasets; with environments, rows without a prompt get an empty one, and there can be no training dataset.

    Raises:
        ValueError: there is no training dataset, and the environment of a row or the number of steps is not known.
    """
    if agent is None or not agent.tools.has_environments:
        return train_dataset, eval_dataset
    only_evaluates = eval_dataset is not None and (agent.tools.multi_environment or args.max_steps <= 0)
    if train_dataset is None and not only_evaluates:
        if agent.tools.multi_environment:
            raise ValueError(
                "train_dataset must be given with several environments: its column environment names that of each row, got None"
            )
        if args.max_steps <= 0:
            raise ValueError(f"max_steps must be > 0 without train_dataset, got {args.max_steps}")
        train_dataset = [{"prompt": _PROMPT}] * (args.prompts_per_round * args.world_size)
    if isinstance(eval_dataset, dict):
        eval_dataset = type(eval_dataset)({name: _with_prompt(dataset) for name, dataset in eval_dataset.items()})
    else:
        eval_dataset = _with_prompt(eval_dataset)
    return _with_prompt(train_dataset), eval_dataset


def _with_prompt(dataset: Any) -> Any:
    """Return a dataset with an empty prompt in each row, if none has a prompt."""
    if hasattr(dataset, "add_column"):
        missing = "prompt" not in dataset.column_names
        return dataset.add_column("prompt", [_PROMPT] * len(dataset)) if missing else dataset
    if isinstance(dataset, (list, tuple)) and all(isinstance(row, dict) and "prompt" not in row for row in dataset):
        return [{"prompt": _PROMPT} | row for row in dataset]
    return dataset


@dataclass(frozen=True)
class CheckedDatasets:
    """The result of ``check_datasets``.

    Args:
        train_dataset, eval_dataset: the datasets, or None; eval_dataset may be a dict of datasets.
        media: the kinds of media that training can have, of "image" and "video".
        columns: for each dataset, the union of the columns of its rows.
        unusable: for each dataset, the indices of its rows that cannot be used, with the reasons.
    """

    train_dataset: Any
    eval_dataset: Any
    media: set[str]
    columns: dict[str, list[str]]
    unusable: dict[str, dict[int, str]]
    args: GRPOConfig

    def samples(self, dataset: Any, name: str) -> SampleDataset:
        """Return the samples of a checked dataset. With ``on_bad_sample="skip"``, unusable rows are replaced."""
        known = self.unusable.get(name), self.columns.get(name, ())
        return SampleDataset(dataset, name, self.args.image_limits(), self.args.on_bad_sample, *known)

    def evaluation(self, eval_dataset: Any, choice: Any = None) -> SampleDataset:
        """Return the samples to evaluate on.

        Args:
            eval_dataset: the evaluation dataset of the trainer, or a dict of datasets.
            choice: a key of ``eval_dataset``, or another dataset, or None for ``eval_dataset``.
        """
        if isinstance(choice, str):
            return self.samples(eval_dataset[choice], f"eval_dataset[{choice!r}]")
        dataset = eval_dataset if choice is None else choice
        if dataset is None:
            raise ValueError("eval_dataset must be given to evaluate, got None")
        # Only the trainer's dataset was checked: the unusable rows of another one are not known.
        return self.samples(dataset, "eval_dataset" if dataset is eval_dataset else "the given eval_dataset")


def check_datasets(
    train_dataset: Any,
    eval_dataset: Any,
    processor: Any,
    family: Family,
    num_embeddings: int,
    rewards: Rewards,
    agent: Agent | None,
    args: GRPOConfig,
) -> CheckedDatasets:
    """Check every row of the datasets.

    Args:
        train_dataset, eval_dataset: see ``CheckedDatasets``.
        processor, family, num_embeddings: see ``vlmkernels.train.setup.load_processing``.
        agent: the tools, or None.

    Raises:
        ValueError, TypeError: a row cannot be used and ``on_bad_sample`` is "raise", a column that a reward function needs is
            missing, a dataset mixes images and videos that the model cannot run in one batch, or the training dataset has too
            few rows for one generation batch.
    """
    media: set[str] = set()
    columns: dict[str, list[str]] = {}
    unusable: dict[str, dict[int, str]] = {}
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    else:
        datasets["eval_dataset"] = eval_dataset

    def check_row(row: dict[str, Any], where: str) -> None:
        if agent is not None:
            agent.check_row(row, where)
        if not args.remove_unused_columns:
            rewards.check_row(row, where)

    def check_columns(names: list[str], name: str) -> None:
        rewards.check_columns([] if args.remove_unused_columns else names, name)

    check_length, schedule = None, args.resolution_schedule()
    if schedule is not None:
        schedule.check(processor)
        if args.max_prompt_length is not None:  # otherwise, a prompt would become too long in the middle of the run
            check_length = LengthCheck(processor, schedule, args.max_prompt_length)
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        bad = unusable[name] = {}
        skipped = bad if args.on_bad_sample == "skip" else None
        checks = RowChecks(partial(check_columns, name=name), check_row, num_embeddings, family, check_length)
        kinds, columns[name] = check_dataset(
            dataset, name, processor, args.chat_template_kwargs, checks, bad=skipped, limits=args.image_limits()
        )
        if name == "train_dataset":
            media = kinds if agent is None or family is TEXT else kinds | {"image"}  # tools can return images
        if bad:
            reason = next(iter(bad.values()))
            message = "%s: %d of %d samples are not used (on_bad_sample='skip'); the first: %s"
            logger.warning(message, name, len(bad), len(dataset), reason)
    num_prompts, batch = args.prompts_per_round * args.world_size, "one generation batch"
    if args.oversampling > 1:
        batch = f"the first round of a generation batch with oversampling = {args.oversampling:g}"
    if train_dataset is not None and len(train_dataset) < num_prompts:
        raise ValueError(f"train_dataset must hold at least the {num_prompts} prompts of {batch}, got {len(train_dataset)}")
    return CheckedDatasets(train_dataset, eval_dataset, media, columns, unusable, args)
