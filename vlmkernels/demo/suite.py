"""``vlmkernels demo --suite``: the benchmark shapes-and-digits, learnt by the demo's small model with a mixture of rewards.

The start is supervised, in the two steps by which such models are made. First images: the vision tower learns to put what is in
a cell where the words for it are among the token embeddings. Then answers: the text model learns the questions, and which cells
each is about; the tower stays as it is. Then GRPO, from rewards alone.
"""

import json
import re
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.demo.model import END_OF_TURN, build_model, build_processor
from vlmkernels.evaluate import shapes_and_digits as suite
from vlmkernels.evaluate.digits import Scans
from vlmkernels.evaluate.evaluation import ALL, Evaluation
from vlmkernels.evaluate.page import p_value, write_page
from vlmkernels.evaluate.predictions import Decoding, predict
from vlmkernels.evaluate.report import curves_of_log, to_json, to_markdown
from vlmkernels.models.families import family_of
from vlmkernels.models.image_features import encode_images, use_image_features
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import Batch
from vlmkernels.train import GRPOConfig, GRPOTrainer

SEEING_STEPS, ANSWER_STEPS = 160, 500
BATCH_SIZE = 96  # questions in a step
ANSWER_ROWS = 83 * BATCH_SIZE  # of the train split, that are asked in turn
ANSWER_LR = 2.5e-3
PLACES = 3  # in a question or an answer
CELLS_WEIGHT = 3.0
ANSWER_TOKENS = 14  # a box of four numbers of two digits, and the end

# A reward for each category, of the answers in a column of its name; None in the others leaves their samples out.
REWARDS = [
    {"log_as": category, "column": category, **reward}
    for category, reward in {
        "counting": {"name": "count"},
        "colour": {"name": "exact_match"},
        "spatial": {"name": "exact_match"},
        "grounding": {"name": "iou"},
        "ocr": {"name": "cer"},
        "negation": {"name": "yes_no"},
    }.items()
]
# What is reported of each category.
METRICS = {
    "counting": "accuracy",
    "colour": "accuracy",
    "spatial": "accuracy",
    "grounding": "miou",
    "ocr": "exact_match",
    "negation": "accuracy",
}
GRPO = {
    "per_device_train_batch_size": 48 * 8,  # completions in a step
    "num_generations": 8,
    "max_completion_length": ANSWER_TOKENS,
    "learning_rate": 5e-4,
    "warmup_steps": 5,
    "scale_rewards": "batch",
    "shuffle_dataset": False,  # categories take turns: as many of each in every step
}


