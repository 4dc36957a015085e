"""Files that a run leaves in its ``output_dir``, and writes that a killed process cannot leave half done."""

import os
from pathlib import Path

METRICS_FILE, ABOUT_FILE, COMPLETIONS_FOLDER, STATE_FILE = "metrics.jsonl", "run.json", "completions", "trainer_state.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def append(path: Path, text: str) -> None:
    """By one write to the end of the file: a killed process leaves the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if (written := os.write(file, data)) != len(data):
            raise OSError(f"{path} took {written} of {len(data)} bytes: is the disk full?")
    finally:
        os.close(file)
