"""Read the completions that TRL's ``log_completions`` writes: ``completions/completions_00012.parquet``, one row each.

The columns are step, prompt and completion (text or messages, without images), one per reward function, those that the reward
functions logged, and advantage.
"""

import math
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmkernels.record.files import COMPLETIONS_FOLDER

COLUMNS = ("step", "prompt", "completion", "advantage")
IMAGE = "[image]"


def stored_tables(folder: Path) -> dict[int, Path]:
    """Return the tables of a run by step, in ascending order."""
    paths = (folder / COMPLETIONS_FOLDER).glob("completions_*.parquet")
    found = {int(match[1]): path for path in paths if (match := re.fullmatch(r"completions_(\d+)", path.stem))}
    return dict(sorted(found.items()))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: the file is not such a table.
    """
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    if rows and (missing := [name for name in COLUMNS if name not in rows[0]]):
        raise ValueError(f"{path.name} must have the columns {', '.join(COLUMNS)}, got none named {', '.join(missing)}")
    return rows


def in_groups(tables: dict[int, list[dict[str, Any]]], reward_names: list[str]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the tables of a run as groups of completions in the schema of ``vlmkernels.record.completions``.

    A group whose prompt has images also has "images_missing": true, because a table does not hold them.

    Args:
        tables: step -> rows.
        reward_names: names of the reward functions; other columns become references.
    """
    runs = {step: [list(run) for _, run in groupby(rows, key=lambda row: row["prompt"])] for step, rows in tables.items()}
    size = next(filter(None, map(_group_size, runs.values())), None)
    return {
        step: [_group(part, reward_names) for run in adjacent for part in _parts(run, size)] for step, adjacent in runs.items()
    }


def _parts(rows: list[dict[str, Any]], size: int | None) -> list[list[dict[str, Any]]]:
    """Split rows into groups of a size, unless it does not divide their number."""
    if size is None or len(rows) % size:
        return [rows]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _group_size(runs: list[list[dict[str, Any]]]) -> int | None:
    """Return the size of groups, from adjacent rows with equal prompts; None if no completion has an advantage.

    Different images can have the same text, so that several groups look like one. The advantages of a group add up to 0.
    """
    advantages = [[row["advantage"] or 0.0 for row in run] for run in runs]
    if not any(any(run) for run in advantages):
        return None
    for size in range(2, min(map(len, runs)) + 1):
        chunks = [run[start : start + size] for run in advantages for start in range(0, len(run), size)]
        if all(len(chunk) == size and abs(sum(chunk)) < 1e-3 * size for chunk in chunks):
            return size
    return None


def _group(rows: list[dict[str, Any]], reward_names: list[str]) -> dict[str, Any]:
    prompt = text_of(rows[0]["prompt"], with_roles=True)
    others = [name for name in rows[0] if name not in (*COLUMNS, *reward_names)]
    references = {name: str(rows[0][name]) for name in others if len({str(row[name]) for row in rows}) == 1}
    completions = [
        {
            "text": text_of(row["completion"]),
            "rewards": {name: _finite(row.get(name)) for name in reward_names},
            "advantage": _finite(row["advantage"]),
        }
        for row in rows
    ]
    return {
        "prompt": prompt,
        "images": [],
        "references": references,
        "completions": completions,
        **({"images_missing": True} if IMAGE in prompt else {}),
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def text_of(value: Any, with_roles: bool = False) -> str:
    """Return the text of a prompt or completion. A trajectory with several messages of the assistant has that of the last."""
    if not isinstance(value, list):
        return str(value or "")
    if with_roles:
        return "\n".join(f"{message['role']}: {_content(message)}" for message in value)
    said = [message for message in value if message.get("role") == "assistant"] or value
    return _content(said[-1]) if said else ""


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or (IMAGE if part.get("type") != "text" else "") for part in content)
