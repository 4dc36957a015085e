"""Find faults in the history of a training run, of this package or of TRL, finished or not."""

from vlmkernels.doctor.history import Run
from vlmkernels.doctor.reading import read_run
from vlmkernels.doctor.rule import NOTE, PROBLEM, Example, Finding, Rule
from vlmkernels.doctor.rules import RULES

__all__ = ["NOTE", "PROBLEM", "RULES", "Example", "Finding", "Rule", "Run", "diagnose", "read_run", "unchecked"]


def diagnose(run: Run) -> list[Finding]:
    """Return what the rules find, problems first, then in order of steps. A rule that lacks its inputs finds nothing."""
    findings = [finding for rule in RULES if (finding := rule.finding(run))]
    return sorted(findings, key=lambda finding: (finding.severity != PROBLEM, finding.step))


def unchecked(run: Run) -> dict[str, str]:
    """Return the rules that cannot be checked, each with the input that the run lacks."""
    return {rule.name: missing for rule in RULES if (missing := rule.lacks(run))}
