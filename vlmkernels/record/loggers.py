"""Completions with images in Weights & Biases, trackio and TensorBoard, in the runs that transformers' callbacks opened."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from vlmkernels.record.completions import Row

MOST_PIXELS = 512  # the longer side of an image in a logger


def _small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return image


def _rows(step: int, groups: list[list[Row]], as_image: Callable) -> tuple[list[str], list[list]]:
    """Columns and rows of a table, with a column for each image, so that the cells of a column are alike."""
    rewards = list(groups[0][0].rewards)
    most = max(len(group[0].images) for group in groups)
    rows = []
    for group in groups:
        images = [as_image(_small(image)) for image in group[0].images]  # once for all rows
        images += [None] * (most - len(images))
        for row in group:
            rows.append([step, *images, row.prompt, row.completion, *(row.rewards[name] for name in rewards), row.advantage])
    return ["step", *(f"image {k}" for k in range(1, most + 1)), "prompt", "completion", *rewards, "advantage"], rows


def wandb_table(step: int, groups: list[list[Row]], callbacks: list[TrainerCallback]) -> None:
    import wandb

    columns, rows = _rows(step, groups, wandb.Image)
    wandb.log({"completions": wandb.Table(columns, rows), "train/global_step": step})


def trackio_table(step: int, groups: list[list[Row]], callbacks: list[TrainerCallback]) -> None:
    import pandas
    import trackio

    columns, rows = _rows(step, groups, trackio.Image)
    trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)


def tensorboard_page(step: int, groups: list[list[Row]], callbacks: list[TrainerCallback]) -> None:
    """A Markdown table for each prompt, with its images beside it under the same name."""
    from transformers.integrations import TensorBoardCallback

    writer = next(callback for callback in callbacks if isinstance(callback, TensorBoardCallback)).tb_writer
    cell = lambda text: text.replace("|", "\\|").replace("\n", "<br>")  # noqa: E731
    for number, group in enumerate(groups, 1):
        names = ["completion", *group[0].rewards, "advantage"]
        lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
        for row in group:
            values = " | ".join(f"{value:.3f}" for value in (*row.rewards.values(), row.advantage))
            lines.append(f"| {cell(row.completion)} | {values} |")
        writer.add_text(f"completions/prompt {number}", f"{group[0].prompt}\n\n" + "\n".join(lines), step)
        for place, image in enumerate(group[0].images, 1):
            name = f"completions/prompt {number}, image {place}"
            writer.add_image(name, np.asarray(_small(image)), step, dataformats="HWC")


LOGGERS: dict[str, Callable] = {"wandb": wandb_table, "trackio": trackio_table, "tensorboard": tensorboard_page}