class Rows(Sequence[dict]):
    """Rows of the train split, from those on that the supervised start leaves, with the columns that ``REWARDS`` take."""

    def __init__(self, count: int):
        self.split, self.count = suite.Split("train"), min(count, suite.SPLITS["train"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in [0, {self.count}), got {index}")
        row = self.split[(ANSWER_ROWS + index) % len(self.split)]
        return {**row, **{category: row["answer"] if category == row["category"] else None for category in suite.CATEGORIES}}


def words(rows) -> list[str]:
    """Every word of the questions and answers, with the space before it where there is one: a token each."""
    texts = (text for row in rows for text in (row["prompt"][0]["content"][0]["text"], row["answer"]))
    return sorted({word for text in texts for word in re.findall(" ?[A-Za-z]+", text)})


class Cell(NamedTuple):
    """The words for what is in a cell, and its box: that of a shape, or the whole cell."""

    words: set[str]
    box: tuple[int, int, int, int]


def crowded_scene(draw: suite.Draw, scans: Scans) -> tuple[Image.Image, list[Cell]]:
    """An image, half of whose cells hold a shape and a quarter a digit, and what is in each, in reading order."""
    shapes, digits, cells = [], [], []
    for row, column in product(range(suite.GRID), repeat=2):
        kind = draw.of(("nothing", "shape", "shape", "digit"))
        x, y = column * suite.CELL, row * suite.CELL
        cell = Cell(set(), (x, y, x + suite.CELL, y + suite.CELL))
        if kind == "shape":
            shape = draw.shape(*draw.of(suite.KINDS), (column, row))
            shapes.append(shape)
            cell = Cell({f" {shape.colour}", f" {shape.name}"}, shape.box)
        elif kind == "digit":
            index = draw.of(range(len(scans.digits)))
            digits.append((scans.pixels[index], (column, row)))
            cell = Cell({str(scans.digits[index])}, cell.box)
        cells.append(cell)
    return suite.paint(shapes, digits), cells


def learn_to_see(model, processor, steps: int, seed: int) -> float:
    """Train the vision tower and the token embeddings so that what is in a cell and the words for it are alike, as SigLIP does
    (2303.15343), and a linear map tells the box's numbers. Returns the share of the last batch's cells with the right words."""
    names = [*(f" {name}" for name in (*suite.COLOURS, *suite.SHAPES)), *map(str, range(10))]
    ids = torch.tensor(processor.tokenizer(names)["input_ids"]).flatten()
    tower, embeddings = model.model.visual.train(), model.get_input_embeddings().weight
    scale, bias = torch.nn.Parameter(torch.tensor(3.0)), torch.nn.Parameter(torch.tensor(-2.0))
    places = suite.SIDE // suite.STEP + 1
    locate = torch.nn.Linear(embeddings.shape[1], 4 * places)
    optimizer = torch.optim.AdamW([*tower.parameters(), *locate.parameters(), embeddings, scale, bias], lr=1.5e-3)
    scans = suite.scans()["train"]
    for step in range(steps):
        scenes = [crowded_scene(suite.Draw("scene", seed, step, index), scans) for index in range(64)]
        images, cells = zip(*scenes, strict=True)
        cells = [cell for scene in cells for cell in scene]
        named = torch.tensor([[float(name in cell.words) for name in names] for cell in cells])
        boxes = torch.tensor([cell.box for cell in cells]) // suite.STEP
        inputs = processor.image_processor(images=list(images), return_tensors="pt")
        features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        logits = features @ embeddings[ids].T * scale + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, named)
        loss = loss + cross_entropy(locate(features).view(-1, places), boxes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((logits > 0) == (named > 0)).all(1).float().mean().item()


class Lesson(NamedTuple):
    """Questions, whose images are encoded once for good, and what is to be learnt of them.

    ids: (B, C) int64, the answers and the ends of turns, right-padded. mask: (B, C) bool. asked: (B, cells) int64, see
    ``shapes_and_digits.asked``.
    """

    prompts: Batch
    ids: torch.Tensor
    mask: torch.Tensor
    asked: torch.Tensor


def lessons(model, processor, count: int) -> list[Lesson]:
    """The first ``count`` rows of the train split in batches."""
    use_image_features(model)
    fast, family, made = with_fast_images(processor), family_of(model.config), []
    for indices in torch.arange(count).split(BATCH_SIZE):
        rows = [suite.sample("train", index) for index in indices.tolist()]
        prompts = encode([read_sample(row, index) for index, row in enumerate(rows)], fast, family)
        answers = processor.tokenizer([row["answer"] + END_OF_TURN for row in rows])["input_ids"]
        length = torch.tensor([len(ids) for ids in answers])
        ids = pad_sequence([*map(torch.tensor, answers)], batch_first=True, padding_value=processor.tokenizer.pad_token_id)
        asked = torch.tensor([suite.asked("train", index) for index in indices.tolist()])
        made.append(Lesson(encode_images(model, prompts), ids, torch.arange(ids.shape[1]) < length.unsqueeze(1), asked))
    return made


def losses(model, point: torch.nn.Linear, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies: of the answers, the mean over their tokens, so that boxes count most; and of what the question says of
    each cell, told by ``point`` from the cell's token in front of the last layer."""
    batch, width = lesson.prompts.append(lesson.ids, lesson.mask.long()).inputs, lesson.ids.shape[1]
    output = model(**batch, logits_to_keep=width + 1, output_hidden_states=True, use_cache=False)
    per_token = cross_entropy(output.logits[:, :-1].mT, lesson.ids, reduction="none")
    cells = output.hidden_states[-2][batch["input_ids"] == model.config.image_token_id]
    return per_token[lesson.mask].mean(), cross_entropy(point(cells), lesson.asked.flatten())


def learn_to_answer(model, processor, steps: int) -> tuple[float, float]:
    """Train all but the vision tower, which is frozen for good. The means of the last ten steps' losses.

    The answers alone teach late and all at once which cells are asked for; so the cells' tokens learn to tell it themselves.
    """
    model.model.visual.requires_grad_(False).eval()
    point = torch.nn.Linear(model.config.get_text_config().hidden_size, PLACES + 1)
    weights = [weight for weight in (*model.parameters(), *point.parameters()) if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ANSWER_LR, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, total_iters=20)
    batches, seen = lessons(model, processor, min(ANSWER_ROWS, suite.SPLITS["train"])), []
    model.train()
    for step in range(steps):
        answers, cells = losses(model, point, batches[step % len(batches)])
        optimizer.zero_grad()
        (answers + CELLS_WEIGHT * cells).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        warmup.step()
        seen.append((answers.item(), cells.item()))
    return tuple(np.mean(seen[-10:], 0))


class Progress(TrainerCallback):
    """Every ten steps a line of each category's reward."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            last = state.log_history[-10:]
            means = {category: np.mean([entry[f"rewards/{category}/mean"] for entry in last]) for category in METRICS}
            shown = "  ".join(f"{category} {mean:.2f}" for category, mean in means.items())
            print(f"  step {state.global_step:3d}   {shown}   {time.perf_counter() - self.start:4.0f} s", flush=True)


def train(model, processor, seed: int, steps: int, output: Path) -> list[dict]:
    """GRPO on the train split. Returns the trainer's log."""
    config = GRPOConfig(
        **GRPO,
        max_steps=steps,
        seed=seed,
        output_dir=str(output),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Rows(steps * config.prompts_per_generation)
    trainer = GRPOTrainer(model, REWARDS, config, rows, processing_class=processor, callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def measure(model, processor, path: Path) -> Evaluation:
    """Greedy answers on the test split, with and without the image."""
    path.unlink(missing_ok=True)
    decoding = Decoding(max_completion_length=ANSWER_TOKENS, batch_size=600)
    return Evaluation(predict(model, processor, suite.Split("test"), decoding, path, ("image", "grey")), suite.Split("test"))


def run(seed: int, steps: int, output: Path) -> int:
    """0 where GRPO raised the accuracy over all categories, else 1."""
    start = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small to share between cores
    disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    processor = build_processor(words(suite.Split("train", 1200)))
    model = build_model(processor, seed, num_layers=3)
    print(f"A small vision-language model learns {suite.NAME}: {', '.join(suite.CATEGORIES)}.\n")
    print(f"Model     the Qwen2.5-VL architecture, {model.num_parameters():,} random weights, seed {seed}")
    print(f"\nSupervised: what is in an image, {SEEING_STEPS} steps; then answers, {ANSWER_STEPS} steps", flush=True)
    seen = learn_to_see(model, processor, SEEING_STEPS, seed)
    print(f"  {seen:.0%} of cells seen right, {time.perf_counter() - start:.0f} s", flush=True)
    answers, cells = learn_to_answer(model, processor, ANSWER_STEPS)
    print(f"  loss of answers {answers:.2f}, of cells {cells:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    warmup_seconds = time.perf_counter() - start
    before = measure(model, processor, output / "before.jsonl")
    print(f"  {before.value(ALL, 'accuracy'):.1%} of the test answered right, {warmup_seconds:.0f} s")

    print(f"\nGRPO, {steps} steps: no labels in the loss, a reward for each category; means of the last ten steps", flush=True)
    train_start = time.perf_counter()
    log = train(model, processor, seed, steps, output)
    train_seconds = time.perf_counter() - train_start
    after = measure(model, processor, output / "after.jsonl")

    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    (output / "trainer_state.json").write_text(json.dumps({"log_history": log}) + "\n")
    result = {
        "suite": suite.NAME,
        "version": suite.VERSION,
        "seed": seed,
        "steps": steps,
        "grpo_config": GRPO,
        "reported": {ALL: "accuracy", **METRICS},
        "seconds": {"supervised": round(warmup_seconds, 1), "grpo": round(train_seconds, 1)},
        "before": to_json(before)["metrics"],
        **to_json(after, before),
    }
    (output / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "eval.md").write_text(to_markdown(after, ("before GRPO", before)))
    curves = curves_of_log(output / "trainer_state.json")
    subtitle = f"{len(after.rows)} samples of the test split, greedy answers, after {steps} steps of GRPO, seed {seed}"
    write_page(output / "eval.html", suite.NAME, subtitle, after, other=("before GRPO", before), curves=curves)

    print(f"\n{'test split':12}{'metric':13}{'before':>8}{'after':>8}{'p':>9}{'image grey':>13}")
    differences = after.minus(before)
    for category, metric in {ALL: "accuracy", **METRICS}.items():
        difference, (hidden,) = differences[category, metric], [r.hidden for r in after.results if r[:2] == (category, metric)]
        values = f"{before.value(category, metric):8.1%}{after.value(category, metric):8.1%}"
        print(f"{category:12}{metric:13}{values}{p_value(difference.p_value):>9}{hidden.value:13.1%}")
    print(f"\nTime: supervised {warmup_seconds:.0f} s, GRPO {train_seconds:.0f} s, all {time.perf_counter() - start:.0f} s")
    print(f"Look at {output / 'eval.html'}; go on with")
    print(f"  vlmkernels eval --model {output / 'model'} --dataset {suite.NAME} --max_completion_length {ANSWER_TOKENS}")
    improved = differences[ALL, "accuracy"].low > 0
    if not improved:
        print("FAILED GRPO must raise the accuracy over all categories")
    return 0 if improved else 1
