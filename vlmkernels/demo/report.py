"""Draw the figure of training curves and write the HTML page of samples."""

import base64
import io
from html import escape
from pathlib import Path

import matplotlib.figure
import numpy as np
from PIL import Image

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"
BLUE, ORANGE, GREEN = "#2f6fde", "#e08a1e", "#1a7f4b"
NUM_SAMPLES, NUM_MISTAKES = 60, 30

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #f6f7f9 }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem } p { margin: .3rem 0; color: #57606a }
table { border-collapse: collapse; margin: 1rem 0; background: #fff; border-radius: 8px; overflow: hidden }
td, th { padding: .35rem 1rem; text-align: right; border-bottom: 1px solid #e6e8eb; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: .7rem }
.card { background: #fff; border: 1px solid #e6e8eb; border-radius: 8px; padding: .7rem }
.card img { display: block; height: 56px; margin: 0 auto .5rem }
.card div { display: flex; justify-content: space-between; font-size: .9rem; color: #57606a }
b { font-family: ui-monospace, monospace; font-size: 1rem } .right { color: #1a7f4b } .wrong { color: #c9372c }
"""


def _smooth(values: list[float], width: int = 9) -> np.ndarray:
    """Return the centered running mean over ``width`` steps. The windows at the ends are shorter."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw_curves(metrics: dict, path: Path) -> None:
    """Draw two panels: the mean rewards of sampled answers, and the accuracy on held-out numbers."""
    data = metrics["curves"]
    figure = matplotlib.figure.Figure(figsize=(10.5, 4.2), dpi=150, layout="constrained")
    rewards, accuracy = figure.subplots(1, 2)
    for name, label, color in (("cer", "1 − character error rate", ORANGE), ("exact_match", "exact match", BLUE)):
        rewards.plot(data["step"], data[name], color=color, alpha=0.25, linewidth=1)
        rewards.plot(data["step"], _smooth(data[name]), color=color, linewidth=2, label=label)
    rewards.set_title("Mean reward of sampled answers per step", loc="left", fontsize=11, color=INK)
    rewards.legend(frameon=False, loc="lower right")

    accuracy.plot(data["held_out_step"], data["held_out_accuracy"], color=GREEN, linewidth=2, marker="o", markersize=4)
    for x, name, side, offset in (
        (0, "accuracy_before", "left", (6, -12)),
        (max(data["step"]), "accuracy_after", "right", (0, 9)),
    ):
        label = f"{metrics[name]:.1%}"
        accuracy.annotate(label, (x, metrics[name]), offset, textcoords="offset points", ha=side, color=GREEN, weight="bold")
    accuracy.set_title("Share of held-out numbers read correctly", loc="left", fontsize=11, color=INK)
    for axes in (rewards, accuracy):
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("GRPO step", color=MUTED)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(colors=MUTED, length=0)
        axes.spines[:].set_visible(False)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path)


def _image(image: Image.Image) -> str:
    """Return an img element with the image as a data URI."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _card(row: dict, before: str, after: str) -> str:
    """Return the card of one number with the model's answers before and after GRPO."""
    truth = row["answer"]
    answers = "".join(
        f'<div>{when} <b class="{"right" if answer == truth else "wrong"}">{escape(answer) or "–"}</b></div>'
        for when, answer in (("before GRPO", before), ("after", after))
    )
    return f'<div class="card">{_image(row["image"])}<div>written <b>{escape(truth)}</b></div>{answers}</div>'


def _cards(samples: list[tuple[dict, str, str]]) -> str:
    return f'<div class="cards">{"".join(_card(*sample) for sample in samples)}</div>'


def write_samples(metrics: dict, rows: list[dict], before: list[str], after: list[str], path: Path) -> None:
    """Write a self-contained HTML page: accuracies, the first held-out numbers, and numbers that are still read wrong.

    Args:
        metrics: the result of ``vlmkernels.demo.run.to_metrics``.
        rows: the held-out numbers.
        before, after: the model's answers before and after GRPO, one per row.
        path: file to write.
    """
    triples = list(zip(rows, before, after, strict=True))
    mistakes = [triple for triple in triples if triple[2] != triple[0]["answer"]]
    names = ["all", *(f"{n + 1} digit{'s' * (n > 0)}" for n in range(len(metrics["accuracy_after_by_digits"])))]
    table = "".join(
        f"<tr><td>{label} GRPO</td>"
        + "".join(f"<td>{a:.1%}</td>" for a in (metrics[f"accuracy_{label}"], *metrics[f"accuracy_{label}_by_digits"]))
        + "</tr>"
        for label in ("before", "after")
    )
    shares = metrics["image_share_of_step"]
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Handwritten numbers</title><style>{STYLE}</style>"
        "<h1>Handwritten numbers, read by a small VLM</h1>"
        f"<p>{len(rows)} held-out numbers, composed of scans that were not used in training. Greedy decoding."
        f" Seed {metrics['seed']}.</p>"
        f"<table><tr><th>exact match</th>{''.join(f'<th>{name}</th>' for name in names)}</tr>{table}</table>"
        f"<p>Images took {shares['after']:.0%} of a step of {metrics['step_seconds']:.2f} s. With the processor and vision"
        f" tower of transformers, and one image per completion, they would take {shares['before']:.0%}.</p>"
        f"<h2>The first {min(NUM_SAMPLES, len(rows))} held-out numbers</h2>{_cards(triples[:NUM_SAMPLES])}"
        f"<h2>Still wrong after GRPO: {len(mistakes)}, the first {min(NUM_MISTAKES, len(mistakes))}</h2>"
        f"{_cards(mistakes[:NUM_MISTAKES])}</html>\n"
    )
