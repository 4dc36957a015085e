"""The section of a run's page with what the doctor finds."""

from collections.abc import Iterator
from html import escape

from vlmkernels.doctor import PROBLEM, RULES, Finding, Run, diagnose, unchecked
from vlmkernels.doctor.output import summary, values_text
from vlmkernels.record.html import picture
from vlmkernels.report.curves import Point, curve

MAX_SHOWN = 1000  # characters of a prompt or completion

STYLE = """
.finding { display: grid; gap: .4rem 1.5rem; grid-template-columns: minmax(0, 1fr) minmax(0, 20rem); padding: .7rem 1rem; }
.finding { border-left: 4px solid #e08a1e; overflow: visible; } .finding.problem { border-left-color: rgb(var(--bad)); }
.finding h3 { font-size: 1rem; margin: 0; } .finding h3 small { font-weight: 400; opacity: .7; }
.finding p { margin: .3rem 0; } .finding pre { max-height: 12rem; overflow: auto; flex: 1 1 10rem; }
.finding figure.example { background: var(--soft); display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: .4rem .6rem; }
.finding .example img { max-height: 8rem; width: auto; }
.finding small { opacity: .75; overflow-wrap: anywhere; } .finding svg { width: 100%; height: auto; overflow: visible; }
@media (max-width: 50rem) { .finding { grid-template-columns: minmax(0, 1fr); } }
"""


def findings_html(run: Run) -> str:
    """Return the section: each finding with its evidence, curve, example and remedy, then which rules were checked."""
    findings, skipped = diagnose(run), unchecked(run)
    notes = "".join(f'<p class="still">{escape(note)}</p>' for note in run.notes)
    return (
        f"<h2>Doctor <small>{escape(summary(findings, skipped, len(RULES)))}</small></h2>{notes}"
        f"{''.join(_finding(run, finding) for finding in findings)}{_rules(findings, skipped)}"
    )


def _finding(run: Run, finding: Finding) -> str:
    parts = [
        f"<h3>{escape(finding.rule)} <small>{escape(finding.severity)}, since step {finding.step}</small></h3>",
        f"<p>{escape(finding.evidence)}</p>",
        *_example(finding),
        f"<p><b>Remedy</b> {escape(finding.remedy)}</p>",
    ]
    logs = run.curve(finding.metric) if finding.metric else None
    points = [Point(*log) for log in zip(logs.steps, logs.values, strict=True)] if logs else []
    drawn = curve(finding.metric or "", points, mark=finding.step) if points else ""
    style = "finding problem" if finding.severity == PROBLEM else "finding"
    return f'<section class="{style}"><div>{"".join(parts)}</div><div>{drawn}</div></section>'


def _example(finding: Finding) -> Iterator[str]:
    if finding.example:
        example = finding.example
        yield f"<small>A completion of step {example.step}: {escape(values_text(example))}</small>"
        images = "".join(map(picture, example.images))
        texts = "".join(f"<pre>{escape(_shortened(text))}</pre>" for text in (example.prompt, example.completion))
        yield f'<figure class="example">{images}{texts}</figure>'


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}\n[...]\n{text[-MAX_SHOWN // 2 :]}"


def _rules(findings: list[Finding], skipped: dict[str, str]) -> str:
    """Return the table of all rules: what they mean, and whether they found something, nothing, or lack an input."""
    results = {name: f"not checked: {reason}" for name, reason in skipped.items()}
    results |= {finding.rule: f"{finding.severity}, since step {finding.step}" for finding in findings}
    rows = "".join(
        f"<tr><td>{rule.name}</td><td>{escape(rule.meaning)}</td><td>{escape(results.get(rule.name, 'not found'))}</td></tr>"
        for rule in RULES
    )
    return f'<details><summary>All rules</summary><table class="facts">{rows}</table></details>'
