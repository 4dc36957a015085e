"""Views of a report: a table for the terminal, an HTML page, and the Markdown page in docs/."""

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from vlmkernels.conformance.contract import DOCUMENTED, ERROR, FAIL, NEEDS_CUDA, Contract, Result, all_contracts
from vlmkernels.conformance.report import LEGEND, Report
from vlmkernels.record.html import document

# The parts of a trainer: the first half of a contract's name, and its heading.
PARTS = {
    "adapter": "The adapter itself",
    "advantages": "Advantages",
    "loss": "The objective",
    "logps_from_logits": "Log-probabilities from logits",
    "logps_from_hidden": "Log-probabilities from hidden states",
    "logps": "Log-probabilities of a model",
    "split": "Micro-batches",
    "positions": "Position ids",
    "process": "Model inputs",
    "sample": "Sampling",
}


def part(contract: Contract) -> str:
    return contract.name.partition("/")[0]


def parts() -> dict[str, list[Contract]]:
    """Return the contracts of each part."""
    out: dict[str, list[Contract]] = {}
    for contract in all_contracts():
        out.setdefault(part(contract), []).append(contract)
    return out


def firsts(report: Report, status: str) -> Iterator[tuple[Result, str]]:
    """Yield the smallest case of each cell that has cases of this status, with the number of such cases of all, by project."""
    cells = report.cells
    for project in report.projects:
        for contract in all_contracts():
            cell = cells.get((project, contract.name))
            if cell and cell.counts[status] and status in cell.first:
                yield cell.first[status], f"{cell.counts[status]} of {cell.counts.total()}"


def text_table(report: Report) -> str:
    """Return a table of contracts and projects for a terminal, and the numbers of cases."""
    projects, cells = [*report.projects], report.cells
    width = max((len(contract.name) for contract in all_contracts()), default=0)
    columns = [max(len(project), 7) for project in projects]
    lines = [" " * width + "".join(f"  {name:>{size}}" for name, size in zip(projects, columns, strict=True))]
    for contract in all_contracts():
        texts = [cells[key].text if (key := (project, contract.name)) in cells else "–" for project in projects]
        lines.append(f"{contract.name:{width}}" + "".join(f"  {x:>{size}}" for x, size in zip(texts, columns, strict=True)))
    lines += [f"{source}: {error}" for source, error in report.not_loaded.items()]
    lines += ["", *(f"{symbol:5} {meaning}" for symbol, meaning in LEGEND.items())]
    return "\n".join(lines)


STYLE = """
body { max-width: 90rem; }
.wide td, .wide th { text-align: center; } .wide td:first-child { min-width: 16rem; } .wide td small { opacity: .7; }
.fail, .error { color: rgb(var(--bad)); font-weight: 600; } .pass { color: rgb(var(--good)); }
td.na { opacity: .45; } details { margin: .5rem 0; } summary { cursor: pointer; }
article { border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; padding: .6rem 1rem; }
article pre { background: var(--soft); border-radius: 6px; margin-top: .5rem; padding: .6rem .8rem; }
"""
CLASSES = {FAIL: "fail", ERROR: "error", "pass": "pass", "not applicable": "na"}


def html_page(report: Report) -> str:
    """Return a self-contained HTML page."""
    cells = report.cells
    body = ["<h1>Conformance</h1>", f'<p class="summary">{escape(_versions(report))}</p>']
    for key, contracts in parts().items():
        head = "".join(f"<th>{escape(name)}</th>" for name in report.projects)
        rows = []
        for contract in contracts:
            row = [f"<td>{escape(contract.rule)}<br><small>{escape(contract.name)}</small></td>"]
            for project in report.projects:
                cell = cells.get((project, contract.name))
                style = CLASSES.get(cell.status, "") if cell else "na"
                title = escape("; ".join(f"{status}: {first.message}" for status, first in cell.first.items())) if cell else ""
                row.append(f'<td class="{style}" title="{title}">{escape(cell.text if cell else "–")}</td>')
            rows.append(f"<tr>{''.join(row)}</tr>")
        body.append(f'<h2>{PARTS[key]}</h2><div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>')
    body.append("<p>" + "<br>".join(f"{escape(symbol)}: {escape(text)}" for symbol, text in LEGEND.items()) + "</p>")
    body += [f'<p class="error">{escape(source)}: {escape(error)}</p>' for source, error in report.not_loaded.items()]
    for status, heading in ((FAIL, "Failures"), (ERROR, "Errors of adapters"), (DOCUMENTED, "Documented differences")):
        articles = [_article(result, count) for result, count in firsts(report, status)]
        body += [f"<h2>{heading}</h2>", *articles] if articles else []
    return document("Conformance", "".join(body), STYLE)


