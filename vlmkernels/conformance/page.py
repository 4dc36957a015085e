"""Views of a report: a table for the terminal, an HTML page, and the tables of docs/conformance.md."""

from collections.abc import Iterable, Iterator
from html import escape
from itertools import chain

from vlmkernels.conformance.contract import (
    DOCUMENTED,
    ERROR,
    FAIL,
    NOT_APPLICABLE,
    PASS,
    Contract,
    Result,
)
from vlmkernels.conformance.report import LEGEND, STATUSES, Report
from vlmkernels.conformance.suite import all_contracts
from vlmkernels.record.html import document

# The parts of a trainer, by the first half of a contract's name.
PARTS = {
    "adapter": "The adapter",
    "advantages": "Advantages",
    "loss": "The objective",
    "logits": "Log-probabilities from logits",
    "hidden": "Log-probabilities from hidden states",
    "logps": "Log-probabilities of a model",
    "process": "Model inputs",
    "positions": "Position ids",
    "split": "Micro-batches",
    "sample": "Sampling",
}
HEADINGS = {FAIL: "Failures", ERROR: "Errors", DOCUMENTED: "Documented differences"}


def parts() -> dict[str, list[Contract]]:
    """Return the contracts of each part."""
    return {key: [each for each in all_contracts() if each.name.startswith(f"{key}/")] for key in PARTS}


def firsts(report: Report, status: str) -> Iterator[tuple[Result, str]]:
    """Yield the smallest case with this status of each project and contract, and how many of the cases have it."""
    for project in report.projects:
        for contract in all_contracts():
            cell = report.cell(project, contract.name)
            if status in cell.first:
                yield cell.first[status], f"{cell.counts[status]} of {cell.counts.total()} cases"


def text_table(report: Report) -> str:
    """Return a table of contracts and projects for a terminal."""
    width = max(len(contract.name) for contract in all_contracts())
    columns = {project: max(len(project), 7) for project in report.projects}
    lines = [" " * width + "".join(f"  {name:>{size}}" for name, size in columns.items())]
    for contract in chain.from_iterable(parts().values()):
        cells = (f"  {report.cell(project, contract.name).text:>{size}}" for project, size in columns.items())
        lines.append(f"{contract.name:{width}}" + "".join(cells))
    lines += report.not_loaded.values()
    return "\n".join([*lines, "", *(f"{symbol:5} {meaning}" for symbol, meaning in LEGEND.items())])


STYLE = """
body { max-width: 90rem; }
.wide { overflow-x: auto; } .wide td, .wide th { text-align: center; } td small { opacity: .7; }
.wide td:first-child { min-width: 18rem; text-align: left; } h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
.fail, .error { color: rgb(var(--bad)); font-weight: 600; } .pass { color: rgb(var(--good)); } .na { opacity: .45; }
article { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; padding: .6rem 1rem; }
article small { display: block; opacity: .75; }
article pre { background: var(--soft); border-radius: 6px; padding: .6rem .8rem; }
"""
CLASSES = {FAIL: "fail", ERROR: "error", PASS: "pass", NOT_APPLICABLE: "na"}


def html_page(report: Report) -> str:
    """Return a self-contained HTML page."""
    body = ["<h1>Conformance</h1>", f'<p class="summary">{escape(versions(report))}</p>']
    body += [f'<p class="error">{escape(error)}</p>' for error in report.not_loaded.values()]
    rows = ((project, packages, *counts) for project, packages, counts in summary(report))
    body.append(_html_table(("project", "versions", *STATUSES), ([f"<td>{escape(x)}</td>" for x in row] for row in rows)))
    for status, heading in HEADINGS.items():
        articles = [_article(*first) for first in firsts(report, status)]
        body += [f"<h2>{heading}</h2>", *articles] if articles else []
    body.append(
        "<h2>Contracts</h2><p>" + "<br>".join(f"{escape(symbol)}: {escape(x)}" for symbol, x in LEGEND.items()) + "</p>"
    )
    for key, contracts in parts().items():
        projects = having(report, contracts)
        body.append(f"<h3>{PARTS[key]}</h3>")
        body.append(_html_table(("", *projects), (_row(report, contract, projects) for contract in contracts)))
    return document("Conformance", "".join(body), STYLE)


