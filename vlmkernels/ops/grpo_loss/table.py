"""The variants of ``grpo_loss`` as a Markdown table: ``python -m vlmkernels.ops.grpo_loss.table``."""

from vlmkernels.ops.grpo_loss import reference
from vlmkernels.ops.grpo_loss.config import AGGREGATIONS, LOSSES, PRESET_SOURCES, PRESETS

PARITY = {
    "luspo": "TRL 1.16; not Liger 0.8.5, which sums over the padding",
    "vespo": "TRL 1.16, but for sequence-level corrections, which both refuse",
}


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})"


def markdown() -> str:
    lines = [
        "| loss_type | loss of a token | weight of a token | ratio | source | tested against |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in LOSSES.items():
        formula = reference.SURROGATES[row.surrogate].term.__doc__.splitlines()[0].split(". https")[0].split(", w the")[0]
        level = (
            "sequence" if row.surrogate == "vespo" else f"{row.level}, or {'token' if row.level == 'sequence' else 'sequence'}"
        )
        cells = (
            name,
            f"`{formula}`",
            AGGREGATIONS[row.aggregation].weight.replace("|", r"\|"),
            level,
            _link(row.source),
            PARITY.get(name, "TRL 1.16"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| preset | settings | source |", "|---|---|---|"]
    for name, settings in PRESETS.items():
        source = PRESET_SOURCES.get(name, LOSSES[settings["loss_type"]].source)
        lines.append(f"| {name} | {', '.join(f'{k} = {v}' for k, v in settings.items())} | {_link(source)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