def _article(result: Result, count: str) -> str:
    contract = {each.name: each for each in all_contracts()}.get(result.contract)
    source = f"<p><small>{escape(contract.source)}<br>Tolerance: {escape(contract.tolerance)}</small></p>" if contract else ""
    return (
        f"<article><b>{escape(result.adapter)}: {escape(result.contract)}</b> ({count} cases; the smallest is"
        f" {escape(result.case)})<br>{escape(result.message)}{source}<pre>{escape(result.reproduction)}</pre></article>"
    )


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def markdown_page(report: Report, intro: str, reports: Path) -> str:
    """Return docs/conformance.md. intro: the text before the tables. reports: the folder with one page per project."""
    lines = [intro.rstrip(), "", f"Measured with {_versions(report)}.", ""]
    lines += [f"- `{symbol}`: {meaning}" for symbol, meaning in LEGEND.items()]
    lines += ["", "## Projects", "", *_projects(report, reports), "", "## Contracts", ""]
    for key, contracts in parts().items():
        lines += [f"### {PARTS[key]}", "", *_part_table(report, contracts), ""]
    for status, heading, text in (
        (FAIL, "Failures", "The smallest case of each contract that fails, with a script that prints both values."),
        (
            DOCUMENTED,
            "Documented differences",
            "The oracle has another convention, and the documentation of the project states its own.",
        ),
        (ERROR, "Errors", "The project raises an error for an input that its interface accepts."),
        (NEEDS_CUDA, "Needs CUDA", "These parts did not run, because they have no implementation for the CPU."),
    ):
        lines += [f"## {heading}", "", text, "", *_entries(report, status), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = [*head]
    return [f"| {' | '.join(head)} |", f"| --- |{' :-: |' * (len(head) - 1)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _projects(report: Report, reports: Path) -> list[str]:
    """One row per project: its versions, and for each status the number of contracts with it."""
    cells, rows = report.cells, []
    for project, packages in report.projects.items():
        statuses = [cell.status for (name, _), cell in cells.items() if name == project]
        counts = [str(statuses.count(status)) for status in ("pass", FAIL, ERROR, DOCUMENTED, NEEDS_CUDA, "not applicable")]
        page = next((path for path in reports.glob("*.md") if project.lower().replace("-", "_").startswith(path.stem)), None)
        name = f"[{project}](conformance/{page.name})" if page else project
        rows.append([name, ", ".join(f"{key} {value}" for key, value in packages.items()), *counts])
    return _table(("project", "versions", "pass", "fail", "error", "documented", "needs CUDA", "not applicable"), rows)


def _part_table(report: Report, contracts: list[Contract]) -> list[str]:
    """The contracts of a part, and the projects that have it."""
    cells = report.cells
    shown = [
        project
        for project in report.projects
        if any((cell := cells.get((project, each.name))) and cell.status != "not applicable" for each in contracts)
    ]
    rows = []
    for each in contracts:
        texts = [cells[key].text if (key := (project, each.name)) in cells else "–" for project in shown]
        rows.append([f"{each.rule} [`{each.name}`]({_link(each.source)})" if _link(each.source) else each.rule, *texts])
    return _table(("contract", *shown), rows)


def _link(source: str) -> str:
    """The first address in a source."""
    _, found, rest = source.partition("https://")
    return found + rest.split(")")[0].split(" ")[0].rstrip(".,;") if found else ""


def _entries(report: Report, status: str) -> list[str]:
    lines: list[str] = []
    project = ""
    for result, count in firsts(report, status):
        if result.adapter != project:
            project = result.adapter
            lines += [f"### {project}: {status}", ""]
        lines += [f"- **{result.contract}** ({count} cases; `{result.case}`): {result.message}"]
        if result.reproduction and status in (FAIL, ERROR):
            lines += ["", *(f"  {line}" for line in ("```text", *result.reproduction.splitlines(), "```"))]
    return lines or ["None."]