def _html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head), *("".join(row) for row in rows)]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _row(report: Report, contract: Contract, projects: Iterable[str]) -> list[str]:
    row = [f"<td>{escape(contract.rule)}<br><small>{escape(contract.name)}</small></td>"]
    for project in projects:
        cell = report.cell(project, contract.name)
        title = escape("; ".join(f"{status}: {first.message}" for status, first in cell.first.items()))
        row.append(f'<td class="{CLASSES.get(cell.status, "")}" title="{title}">{escape(cell.text)}</td>')
    return row


def _article(result: Result, count: str) -> str:
    contract = next(each for each in all_contracts() if each.name == result.contract)
    return (
        f"<article><b>{escape(result.adapter)}: {escape(result.contract)}</b> ({count}; the smallest is {escape(result.case)})"
        f"<br>{escape(result.message)}<small>{escape(contract.source)}. Tolerance: {escape(contract.tolerance)}</small>"
        f"<pre>{escape(result.reproduction)}</pre></article>"
    )


def versions(report: Report) -> str:
    """Return the versions of Python and of the libraries in one line."""
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = [*head]
    return [f"| {' | '.join(head)} |", f"| --- |{' :-: |' * (len(head) - 1)}", *(f"| {' | '.join(row)} |" for row in rows)]


def summary(report: Report) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each project with the versions of its packages, and the number of its contracts of each status."""
    for project, packages in report.projects.items():
        found = [report.cell(project, contract.name).status for contract in all_contracts()]
        counts = [str(found.count(status) or "") for status in STATUSES]
        yield project, ", ".join(f"{key} {value}" for key, value in packages.items()), counts


def having(report: Report, contracts: Iterable[Contract]) -> list[str]:
    """Return the projects to which one of the contracts applies."""
    statuses = {name: {report.cell(name, each.name).status for each in contracts} for name in report.projects}
    return [name for name, found in statuses.items() if not found <= {"", NOT_APPLICABLE}]


def projects_table(report: Report) -> list[str]:
    """Return a Markdown table: for each project its versions, and the number of contracts of each status."""
    rows = ((project, packages, *counts) for project, packages, counts in summary(report))
    return [*_table(("project", "versions", *STATUSES), rows), "", f"With {versions(report)}."]


def contracts_tables(report: Report) -> list[str]:
    """Return a Markdown table for each part of a trainer, with the projects that have this part."""
    lines = [f"- `{symbol}`: {meaning}" for symbol, meaning in LEGEND.items()]
    for key, contracts in parts().items():
        shown = having(report, contracts)
        rows = ((f"`{c.name}` {c.rule}", *(report.cell(project, c.name).text for project in shown)) for c in contracts)
        lines += ["", f"### {PARTS[key]}", "", *_table(("contract", *shown), rows)]
    return lines


def sources_table(report: Report) -> list[str]:
    """Return a Markdown table of the sources and tolerances of the contracts."""
    return _table(("contract", "source", "tolerance"), ((f"`{c.name}`", c.source, c.tolerance) for c in all_contracts()))


def differences(report: Report, status: str) -> list[str]:
    """Return a Markdown list of the smallest cases with this status, by project; with scripts, except if documented.

    Contracts of a project with the same message are one entry, with the script of the first.
    """
    entries: dict[str, dict[str, list[tuple[Result, str]]]] = {}
    for result, count in firsts(report, status):
        entries.setdefault(result.adapter, {}).setdefault(result.message, []).append((result, count))
    lines: list[str] = []
    for project, messages in entries.items():
        lines += [*([""] if lines and lines[-1] else []), f"**{project}**", ""]
        for message, found in messages.items():
            names = ", ".join(f"`{result.contract}` ({count}; `{result.case}`)" for result, count in found)
            lines.append(f"- {names}: {message}")
            script = found[0][0].reproduction
            if script and status in (FAIL, ERROR):
                lines += ["", *(f"  {line}" for line in ("```py", *script.splitlines(), "```")), ""]
    return lines or ["None."]
