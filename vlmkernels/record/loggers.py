"""Tables of completions with images for Weights & Biases, trackio and TensorBoard.

Each function writes to the run that the logger's callback of transformers opened. A logger is imported when it is first used.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from vlmkernels.record.completions import Groups
from vlmkernels.record.files import encoded

MAX_IMAGE_SIDE = 512  # pixels of the longer side of a logged image


def _scaled_down(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    return image


def _encodable(groups: Groups) -> Groups:
    """Write each trajectory as one text, and replace lone surrogates, which loggers cannot write, by their escapes."""

    def escaped(text: str) -> str:
        return encoded(text).decode()

    return [
        [replace(row, prompt=escaped(row.prompt), completion=escaped(row.full_text), turns=[]) for row in rows]
        for rows in groups
    ]


def _table(step: int, groups: Groups, as_image: Callable) -> tuple[list[str], list[list]]:
    """Return the columns and rows of a table. Every image has its own column, so that a column holds one type."""
    groups = _encodable(groups)
    rewards = list(groups[0][0].rewards)
    num_images = max(len(group[0].images) for group in groups)
    rows = []
    for group in groups:
        images = [as_image(_scaled_down(image)) for image in group[0].images]  # shared by all rows of the group
        images += [None] * (num_images - len(images))
        for row in group:
            rows.append([step, *images, row.prompt, row.completion, *(row.rewards[name] for name in rewards), row.advantage])
    image_columns = (f"image {k}" for k in range(1, num_images + 1))
    return ["step", *image_columns, "prompt", "completion", *rewards, "advantage"], rows


def wandb_table(step: int, groups: Groups, callbacks: list[TrainerCallback]) -> None:
    """Log a ``wandb.Table``."""
    import wandb

    columns, rows = _table(step, groups, wandb.Image)
    wandb.log({"completions": wandb.Table(columns, rows), "train/global_step": step})


def trackio_table(step: int, groups: Groups, callbacks: list[TrainerCallback]) -> None:
    """Log a ``trackio.Table``."""
    import pandas
    import trackio

    columns, rows = _table(step, groups, trackio.Image)
    trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def tensorboard_page(step: int, groups: Groups, callbacks: list[TrainerCallback]) -> None:
    """Write a Markdown table for each prompt, and its images under the same name."""
    from transformers.integrations import TensorBoardCallback

    writer = next(callback for callback in callbacks if isinstance(callback, TensorBoardCallback)).tb_writer
    for number, group in enumerate(_encodable(groups), 1):
        names = ["completion", *group[0].rewards, "advantage"]
        lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
        for row in group:
            values = " | ".join(f"{value:.3f}" for value in (*row.rewards.values(), row.advantage))
            lines.append(f"| {_markdown_cell(row.completion)} | {values} |")
        writer.add_text(f"completions/prompt {number}", f"{group[0].prompt}\n\n" + "\n".join(lines), step)
        for image_number, image in enumerate(group[0].images, 1):
            name = f"completions/prompt {number}, image {image_number}"
            writer.add_image(name, np.asarray(_scaled_down(image)), step, dataformats="HWC")


# The loggers of ``report_to`` that can show tables or images.
LOGGERS: dict[str, Callable[[int, Groups, list[TrainerCallback]], None]] = {
    "wandb": wandb_table,
    "trackio": trackio_table,
    "tensorboard": tensorboard_page,
}
