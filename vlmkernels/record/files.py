"""Names of the files in a run's ``output_dir``, and writes that a killed process cannot leave half done."""

import os
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
COMPLETIONS_FOLDER = "completions"
PREVIOUS_FOLDER = "previous"  # holds a numbered folder with the files of each earlier start in the same output_dir
STATE_FILE = "trainer_state.json"  # written by transformers.Trainer


def encoded(text: str) -> bytes:
    """Encode text as UTF-8. A lone surrogate, which has none, becomes its escape, which JSON reads as the surrogate."""
    return text.encode("utf-8", "backslashreplace")


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file and rename it to ``path``, so that no reader sees a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(encoded(text))
    os.replace(partial, path)


def append_atomic(path: Path, text: str) -> None:
    """Append ``text`` with a single write, so that a killed process leaves either all of it or nothing.

    Raises:
        OSError: the file system accepted only a part of the text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = encoded(text)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if (written := os.write(file, data)) != len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written to {path}: is the disk full?")
    finally:
        os.close(file)
