"""Write the tables of README.md, docs/ and bench/README.md from the code and from bench/results/.

With --check it writes nothing and fails if a page is out of date.
"""

import importlib
import inspect
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

from harness import RESULTS, table

ROOT = Path(__file__).parents[1]


def demo() -> list[str]:
    content = json.loads((RESULTS / "demo.json").read_text())
    lines = [
        "| seed | held-out exact match after warm-up | after GRPO | warm-up | GRPO |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in content["runs"]:
        before, after = f"{run['accuracy_before']:.1%}", f"{run['accuracy_after']:.1%}"
        lines.append(f"| {run['seed']} | {before} | {after} | {run['warmup_seconds']:.0f} s | {run['train_seconds']:.0f} s |")
    return [*lines, "", f"On {content['device']}, commit {content['commit']}."]


def installs() -> list[str]:
    content = json.loads((RESULTS / "installs.json").read_text())
    lines = ["| `pip install .` | time | wheel | backends |", "| --- | ---: | ---: | --- |"]
    for row in content["rows"]:
        lines.append(f"| {row['name']} | {row['seconds']:.0f} s | {row['wheel_kib']:.0f} KiB | {', '.join(row['backends'])} |")
    return [
        *lines,
        "",
        f"On {content['device']} with torch installed, by `python bench/installs.py`, commit {content['commit']}.",
    ]


def bench(op: str) -> list[str]:
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        for case, result in content.get("cases", {}).items():
            if case.startswith(f"{op} "):
                versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
                heading = f"**{case}**, on {content['device']} (commit {result['commit']}; {versions})"
                lines += [heading, "", *table(result["rows"]), ""]
    return lines[:-1]


def speed() -> list[str]:
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "cases" not in content or path.name.startswith("nvidia-"):
            continue
        lines += [f"| on {content['device']} | ms | times as long |", "| --- | ---: | --- |"]
        for case, result in sorted(content["cases"].items()):
            timed = [row for row in result["rows"] if row.get("ratio_to_ours") and not row.get("floor")]
            if not timed:  # ours failed
                continue
            ours, *others = timed
            peers = [row for row in others if not row["provider"].startswith("vlmkernels")]
            shown = "; ".join(f"{row['provider']}: {row['ratio_to_ours']:.1f}" for row in peers)
            lines.append(f"| {case} | {ours['ms']:.{0 if ours['ms'] > 100 else 1}f} | {shown} |")
        lines.append("")
    return lines[:-1]


# The cases of the first table of docs/gpu.md, and what they compute.
HEADLINES = {
    "gather_logps qwen2.5-vl 8192 x 151936, no gradient": "log-probabilities and entropies from bf16 logits, 8192 x 151936",
    "gather_logps qwen2.5-vl 8192 x 151936": "the same, with gradients",
    "linear_grpo_loss qwen3-vl-8b 8192 x 4096 x 151936": "head and GRPO loss, 8192 x 4096 x 151936, with gradients",
    "linear_grpo_loss qwen3-vl-8b 8192 x 4096 x 151936, frozen head": "the same, frozen head",
    "linear_logps qwen3-vl-8b 8192 x 4096 x 151936, no gradient": "log-probabilities and entropies from hidden states",
    "tree_attention P 2048, 8 x 512, 16 heads of 128": "attention, prefix of 2048, 8 completions of 512, with gradients",
    "training step 0.5b, 1 x 8 completions of 256 tokens, an image of 1225": "training step, 0.7 B, 8 completions, one image",
    "training step 3b, 1 x 8 completions of 256 tokens, an image of 1225": "training step, 3.8 B, 8 completions, one image",
}


def gpu(which: str = "headlines") -> list[str]:
    """Our time, its share of the hardware limit, and the times of peers relative to it, of ``HEADLINES`` or of all cases."""
    lines = []
    for path in sorted(RESULTS.glob("nvidia-*.json")):
        content = json.loads(path.read_text())
        found, shown = content["cases"], []
        titles = HEADLINES if which == "headlines" else {case: case for case in sorted(found)}
        lines += [f"| on an {content['device']} | ms | of the limit | peers: times as long | peak MiB: ours, peers |"]
        lines += ["| --- | ---: | ---: | --- | --- |"]
        for case, title in titles.items():
            timed = [row for row in found.get(case, {}).get("rows", []) if row.get("ratio_to_ours") and not row.get("floor")]
            if not timed:
                continue
            ours = timed[0]
            peers = [row for row in timed[1:] if not row["provider"].startswith(("vlmkernels", "experiment"))]
            limits = {"percent_of_copy": "copy", "percent_of_gemm": "GEMM"}
            shares = [f"{ours[key]:.0f} % of {what}" for key, what in limits.items() if key in ours]
            shares += [f"kernels {ours[f'gpu_{key}']:.0f} %" for key in limits if f"gpu_{key}" in ours]
            limit = ", ".join(shares)
            ratios = [f"{row['provider']} {row['ratio_to_ours']:.2f}" for row in peers]
            missing = [row["provider"] for row in found[case]["rows"] if row.get("error", "").endswith("out of memory")]
            ratios = "; ".join(ratios + [f"{name} out of memory" for name in missing])
            memory = ", ".join(f"{row['peak_mib']:.0f}" for row in (ours, *peers) if "peak_mib" in row)
            lines.append(f"| {title} | {ours['ms']:.3g} | {limit} | {ratios} | {memory} |")
            shown.append(found[case])
        if not shown:
            lines = lines[:-2]
            continue
        driver, cuda = shown[0]["gpu"]["driver"], shown[0]["gpu"]["cuda"]
        versions = ", ".join(f"{name} {version}" for name, version in shown[0]["versions"].items())
        commits = ", ".join(sorted({result["commit"] for result in shown}))
        lines += ["", f"Driver {driver}, CUDA {cuda}, {versions}; commits {commits}.", ""]
    return lines[:-1]


def gpu_tests() -> list[str]:
    """The test counts of `make gpu-check STAGE=correct`."""
    lines, outcomes = [], ("passed", "failed", "skipped", "not run")
    for path in sorted(RESULTS.glob("nvidia-*.json")):
        content = json.loads(path.read_text())
        if "tests" not in content:
            continue
        files = content["tests"]["files"]
        lines += [f"| on an {content['device']} | {' | '.join(outcomes)} | commit |", "| --- |" + " ---: |" * 4 + " --- |"]
        for file, counts in sorted(files.items()):
            cells = [*(str(counts.get(outcome, 0)) for outcome in outcomes), counts.get("commit", content["tests"]["commit"])]
            lines.append(f"| {file} | {' | '.join(cells)} |")
        total = [sum(counts.get(outcome, 0) for counts in files.values()) for outcome in outcomes]
        lines += [f"| all | {' | '.join(map(str, total))} |  |", ""]
    return lines[:-1]


def losses() -> list[str]:
    return importlib.import_module("vlmkernels.ops.grpo_loss.table").markdown().splitlines()


def backends() -> list[str]:
    from vlmkernels import backend, env

    lines = ["| op | " + " | ".join(backend.BACKENDS) + " |", "| --- |" + " --- |" * len(backend.BACKENDS)]
    for op in env.ops():
        if op in backend.OTHERS:
            continue
        written = ["yes" if backend.module_name(op, name) else "no" for name in backend.BACKENDS]
        lines.append(f"| `{op}` | " + " | ".join(written) + " |")
    order = "; ".join(f"{device.upper()}: {', '.join(names)}" for device, names in backend.KERNELS.order.items())
    lines += ["", f"The default, `auto`, runs the first backend that supports the tensors ({order})."]
    attention = (f"`{op}` has {', '.join(row.modules)}" for op, row in backend.OTHERS.items() if op.endswith("_attention"))
    return [*lines, f"The attention ops have other backends: {'; '.join(attention)}."]


def accuracy() -> list[str]:
    lines = []
    for path in sorted(RESULTS.glob("accuracy-*.json")):
        content = json.loads(path.read_text())
        columns = {"max_logp": r"max \|Δlogp\|", "mean_logp": r"mean \|Δlogp\|"}
        columns |= {f"cosine_{what}": f"1 - cosine, d{what}" for what in ("hidden", "weight")}
        lines += [f"| {' | '.join(('provider', *columns.values()))} |", "| --- |" + " ---: |" * len(columns)]
        for row in content["rows"]:
            cells = [f"{row[key]:.1e}" if key in row else "" for key in columns]
            lines.append(f"| {' | '.join((row['provider'], *cells))} |")
        lines += ["", f"On {content['device']}, by `python bench/accuracy.py`, commit {content['commit']}.", ""]
    return lines[:-1]


def rewards() -> list[str]:
    from vlmkernels.rewards import builtin

    kinds = {"point": "point, or box", "choice": "option's letter", "yes_no": "yes or no"}
    lines = ["| reward | takes | score | options |", "| --- | --- | --- | --- |"]
    for name in builtin.NAMES:
        score, kind, target = builtin.ANSWERS.get(name, (None, None, builtin.OTHERS.get(name)))
        text = inspect.getdoc(target if score is None else score).split("\n\n")[0]
        text = re.split(r"\.\s|\.$", re.sub(r"\s+", " ", text))[0].replace("``", "`").replace("|", "\\|")
        options = list(builtin.options_of(target if score is None else score))
        options += ["frame", "reference_frame", "image"] if target is builtin.BoxReward else []
        lines.append(f"| `{name}` | {kinds.get(kind, kind or '')} | {text} | {', '.join(options)} |")
    return lines


def tasks() -> list[str]:
    from vlmkernels.evaluate.tasks import HARNESSES, TASKS

    lines = ["| task | an answer is | reference | metrics |", "| --- | --- | --- | --- |"]
    for name, task in TASKS.items():
        metrics = ", ".join(f"`{metric}`" for metric in HARNESSES["vlmkernels"].task_metrics(name))
        column = "" if name == "open" else f"`{task.column}`"
        lines.append(f"| `{name}` | {task.answer.replace('_', ' or ')} | {column} | {metrics} |")
    return lines


def harnesses() -> list[str]:
    from vlmkernels.evaluate.tasks import HARNESSES, TASKS

    others = {name: harness.rules for name, harness in HARNESSES.items() if harness.rules}
    lines = [f"| task | {' | '.join(f'`{name}`' for name in others)} |", "| --- |" + " --- |" * len(others)]
    for task in TASKS:
        sources = [rules[task].source if task in rules else "" for rules in others.values()]
        if any(sources):
            lines.append(f"| `{task}` | {' | '.join(f'`{source}`' if source else '' for source in sources)} |")
    return lines


def plans() -> list[str]:
    lines = []
    for path in sorted(RESULTS.glob("plan-*.json")):
        content = json.loads(path.read_text())
        counted = list(dict.fromkeys(row["what"] for rows in content["shapes"].values() for row in rows if row["counts"]))
        lines += [f"| planned / measured | {' | '.join(counted)} |", "| --- |" + " ---: |" * len(counted)]
        for shape, rows in content["shapes"].items():
            shown = {}
            for row in rows:
                scale, unit = (2**20, "MiB") if row["what"] == "memory" else (1, "s")
                values = [f"{row[key] / scale:.{0 if unit == 'MiB' else 2}f}" for key in ("planned", "measured")]
                shown[row["what"]] = f"{' / '.join(values)} {unit} ({row['ratio']:.2f})"
            lines.append(f"| {shape} | {' | '.join(shown.get(what, '') for what in counted)} |")
        where = f"On {content['device']}, {content['threads']} thread, {content['clock']}, by `python bench/bench_plan.py`"
        lines += ["", f"{where}, commit {content['commit']}.", ""]
    return lines[:-1]


def plans_gpu() -> list[str]:
    from bench_plan import gpu_steps

    return gpu_steps()


def suite() -> list[str]:
    content = json.loads((RESULTS / "suite.json").read_text())
    runs, first = content["runs"], content["runs"][0]
    seeds = [str(run["seed"]) for run in runs]
    lines = [f"| test split | metric | {' | '.join(f'seed {seed}: before | after' for seed in seeds)} | image gray |"]
    lines.append("| --- | --- |" + " ---: | ---: |" * len(runs) + " ---: |")
    for category, metric in first["reported"].items():
        cells = [f"{run[when][category][metric]['value']:.1%}" for run in runs for when in ("before", "metrics")]
        hidden = sum(run["metrics"][category][metric]["hidden"]["value"] for run in runs) / len(runs)
        category = "color" if category == "colour" else category  # the category has the word of its questions
        lines.append(f"| {category} | `{metric}` | {' | '.join(cells)} | {hidden:.1%} |")
    times = "; ".join(f"seed {r['seed']} {r['seconds']['supervised']:.0f} s and {r['seconds']['grpo']:.0f} s" for r in runs)
    how = "by `vlmkernels demo --suite --seed N` (`python bench/demo_seeds.py --suite` for several)"
    where = f"Version {first['version']}, on {content['device']}, {how}, commit {content['commit']}"
    return [*lines, "", f"{where}; {first['steps']} steps of GRPO; supervised start and GRPO: {times}."]


def ablation() -> list[str]:
    path = RESULTS / "ablation.json"
    if not path.exists():
        return ["Not measured yet."]
    content = json.loads(path.read_text())
    costs = {"step": "optimizer steps", "completions": "completions", "seconds": "CPU seconds"}
    names = " | ".join(f"at equal {name}" for name in costs.values())
    lines = [f"| method | test split | metric | start | GRPO | {names} |", "| --- | --- | --- | ---: | ---: |" + " ---: |" * 3]
    verdicts = []
    for comparison in content["comparisons"]:
        method, at_equal = comparison["method"], comparison["at_equal"]
        for group, metric in content["reported"].items():
            cells = [_compared(at_equal[cost], group) for cost in costs]
            values = f"{content['start'][group]:.1%} | {at_equal['step']['metrics'][group]['base']:.1%}"
            name = "color" if group == "colour" else group  # the category has the word of its questions
            lines.append(f"| {method} | {name} | `{metric}` | {values} | {' | '.join(cells)} |")
        verdicts.append(_verdicts(comparison, content["runs"], costs))
    settings = content["settings"]
    seeds = ", ".join(map(str, sorted({run["seed"] for run in content["runs"]})))
    first, second = settings["start_steps"]
    every, where = settings["evaluate_every"], f"{content['suite']} version {content['version']}, on {content['device']}"
    note = [
        "Cells show the method's value and, with a 95 % interval over questions and seeds, its paired difference from GRPO in",
        f"points. {settings['steps']} steps after a supervised start of {first} + {second} steps, seeds {seeds}, evaluated",
        f"every {every} steps; {where}, commit {content['commit']}.",
    ]
    return [*lines, "", *verdicts, "", " ".join(note)]


def _compared(found: dict | None, group: str) -> str:
    if found is None:
        return "no evaluation"
    row = found["metrics"][group]
    return f"{row['ours']:.1%} ({100 * row['value']:+.1f}: {100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def _verdicts(comparison: dict, runs: list[dict], costs: dict[str, str]) -> str:
    """Say whether the accuracy of a method over all questions differs from that of GRPO, and what a step costs."""
    words = []
    for cost, name in costs.items():
        if (found := comparison["at_equal"][cost]) is not None:
            row = found["metrics"]["all"]
            word = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "no significant difference"
            words.append(f"{word} at equal {name}")
    last = {
        name: [run["points"][-1] for run in runs if run["method"] == comparison[name] and run["seed"] in comparison["seeds"]]
        for name in ("method", "base")
    }
    ratio = [sum(p[c] for p in last["method"]) / sum(p[c] for p in last["base"]) for c in ("completions", "seconds")]
    cost = f"a step samples {ratio[0]:.2f} times as many completions and takes {ratio[1]:.2f} times as many CPU seconds"
    return f"- **{comparison['method']}**, all questions, {len(comparison['seeds'])} seeds: {', '.join(words)}; {cost}."


def families() -> list[str]:
    """Model types with the same properties in one row, from the tiny models of the tests and their real processors."""
    from support import tiny_families

    from vlmkernels.models.families import DECODERS, FAMILIES, prefix_sharing_unsupported

    cases = [tiny_families.case(name).model for name in tiny_families.BUILDERS]
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        for model_type in family.model_types:
            models = [model for model in cases if model.config.model_type == model_type]
            media = "images, videos" if "video" in _axes(family) else "images"
            shares = "; ".join(sorted({prefix_sharing_unsupported(model) or "yes" for model in models}))
            rows.setdefault((media, ", ".join(_mixing(models, family)), shares), []).append(f"`{model_type}`")
    columns = "model types", "media", "what connects tokens besides causal attention", "shares prefix"
    head = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |"]
    lines = [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()]
    text = ", ".join(f"`{name}`" for name in DECODERS if not name.endswith("_text"))
    return [*head, *lines, "", f"Text models share their prefix too if they are of type {text}."]


def _axes(family) -> set[str]:
    kinds = {"video": "video", "video_patch": "video", "frame": "video", "chunk": "video", "video_slice": "video"}
    return {kinds.get(spec.axis, spec.axis) for spec in family.inputs.values()}


def resampling() -> list[str]:
    from resampling import table

    return table()


def _mixing(models: list, family) -> list[str]:
    layers = {layer for m in models for layer in getattr(m.config.get_text_config(), "layer_types", None) or ()}
    names = {"sliding_attention": "sliding windows", "linear_attention": "gated delta rule", "conv": "convolutions"}
    mixing = [name for layer, name in names.items() if layer in layers]
    spans = family.bidirectional
    return mixing + ([] if spans is None else ["bidirectional prompt" if spans.values == (0,) else "bidirectional images"])


def metrics() -> list[str]:
    from vlmkernels.record.metrics import markdown

    return markdown()


def doctor() -> list[str]:
    from vlmkernels.doctor import RULES
    from vlmkernels.doctor.output import markdown

    return markdown(RULES)


def doctor_runs(which: str) -> list[str]:
    """The planted faults, or the runs without a fault ("healthy"), of bench/doctor_faults.py."""
    content = json.loads((RESULTS / "doctor.json").read_text())

    def rules(row: dict, severity: str) -> str:
        found = row["found"].items()
        names = [rule for rule, values in found if values["severity"] == severity and rule != row.get("rule")]
        return ", ".join(f"`{name}`" for name in names) or "none"

    faults = [row for row in content["runs"] if row["fault"]]
    healthy = [row for row in content["runs"] if not row["fault"]]
    if which == "healthy":
        lines = ["| seed | steps | mean reward | problems | notes |", "| ---: | ---: | --- | --- | --- |"]
        for row in healthy:
            start, end = row["reward"]
            found = f"{rules(row, 'problem')} | {rules(row, 'note')}"
            lines.append(f"| {row['seed']} | {row['steps']} | {start:.2f} to {end:.2f} | {found} |")
        return lines
    lines = ["| fault | step | rule | evidence | other problems up to step 20 |", "| --- | ---: | --- | --- | --- |"]
    for row in faults:
        found = row["found"][row["rule"]]
        lines.append(f"| {row['fault']} | {found['step']} | `{row['rule']}` | {found['evidence']} | {rules(row, 'problem')} |")
    return [*lines, "", f"By `python bench/doctor_faults.py` on {content['device']}, commit {content['commit']}."]


def conformance(what: str) -> list[str]:
    """A table of docs/conformance.md, from the results of `make conformance`. Projects link to the reports on them."""
    from vlmkernels.conformance import page
    from vlmkernels.conformance.contract import NOT_APPLICABLE
    from vlmkernels.conformance.report import Cell, Report

    content = json.loads((RESULTS / "conformance.json").read_text())
    report = Report.from_dicts([content])
    for key in itertools.product(report.projects, content["contracts"]):  # the file leaves out what is not applicable
        report.cells.setdefault(key, Cell(Counter({NOT_APPLICABLE: 1})))
    if what != "projects":
        views = {"contracts": page.contracts_tables, "sources": page.sources_table}
        return views[what](report) if what in views else page.differences(report, what)
    lines = page.projects_table(report)
    for path in (ROOT / "docs" / "conformance").glob("*.md"):
        link = rf"| [\1](conformance/{path.name}) |"
        lines = [re.sub(rf"^\| ({path.stem}\b[^|]*) \|", link, line, flags=re.IGNORECASE) for line in lines]
    return lines


TABLES = {
    "accuracy": accuracy,
    "demo": demo,
    "doctor": doctor,
    "doctor-runs": doctor_runs,
    "families": families,
    "gpu": gpu,
    "gpu-tests": gpu_tests,
    "installs": installs,
    "bench": bench,
    "losses": losses,
    "backends": backends,
    "conformance": conformance,
    "plans": plans,
    "plans_gpu": plans_gpu,
    "rewards": rewards,
    "tasks": tasks,
    "harnesses": harnesses,
    "metrics": metrics,
    "speed": speed,
    "suite": suite,
    "ablation": ablation,
    "resampling": resampling,
}


def fill(text: str) -> str:
    def render(match: re.Match) -> str:
        name, *arguments = match["name"].split()
        return "\n".join([f"<!-- table: {match['name']} -->", *TABLES[name](*arguments), "<!-- end -->"])

    return re.sub(r"<!-- table: (?P<name>[\w -]+?) -->.*?<!-- end -->", render, text, flags=re.DOTALL)


PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    stale = [page for page in PAGES if page.read_text() != fill(page.read_text())]
    if "--check" in sys.argv:
        print(*(f"out of date: {page.relative_to(ROOT)}" for page in stale), sep="\n")
        return int(bool(stale))
    for page in stale:
        page.write_text(fill(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
