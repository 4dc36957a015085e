"""The rules of the doctor during training, for this package's trainer and for TRL's."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from vlmkernels.doctor import NOTE, Finding, Run, diagnose

logger = logging.get_logger(__name__)

STATE_KEY = "vlmkernels.doctor"  # of what trainer_state.json remembers
FIRST, LAST = 20, 100  # logs that are kept; rules compare the first of a run with the last
FIRST_STORED, LAST_STORED = 2, 20  # logs whose completions are kept


class DoctorCallback(TrainerCallback):
    """Checks every log with the rules of ``vlmkernels.doctor``, and warns once about each rule that finds a problem.

    Only the main process checks and warns. Checkpoints remember what was found, so that a resumed run does not repeat it.
    ``GRPOConfig(diagnose=True)`` adds this callback to the trainer of this package; ``trl.GRPOTrainer`` accepts it as
    ``callbacks=[DoctorCallback()]``. Notes, which may be intended, have the level ``info``.

    Args:
        completions: returns groups of completions of the last generation batch, as in ``completions/step-*.json``. Without it,
            rules that need completions are not checked.

    Attributes:
        run: the history that the rules see: the first ``FIRST`` and the last ``LAST`` logs.
        found: the step at which each rule found something for the first time, in the order of discovery.
    """

    def __init__(self, completions: Callable[[], list[dict[str, Any]]] | None = None) -> None:
        self.run, self.found = Run(), dict[str, int]()
        self._completions = completions

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.found = dict(state.stateful_callbacks.get(STATE_KEY, {}))
        self.run = Run(steps=[entry for entry in state.log_history if "step" in entry], arguments=args.to_dict())

    def on_log(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero or "loss" not in (entry := state.log_history[-1]):
            return
        run = self.run
        run.steps.append(entry)
        if self._completions is not None:
            run.completions[state.global_step] = self._completions()
        _forget(run)
        for finding in diagnose(run):
            if finding.rule not in self.found:
                self.found[finding.rule] = state.global_step
                _report(finding, state.global_step)
        state.stateful_callbacks[STATE_KEY] = dict(self.found)


def _forget(run: Run) -> None:
    """Remove logs and completions between the first and the last ones, so that a check takes the same time in a long run."""
    del run.steps[FIRST : max(len(run.steps) - LAST, FIRST)]
    stored = sorted(run.completions)
    for step in stored[FIRST_STORED : max(len(stored) - LAST_STORED, FIRST_STORED)]:
        del run.completions[step]


def _report(finding: Finding, step: int) -> None:
    level = logger.info if finding.severity == NOTE else logger.warning
    example = "" if finding.example is None else f" Example (step {finding.example.step}): {finding.example.completion!r}."
    level("step %d: %s: %s%s %s", step, finding.rule, finding.evidence, example, finding.remedy)
