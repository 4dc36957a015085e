"""Write a diagnosis for the terminal and as JSON."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmkernels.doctor.history import Run
from vlmkernels.doctor.rule import NOTE, PROBLEM, Example, Finding, Rule
from vlmkernels.record.html import short

WIDTH = 110
MAX_SHOWN = 300  # characters of a prompt or completion


def markdown(rules: Sequence[Rule]) -> list[str]:
    """Return the lines of the table in docs/doctor.md."""
    lines = ["| rule | holds when | threshold | remedy |", "| --- | --- | --- | --- |"]
    return [*lines, *(f"| `{rule.name}` | {rule.meaning} | {rule.source} | {rule.remedy} |" for rule in rules)]


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def summary(findings: Sequence[Finding], unchecked: dict[str, str], num_rules: int) -> str:
    """Return one line: how many problems and notes there are, and how many rules were checked."""
    problems, notes = (sum(finding.severity == severity for finding in findings) for severity in (PROBLEM, NOTE))
    found = count(problems, "problem") if problems else "No problem"
    more = f", {count(notes, 'note')}" if notes else ""
    return f"{found}{more}; {num_rules - len(unchecked)} of {num_rules} rules checked"


def about(run: Run) -> str:
    """Return one line about what was read."""
    last = run.steps[-1]["step"] if run.steps else 0
    parts = [f"step {last}", count(len(run.steps), "log")]
    parts += [f"completions of {count(len(run.completions), 'step')}"] if run.completions else []
    parts += [count(len(run.checkpoints), "checkpoint")] if run.checkpoints else []
    return ", ".join(parts)


def as_text(folder: Path, run: Run, findings: Sequence[Finding], unchecked: dict[str, str], num_rules: int) -> str:
    """Return the diagnosis for the terminal.

    Args:
        folder: the run's folder.
        unchecked: the result of ``vlmkernels.doctor.unchecked``.
        num_rules: the number of rules.
    """
    lines = [f"{folder}: {about(run)}", *(f"({note})" for note in run.notes), ""]
    for finding in findings:
        lines += [*_finding_lines(finding), ""]
    lines.append(f"{summary(findings, unchecked, num_rules)}{'. Not checked:' if unchecked else '.'}")
    reasons: dict[str, list[str]] = {}
    for name, reason in unchecked.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines += textwrap.wrap(f"{', '.join(names)}: {reason}", WIDTH, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.severity.upper()}  {finding.rule}, since step {finding.step}"
    yield from _wrapped("", finding.evidence)
    if finding.example:
        yield from _wrapped("example: ", example_text(finding.example))
    yield from _wrapped("remedy: ", finding.remedy)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)


def example_text(example: Example) -> str:
    """Return one line about a completion: its step, the end of its prompt, itself, its rewards and references."""
    prompt, completion = example.prompt.strip(), example.completion
    prompt = prompt if len(prompt) <= 100 else f"... {prompt[-100:]}"
    if len(completion) > MAX_SHOWN:
        completion = f"{completion[: MAX_SHOWN // 2]} ... {completion[-MAX_SHOWN // 2 :]}"
    return f"step {example.step}, {prompt!r} -> {completion!r} ({values_text(example)})"


def values_text(example: Example) -> str:
    """Return the rewards and the references of a completion."""
    rewards = [f"{name} {'not scored' if value is None else short(value)}" for name, value in example.rewards.items()]
    references = [f"reference {name} {value[:60]!r}" for name, value in example.references.items()]
    return ", ".join([*rewards, *references]) or "no reward"


def as_json(folder: Path, run: Run, findings: Sequence[Finding], unchecked: dict[str, str]) -> dict[str, Any]:
    """Return the diagnosis as an object for JSON."""
    return {
        "run": str(folder),
        "step": run.steps[-1]["step"] if run.steps else 0,
        "healthy": not any(finding.severity == PROBLEM for finding in findings),
        "findings": [finding.as_json() for finding in findings],
        "not_checked": unchecked,
        "notes": run.notes,
    }
