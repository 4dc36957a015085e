"""``vlmkernels demo --suite``: the demo's small model learns the benchmark shapes-and-digits, with one reward per category.

Training starts with two supervised stages, as for large models. First, the vision tower is aligned with the token embeddings:
the features of a cell become similar to the embeddings of the words for its content. Second, with the tower frozen, the text
model learns to answer the questions, and which cells each question is about. GRPO then trains the model from rewards only.
"""

import json
import re
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.demo.model import END_OF_TURN, build_model, build_processor
from vlmkernels.evaluate import shapes_and_digits as suite
from vlmkernels.evaluate.digits import Scans
from vlmkernels.evaluate.evaluation import ALL, Evaluation
from vlmkernels.evaluate.page import Comparison, p_value, write_page
from vlmkernels.evaluate.report import curves_of_log, to_json, to_markdown
from vlmkernels.evaluate.sampling import Decoding, predict
from vlmkernels.evaluate.statistics import Difference
from vlmkernels.models.families import family_of
from vlmkernels.models.image_features import encode_images, use_image_features
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.train import GRPOConfig, GRPOTrainer

SEEING_STEPS, ANSWER_STEPS = 160, 500
BATCH_SIZE = 96  # questions per step
ANSWER_ROWS = 83 * BATCH_SIZE  # number of rows of the train split that the supervised stage uses, in cycles
ANSWER_LR = 2.5e-3
PLACES = 3  # maximum number of cells or groups of cells that a question names
CELLS_WEIGHT = 3.0
ANSWER_TOKENS = 14  # a box of four two-digit numbers, and the end-of-turn token

# One reward per category. Its column is named like the category, and is None for samples of other categories.
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
# The reported metric of each category.
METRICS = {
    "counting": "accuracy",
    "colour": "accuracy",
    "spatial": "accuracy",
    "grounding": "miou",
    "ocr": "exact_match",
    "negation": "accuracy",
}
GRPO = {
    "per_device_train_batch_size": 48 * 8,  # completions per step
    "num_generations": 8,
    "max_completion_length": ANSWER_TOKENS,
    "learning_rate": 5e-4,
    "warmup_steps": 5,
    "scale_rewards": "batch",
    "shuffle_dataset": False,  # categories alternate in the split, so every step has the same number of each
}


