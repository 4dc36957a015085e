"""Read the history of a run from its folder. What cannot be read, but is not needed, becomes a note."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmkernels.doctor import trl
from vlmkernels.doctor.history import Run, reward_of
from vlmkernels.record.completions import MAX_STEPS, load_step, stored_steps
from vlmkernels.record.files import COMPLETIONS_FOLDER, METRICS_FILE, PREVIOUS_FOLDER, RUN_FILE, STATE_FILE
from vlmkernels.record.reading import checkpoints, find_logs, is_complete, read_about, read_log


def read_run(folder: str | Path) -> Run:
    """Read the history of a run of this package or of TRL from its ``output_dir``. The run may be running or killed.

    Raises:
        ValueError: the folder does not exist, or has no valid log.
    """
    folder, notes = Path(folder), list[str]()
    source, entries = _read_log(find_logs(folder), notes)
    about = _or_note(notes, lambda: read_about(folder / RUN_FILE), {})
    arguments = about.get("arguments")
    run = Run(entries, {}, arguments if isinstance(arguments, dict) else {}, [], source, notes)
    run.checkpoints = [step for step, path in checkpoints(folder).items() if (path / STATE_FILE).exists()]
    run.completions = _read_completions(folder, run)
    notes += _remarks(folder, run)
    return run


def _read_log(paths: list[Path], notes: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Read the newest log that is valid. Each other one that was tried becomes a note."""
    for path in paths[:-1]:
        try:
            return path, read_log(path)
        except ValueError as error:
            notes.append(f"{error}; an older log is read instead")
    return paths[-1], read_log(paths[-1])


def _or_note(notes: list[str], read: Callable[[], Any], default: Any) -> Any:
    """Return what ``read`` returns; after an error that the doctor can do without, add a note and return the default."""
    try:
        return read()
    except (ValueError, OSError) as error:
        notes.append(str(error))
        return default


def _read_completions(folder: Path, run: Run) -> dict[int, list[dict[str, Any]]]:
    """Return the groups of each stored step."""
    names = [reward_of(name) for name in run.names("rewards/*/mean")]
    stored, tables = stored_steps(folder / COMPLETIONS_FOLDER), trl.stored_tables(folder)
    if tables and find_spec("pyarrow") is None:
        run.notes.append(f"{len(tables)} tables of completions are not read, because pyarrow is not installed")
        tables = {}
    found = {step: _or_note(run.notes, partial(_stored_groups, path), []) for step, path in stored.items()}
    rows = {step: _or_note(run.notes, partial(trl.read_rows, tables[step]), []) for step in _spread(list(tables))}
    found |= trl.in_groups(rows, names)
    return {step: groups for step, groups in sorted(found.items()) if groups}


def _stored_groups(path: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = load_step(path)["groups"]
    return groups


def _spread(steps: list[int]) -> list[int]:
    """Return at most ``MAX_STEPS`` steps, the last ones and evenly spaced earlier ones."""
    half = MAX_STEPS // 2
    early, late = steps[:-half], steps[-half:]
    return [*early[:: max(1, -(-len(early) // half))], *late]


def _remarks(folder: Path, run: Run) -> list[str]:
    """Return notes about what the folder holds."""
    notes = []
    if run.source and run.source.name == METRICS_FILE and not is_complete(run.source):
        notes.append(f"the last line of {METRICS_FILE} is not complete and was ignored")
    if not any("loss" in entry or "reward" in entry for entry in run.steps):
        every = run.arguments.get("logging_steps")
        notes.append("no step of training is logged; " + (f"logging_steps={every}" if every else "see logging_steps"))
    if earlier := [path for path in folder.glob(f"{PREVIOUS_FOLDER}/*") if path.name.isdecimal()]:
        notes.append(f"{len(earlier)} earlier starts in {PREVIOUS_FOLDER}/ are not judged")
    if folder.resolve().name.startswith("checkpoint-"):
        notes.append("RUN is a checkpoint: later steps and the completions are in the folder that holds it")
    return notes
