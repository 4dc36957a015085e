"""The rules of the doctor during training, for this package's trainer and for TRL's."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from vlmkernels.doctor import NOTE, Finding, Run, diagnose
from vlmkernels.doctor.history import reward_of
from vlmkernels.doctor.trl import in_groups, read_rows, stored_tables
from vlmkernels.record.reading import checkpoints

logger = logging.get_logger(__name__)

STATE_KEY = "vlmkernels.doctor"  # of what trainer_state.json remembers
FIRST, LAST = 20, 1000  # logs that are kept; rules compare the first of a run with the last
FIRST_STORED, LAST_STORED = 3, 20  # logs whose completions are kept
MAX_EXAMPLE = 200  # characters of a completion in a warning


class DoctorCallback(TrainerCallback):
    """Checks every log with the rules of ``vlmkernels.doctor``, and warns once about each rule that finds a problem.

    Only the main process checks and warns. Checkpoints remember what was found, so that a resumed run does not repeat it.
    ``GRPOConfig(diagnose=True)`` adds this callback to the trainer of this package; ``trl.GRPOTrainer`` accepts it as
    ``callbacks=[DoctorCallback()]``. Notes, about what may be intended, have the level ``info``.

    Args:
        completions: returns groups of completions of the last generation batch, as in ``completions/step-*.json``. By default
            they are read from the tables that TRL writes with ``log_completions``, if pyarrow is installed. TRL writes a table
            after its log, so that the rules read it at the next log.

    Attributes:
        run: the history that the rules read: the first ``FIRST`` and the last ``LAST`` logs.
        found: the step at which each rule found something for the first time.
    """

    def __init__(self, completions: Callable[[], list[dict[str, Any]]] | None = None) -> None:
        self.run, self.found = Run(), dict[str, int]()
        self._completions = completions

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = dict(state.stateful_callbacks.get(STATE_KEY, {}))
        self.run = Run(list(state.log_history), {}, args.to_dict(), list(checkpoints(Path(args.output_dir))))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run = replace(self.run, checkpoints=list(checkpoints(Path(args.output_dir))))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        completions = self.run.completions | self._new_completions(args, state.global_step)
        stored = _ends(sorted(completions), FIRST_STORED, LAST_STORED)
        steps = _ends([*self.run.steps, state.log_history[-1]], FIRST, LAST)
        self.run = replace(self.run, steps=steps, completions={step: completions[step] for step in stored})
        for finding in self._findings():
            if finding.rule not in self.found:
                self.found[finding.rule] = state.global_step
                _report(finding, state.global_step)
        state.stateful_callbacks[STATE_KEY] = dict(self.found)

    def _findings(self) -> list[Finding]:
        try:
            return diagnose(self.run)
        except Exception as error:  # must not end training, least of all on one of several processes
            logger.warning_once(f"the doctor cannot check this log: {error!r}")
            return []

    def _new_completions(self, args: Any, step: int) -> dict[int, list[dict[str, Any]]]:
        """Return the completions of this log, or those of the log before if TRL stores them."""
        if self._completions is not None:
            return {step: self._completions()}
        if not (self.run.steps and getattr(args, "log_completions", False) and find_spec("pyarrow")):
            return {}
        before, tables = self.run.steps[-1]["step"], stored_tables(Path(args.output_dir))
        names = [reward_of(name) for name in self.run.names("rewards/*/mean")]
        try:
            return in_groups({before: read_rows(tables[before])}, names) if before in tables else {}
        except (OSError, ValueError) as error:
            logger.warning_once(f"the doctor cannot read completions: {error}")
            return {}


def _ends(values: list[Any], first: int, last: int) -> list[Any]:
    """Return the first and the last values, so that a check takes the same time in a long run."""
    return values[:first] + values[max(len(values) - last, first) :]


def _report(finding: Finding, step: int) -> None:
    level, shown = logger.info if finding.severity == NOTE else logger.warning, ""
    if finding.example is not None:
        shown = f" Example (step {finding.example.step}): {finding.example.completion[:MAX_EXAMPLE]!r}."
    level("step %d: %s: %s%s %s", step, finding.rule, finding.evidence, shown, finding.remedy)