class Rows(Sequence[dict]):
    """The rows of the train split that follow the rows of the supervised stage, with the columns that ``REWARDS`` need."""

    def __init__(self, count: int):
        self.split, self.count = suite.ShapesAndDigits("train"), min(count, suite.SPLITS["train"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in [0, {self.count}), got {index}")
        row = self.split[(ANSWER_ROWS + index) % len(self.split)]
        return {**row, **{category: row["answer"] if category == row["category"] else None for category in suite.CATEGORIES}}


def words(rows: Iterable[dict]) -> list[str]:
    """List the words in questions and answers, with their leading space if there is one. Each word becomes one token."""
    texts = (text for row in rows for text in (row["prompt"][0]["content"][0]["text"], row["answer"]))
    return sorted({word for text in texts for word in re.findall(" ?[A-Za-z]+", text)})


class Cell(NamedTuple):
    """The words for the content of a cell, and its box: the box of a shape, or the whole cell."""

    words: set[str]
    box: tuple[int, int, int, int]


def crowded_scene(draw: suite.Draw, scans: Scans) -> tuple[Image.Image, list[Cell]]:
    """Draw an image in which about half of the cells show a shape and a quarter a digit. Cells are in reading order."""
    shapes, digits, cells = [], [], []
    for row, column in product(range(suite.GRID), repeat=2):
        kind = draw.choice(("nothing", "shape", "shape", "digit"))
        x, y = column * suite.CELL, row * suite.CELL
        cell = Cell(set(), (x, y, x + suite.CELL, y + suite.CELL))
        if kind == "shape":
            shape = draw.shape(*draw.choice(suite.KINDS), (column, row))
            shapes.append(shape)
            cell = Cell({f" {shape.colour}", f" {shape.name}"}, shape.box)
        elif kind == "digit":
            index = draw.choice(range(len(scans.digits)))
            digits.append((scans.pixels[index], (column, row)))
            cell = Cell({str(scans.digits[index])}, cell.box)
        cells.append(cell)
    return suite.paint(shapes, digits), cells


def learn_to_see(model: PreTrainedModel, processor: ProcessorMixin, steps: int, seed: int) -> float:
    """Align the vision tower and the token embeddings.

    The first loss makes the features of a cell similar to the embeddings of the words for its content, as in SigLIP
    (2303.15343). The second loss makes the box of the content linearly predictable from the features.

    Returns:
        The share of cells in the last batch for which exactly the correct words are predicted.
    """
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
    """A batch of questions and the targets of the supervised loss.

    Attributes:
        prompts: model inputs of the questions, with images that are already encoded.
        ids: (B, C) int64, answers with the end-of-turn token, right-padded.
        completion_mask: (B, C) bool, True at the tokens of ``ids`` that are not padding.
        cells: (B, cells) int64, the role of each cell in the question; see ``shapes_and_digits``.
    """

    prompts: ModelInputs
    ids: torch.Tensor
    completion_mask: torch.Tensor
    cells: torch.Tensor


def lessons(model: PreTrainedModel, processor: ProcessorMixin, count: int) -> list[Lesson]:
    """Return the first ``count`` rows of the train split as batches. Each image is encoded once, for all steps."""
    use_image_features(model)
    fast, family, made = with_fast_images(processor), family_of(model.config), []
    for indices in torch.arange(count).split(BATCH_SIZE):
        rows = [suite.sample("train", index) for index in indices.tolist()]
        prompts = encode([read_sample(row, index) for index, row in enumerate(rows)], fast, family)
        answers = processor.tokenizer([row["answer"] + END_OF_TURN for row in rows])["input_ids"]
        length = torch.tensor([len(ids) for ids in answers])
        ids = pad_sequence([*map(torch.tensor, answers)], batch_first=True, padding_value=processor.tokenizer.pad_token_id)
        completion_mask = torch.arange(ids.shape[1]) < length.unsqueeze(1)
        cells = torch.tensor([suite.cell_labels("train", index) for index in indices.tolist()])
        made.append(Lesson(encode_images(model, prompts), ids, completion_mask, cells))
    return made


def losses(model: PreTrainedModel, classifier: torch.nn.Linear, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of the answers and the cross-entropy of the cells' roles.

    Args:
        model: the model.
        classifier: predicts the role of a cell in the question from the hidden state of the cell's token before the last layer.
        lesson: a batch.

    Returns:
        The mean loss over answer tokens, in which boxes weigh most because they have most tokens, and the mean loss over cells.
    """
    batch, width = lesson.prompts.append(lesson.ids, lesson.completion_mask.long()).inputs, lesson.ids.shape[1]
    output = model(**batch, logits_to_keep=width + 1, output_hidden_states=True, use_cache=False)
    per_token = cross_entropy(output.logits[:, :-1].mT, lesson.ids, reduction="none")
    cells = output.hidden_states[-2][batch["input_ids"] == model.config.image_token_id]
    return per_token[lesson.completion_mask].mean(), cross_entropy(classifier(cells), lesson.cells.flatten())


def learn_to_answer(model: PreTrainedModel, processor: ProcessorMixin, steps: int) -> tuple[float, float]:
    """Freeze the vision tower, and train the text model on answers.

    Without the loss of the cells' roles, the model learns only late and abruptly which cells a question is about.

    Returns:
        The results of ``losses``, averaged over the last ten steps.
    """
    model.model.visual.requires_grad_(False).eval()
    classifier = torch.nn.Linear(model.config.get_text_config().hidden_size, PLACES + 1)
    weights = [weight for weight in (*model.parameters(), *classifier.parameters()) if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=ANSWER_LR, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, total_iters=20)
    batches, seen = lessons(model, processor, min(ANSWER_ROWS, suite.SPLITS["train"])), []
    model.train()
    for step in range(steps):
        answers, cells = losses(model, classifier, batches[step % len(batches)])
        optimizer.zero_grad()
        (answers + CELLS_WEIGHT * cells).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        warmup.step()
        seen.append((answers.item(), cells.item()))
    return tuple(np.mean(seen[-10:], 0))


class PrintRewards(TrainerCallback):
    """Print the mean reward of each category over the last ten steps, every ten steps."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            last = state.log_history[-10:]
            means = {category: np.mean([entry[f"rewards/{category}/mean"] for entry in last]) for category in METRICS}
            shown = "  ".join(f"{category} {mean:.2f}" for category, mean in means.items())
            print(f"  step {state.global_step:3d}   {shown}   {time.perf_counter() - self.start:4.0f} s", flush=True)


def train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    seed: int,
    steps: int,
    output: Path,
    *,
    rows_per_prompt: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> list[dict]:
    """Train with GRPO on the train split.

    Args:
        rows_per_prompt: rows of the dataset per prompt that is trained on; more than 1 if further prompts are sampled.
        callbacks: of the trainer.
        options: arguments of ``GRPOConfig`` beside those in ``GRPO``.

    Returns:
        The trainer's log.
    """
    config = GRPOConfig(
        **{**GRPO, **options},
        max_steps=steps,
        seed=seed,
        output_dir=str(output),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Rows(rows_per_prompt * steps * config.prompts_per_generation)
    callbacks = [PrintRewards(), *callbacks]
    trainer = GRPOTrainer(model, REWARDS, config, rows, processing_class=processor, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def measure(
    model: PreTrainedModel, processor: ProcessorMixin, path: Path, views: Sequence[str] = ("image", "grey")
) -> Evaluation:
    """Evaluate greedy answers on the test split, with the image and with a gray image. ``path``: file for the predictions."""
    path.unlink(missing_ok=True)
    decoding = Decoding(max_completion_length=ANSWER_TOKENS, batch_size=600)
    rows = suite.ShapesAndDigits("test")
    return Evaluation(predict(model, processor, rows, decoding, path, views=views), rows)


def new_model(seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a model with random weights and its processor."""
    processor = build_processor(words(suite.ShapesAndDigits("train", 1200)))
    return build_model(processor, seed, num_layers=3), processor


def start_supervised(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    seed: int,
    seeing_steps: int,
    answer_steps: int,
) -> None:
    """Run both supervised stages and print their results."""
    start = time.perf_counter()
    print(f"\nSupervised: vision tower, {seeing_steps} steps; then answers, {answer_steps} steps", flush=True)
    seen = learn_to_see(model, processor, seeing_steps, seed)
    print(f"  {seen:.0%} of cells recognized, {time.perf_counter() - start:.0f} s", flush=True)
    answers, cells = learn_to_answer(model, processor, answer_steps)
    print(f"  answer loss {answers:.2f}, cell loss {cells:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def write_results(before: Evaluation, after: Evaluation, log: list[dict], about: dict, output: Path) -> None:
    """Write eval.json, eval.md, eval.html and trainer_state.json. ``about``: seed, steps and seconds, added to eval.json."""
    (output / "trainer_state.json").write_text(json.dumps({"log_history": log}) + "\n")
    result = {
        "suite": suite.NAME,
        "version": suite.VERSION,
        **about,
        "grpo_config": GRPO,
        "reported": {ALL: "accuracy", **METRICS},
        "before": to_json(before)["metrics"],
        **to_json(after, before),
    }
    (output / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    comparison = Comparison("after GRPO", after, "before GRPO", before)
    (output / "eval.md").write_text(to_markdown(after, [comparison]))
    curves = curves_of_log(output / "trainer_state.json")
    run = f"after {about['steps']} steps of GRPO, seed {about['seed']}"
    subtitle = f"{len(after.rows)} samples of the test split, greedy decoding, {run}"
    write_page(output / "eval.html", suite.NAME, subtitle, after, comparisons=[comparison], curves=curves)


def print_table(before: Evaluation, after: Evaluation, differences: dict[tuple[str, str], Difference]) -> None:
    """Print the metric of each category before and after GRPO, and with a gray image."""
    print(f"\n{'test split':12}{'metric':13}{'before':>8}{'after':>8}{'p':>9}{'image gray':>13}")
    for category, metric in {ALL: "accuracy", **METRICS}.items():
        difference, (hidden,) = differences[category, metric], [r.hidden for r in after.results if r[:2] == (category, metric)]
        values = f"{before.value(category, metric):8.1%}{after.value(category, metric):8.1%}"
        print(f"{category:12}{metric:13}{values}{p_value(difference.p_value):>9}{hidden.value:13.1%}")


def run(seed: int, steps: int, output: Path) -> int:
    """Run the demo on the benchmark and write its results to ``output``.

    Returns:
        0 if GRPO raised the accuracy over all categories, else 1.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)  # the matrices are too small to benefit from more threads
    disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    model, processor = new_model(seed)
    print(f"A small vision-language model learns {suite.NAME}: {', '.join(suite.CATEGORIES)}.\n")
    print(f"Model     the Qwen2.5-VL architecture, {model.num_parameters():,} random weights, seed {seed}")
    start_supervised(model, processor, seed, SEEING_STEPS, ANSWER_STEPS)
    supervised_seconds = time.perf_counter() - start
    before = measure(model, processor, output / "before.jsonl")
    print(f"  {before.value(ALL, 'accuracy'):.1%} of the test questions answered correctly, {supervised_seconds:.0f} s")

    print(f"\nGRPO, {steps} steps: no labels in the loss, one reward per category; means of the last ten steps", flush=True)
    train_start = time.perf_counter()
    log = train(model, processor, seed, steps, output)
    train_seconds = time.perf_counter() - train_start
    after = measure(model, processor, output / "after.jsonl")

    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    seconds = {"supervised": round(supervised_seconds, 1), "grpo": round(train_seconds, 1)}
    write_results(before, after, log, {"seed": seed, "steps": steps, "seconds": seconds}, output)
    differences = after.minus(before)
    print_table(before, after, differences)
    total = time.perf_counter() - start
    print(f"\nTime: supervised {supervised_seconds:.0f} s, GRPO {train_seconds:.0f} s, total {total:.0f} s")
    print(f"Results: {output / 'eval.html'}. Next:")
    print(f"  vlmkernels eval --model {output / 'model'} --dataset {suite.NAME} --max_completion_length {ANSWER_TOKENS}")
    if differences[ALL, "accuracy"].low > 0:
        return 0
    print("FAILED GRPO must raise the accuracy over all categories")
    return 1
