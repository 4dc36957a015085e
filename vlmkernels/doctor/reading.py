"""Read the history of a run from its folder."""

from pathlib import Path

from vlmkernels.doctor.history import Run
from vlmkernels.record.completions import load_step, stored_steps
from vlmkernels.record.files import COMPLETIONS_FOLDER, RUN_FILE
from vlmkernels.record.reading import checkpoints, find_log, read_about, read_log


def read_run(folder: str | Path) -> Run:
    """Read the history of a run from its ``output_dir``.

    Raises:
        ValueError: the folder does not exist, or has no valid log.
    """
    folder = Path(folder)
    source = find_log(folder)
    completions = {step: load_step(path)["groups"] for step, path in stored_steps(folder / COMPLETIONS_FOLDER).items()}
    arguments = read_about(folder / RUN_FILE).get("arguments", {})
    return Run(read_log(source), completions, arguments, list(checkpoints(folder)), source)
