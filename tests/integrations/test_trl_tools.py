"""With tools and environments, TRL's trainer has the same samples, losses and parameters with and without ``patch_trl``."""

import contextlib
import functools
from collections import Counter
from dataclasses import dataclass, field

import pytest

trl = pytest.importorskip("trl")

import torch  # noqa: E402
import transformers  # noqa: E402
from support import tiny_families, tool_models  # noqa: E402
from support.tool_models import Microscope, tool_model  # noqa: E402
from support.trl_runs import build, train  # noqa: E402

from vlmkernels.integrations.trl import generation, patch_trl, scoring  # noqa: E402
from vlmkernels.integrations.trl.segments import SHARED_TOKENS, shared_rows  # noqa: E402
from vlmkernels.integrations.trl.sequences import Sequences  # noqa: E402
from vlmkernels.models.families import family_of  # noqa: E402
from vlmkernels.models.image_features import accepts_image_features  # noqa: E402
from vlmkernels.models.inputs import ModelInputs  # noqa: E402
from vlmkernels.models.loading import base_model  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3
GREEDY = {"generation_kwargs": {"do_sample": False}}


def zoom_as_text(index: int) -> str:
    """Return a part of the image.

    Args:
        index: which part.
    """
    return tool_models.describe(index)


@dataclass
class Case:
    """images: whether rows have images. tool: None for the environment."""

    model: str = "qwen2_5_vl"
    images: bool = True
    tool: object = tool_models.zoom
    options: dict = field(default_factory=dict)
    regroup: bool = False
    lora: bool = False


# fmt: off
CASES = {
    "greedy": Case(options={**GREEDY, "beta": 0.1}),
    "images of tools only, sampled": Case("qwen3_vl", images=False, options={"beta": 0.1, "num_iterations": 2}),
    "text of tools": Case(tool=zoom_as_text, options={"top_k": 20, "repetition_penalty": 1.05}),
    "no images": Case("text", images=False, tool=tool_models.describe, options={"beta": 0.1}),
    "environment": Case(tool=None, options={"loss_type": "grpo"}),
    "environment, greedy": Case("qwen3_vl", tool=None, options={**GREEDY, "entropy_coef": 0.1}),
    "regrouped": Case(options={"gradient_accumulation_steps": 2, "loss_type": "grpo"}, regroup=True),
    "frozen tower": Case(options={"beta": 0.1, "num_iterations": 2}, lora=True),
    "no room for results": Case(options={"max_completion_length": 45, "beta": 0.1}),
    "truncated": Case(tool=zoom_as_text, options={"max_completion_length": 36, "mask_truncated_completions": True}),
    "one call": Case("glm4v", options={"max_tool_calling_iterations": 1}),
    "no grids": Case("llava", options={"beta": 0.1}),
    "hybrid": Case("qwen3_5", options={"beta": 0.1}),
    "experts": Case("qwen3_vl_moe", options={"router_aux_loss_coef": 0.1}),
}
# fmt: on


def place(completions, **_) -> list[float]:
    """A reward that differs between equal completions, so that greedy completions have gradients too."""
    return [len(completion) + float(k % 3) for k, completion in enumerate(completions)]


def build_trainer(path, case: Case, trainer=trl.GRPOTrainer, max_steps=STEPS, counts_calls=None):
    """A trainer, and the list of what its ``_generate`` will return.

    Args:
        counts_calls: whether the result of the tool depends on the number of calls before. Default: for greedy decoding.
    """
    model, processor, _, rows = tool_model(case.model, images=case.tool is not tool_models.describe)
    samples, greedy = [], "generation_kwargs" in case.options

    def make(model, rewards, **arguments):
        calls = Counter()

        def tool(index: int):
            calls["all"] += 1
            return case.tool(index + 10 * (calls["all"] % 2) if greedy and counts_calls is not False else index)

        if case.tool is None:
            arguments["environment_factory"] = Microscope
        else:
            tool = functools.update_wrapper(tool, case.tool)
            tool.__name__ = tool.__name__.removesuffix("_as_text")
            arguments["tools"] = [tool]
        made = trainer(model, [place], **arguments)
        if made._is_vlm:  # the tokenizers of the tiny models have the image tokens of all families
            made._image_pad_token_id = made.model.config.image_token_id
        generate = made._generate
        made._generate = lambda prompts: samples.append(generate(prompts)) or samples[-1]
        return made

    options = {"max_completion_length": 120, "num_iterations": 1, "max_steps": max_steps, **case.options}
    if case.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    data = rows if case.images else [{"prompt": row["prompt"]} for row in rows]
    return build(path, make, model, processor, data, **options), samples


def tokens_of(samples) -> list:
    """The prompts, completions and masks of the model's tokens."""
    return [list(sample[:3]) for sample in samples]


def assert_same(mine, theirs):
    assert len(mine.logs) == len(theirs.logs) > 1
    for own, other in zip(mine.logs, theirs.logs, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            rel = 2e-4 if name == "grad_norm" else 1e-4
            assert own[name] == pytest.approx(value, rel=rel, abs=5e-6, nan_ok=True), (other["step"], name)
    for name, parameter in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], parameter, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_trl(tmp_path, monkeypatch, name):
    case, notices = CASES[name], []
    if case.model == "llava":  # it does not accept the token types that TRL adds
        monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "_validate_model_kwargs", lambda *_: None)
    monkeypatch.setattr(scoring.logger, "warning_once", notices.append)
    monkeypatch.setattr(generation.logger, "warning_once", notices.append)
    trainer, expected = build_trainer(tmp_path, case)
    theirs = train(trainer)
    with patch_trl(regroup=case.regroup):
        trainer, samples = build_trainer(tmp_path, case)
        assert trainer._scorer.sampling_reason is None
        mine = train(trainer)
    assert trainer._scorer.sequences is None
    assert tokens_of(samples) == tokens_of(expected)
    assert any(sum(mask) < len(mask) for sample in samples for mask in sample[2])  # tools returned something
    assert any(log.get("grad_norm", 0) > 1e-3 for log in theirs.logs)
    if case.regroup:
        for log in (*mine.logs, *theirs.logs):
            for metric in [metric for metric in log if metric.startswith(("clip_ratio", "entropy"))]:
                del log[metric]  # means over other micro-batches
    assert_same(mine, theirs)
    assert not notices


def watch(trainer) -> dict[str, list[int]]:
    """Return lists that will hold the tokens of each run of the language model and the patches of each run of the tower."""
    sizes = {"tokens": [], "patches": []}
    inner = base_model(trainer.model).model
    inner.visual.register_forward_pre_hook(lambda _, args: sizes["patches"].append(len(args[0])))
    inner.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes["tokens"].append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    return sizes


def test_each_token_and_image_runs_once(tmp_path):
    """Two prompts with four greedy completions each: what runs in the rollout, and what in the training step."""
    case = Case(options=GREEDY)
    trainer, _ = build_trainer(tmp_path, case, max_steps=1, counts_calls=False)
    theirs = watch(trainer)
    train(trainer)
    with patch_trl():
        trainer, samples = build_trainer(tmp_path, case, max_steps=1, counts_calls=False)
        mine = watch(trainer)
        train(trainer)
    ((prompts, completions, *_, images, _),) = samples
    distinct = {(tuple(p), tuple(c)): i for p, c, i in zip(prompts, completions, images, strict=True)}
    assert len(distinct) == 2
    in_prompts = sum(len(prompt) for prompt, _ in distinct)
    in_trees = in_prompts + sum(len(completion) for _, completion in distinct)
    # The last token of a completion does not run in the rollout.
    assert sum(mine["tokens"]) == in_prompts + sum(len(c) - 1 for c in completions) + in_trees
    assert mine["tokens"][-1] == in_trees
    assert sum(mine["tokens"]) < 0.4 * sum(theirs["tokens"])
    if not accepts_image_features(base_model(trainer.model)):
        return  # this version of transformers runs equal images again
    patches = [(image.tobytes(), 4 * (image.width // 32)) for row in distinct.values() for image in row]
    # Both prompts lead to the same images of zoom(3), in different turns.
    assert sum(mine["patches"][:-1]) == sum(count for _, count in patches)
    assert mine["patches"][-1] == sum(dict(patches).values()) < sum(mine["patches"][:-1])
    assert sum(mine["patches"]) < 0.2 * sum(theirs["patches"])


def test_a_frozen_tower_encodes_each_image_once(tmp_path):
    """In the rollout, for the reference model and in two training steps."""
    case = Case(options={**GREEDY, "beta": 0.1, "num_iterations": 2}, lora=True)
    with patch_trl():
        trainer, samples = build_trainer(tmp_path, case, max_steps=2, counts_calls=False)
        if not accepts_image_features(base_model(trainer.model)):
            pytest.skip("this version of transformers does not accept features in place of pixels")
        sizes = watch(trainer)
        train(trainer)
    ((*_, images, _),) = samples
    pictures = {image.tobytes(): image for row in images for image in row}
    assert sum(sizes["patches"]) == sum(4 * (image.width // 32) for image in pictures.values())


def test_prompts_that_do_not_continue_a_turn(tmp_path, monkeypatch):
    """A subclass may change what TRL samples from: then all turns run again, and a warning says so."""
    case, notices = Case(options=GREEDY), []
    monkeypatch.setattr(generation.logger, "warning_once", notices.append)
    monkeypatch.setattr(Sequences, "_continued", lambda *_: None)
    trainer, expected = build_trainer(tmp_path, case, max_steps=1)
    theirs = train(trainer)
    with patch_trl():
        trainer, samples = build_trainer(tmp_path, case, max_steps=1)
        mine = train(trainer)
    assert tokens_of(samples) == tokens_of(expected)
    assert_same(mine, theirs)
    assert set(notices) == {"Prefix sharing: earlier turns run again in sampling, because the prompts do not continue them"}


def test_completions_of_a_prompt_in_any_order(tmp_path):
    """Also where prompts have different numbers of completions."""
    found, rows = [], [tool_model().rows[k] for k in (2, 3, 2, 2, 0, 3, 0, 1)]
    for context in (patch_trl(), contextlib.nullcontext()):
        with context:
            trainer, _ = build_trainer(tmp_path, Case(options={"top_p": 0.9}))
            torch.manual_seed(0)
            found.append(trainer._generate_and_score_completions(rows))
    for name in ("completion_ids", "completion_mask", "tool_mask"):
        assert torch.equal(found[0][name], found[1][name])


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A trainer with the patch, a micro-batch, and the warnings."""
    notices = []
    monkeypatch.setattr(scoring.logger, "warning_once", notices.append)
    with patch_trl():
        trainer, _ = build_trainer(tmp_path, Case(options=GREEDY))
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        yield trainer, inputs, notices


MEDIA = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
WARNING = f"Prefix sharing: disabled in training for micro-batches {scoring.UNKNOWN_IMAGES}"


def logps_of(trainer, inputs: dict, completion_mask: torch.Tensor, *, own: bool = True, **media) -> torch.Tensor:
    """Log-probabilities of the completions, with our scorer or with TRL's own code."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], completion_mask], 1)
    scorer = trainer._scorer
    trainer._scorer = scorer if own else None
    width = completion_mask.shape[1]
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, **media)
    trainer._scorer = scorer
    return logps.masked_fill(completion_mask == 0, 0.0)


def test_dropped_images(scored):
    """TRL drops all images of a batch if their tokens do not match. Then its own model inputs are scored."""
    trainer, inputs, notices = scored
    types = torch.zeros_like(inputs["mm_token_type_ids"])
    mine, theirs = (
        logps_of(trainer, inputs, inputs["completion_mask"], own=own, mm_token_type_ids=types) for own in (True, False)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert notices == [WARNING]


def test_images_that_do_not_match(scored):
    trainer, inputs, notices = scored
    ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    model_inputs = {"input_ids": ids, "attention_mask": mask} | {name: inputs[name] for name in MEDIA[:-1]}
    width, counts = inputs["completion_ids"].shape[1], inputs["num_images"]
    assert "tree_layout" in trainer._scorer.micro_batch(trainer.model, model_inputs, width, counts).batch.inputs
    assert not notices
    ids[0, -2] = trainer.model.config.image_token_id
    assert "tree_layout" not in trainer._scorer.micro_batch(trainer.model, model_inputs, width, counts).batch.inputs
    assert notices == [WARNING]


def test_images_of_masked_completions(scored):
    """mask_truncated_completions: TRL's own model inputs have images without tokens then, on which the model fails."""
    trainer, inputs, notices = scored
    masked = inputs["completion_mask"].clone()
    masked[[0, 3]] = 0
    media = {name: inputs[name] for name in MEDIA}
    mine = logps_of(trainer, inputs, masked, **media)
    theirs = logps_of(trainer, inputs, inputs["completion_mask"], own=False, **media)
    torch.testing.assert_close(mine, theirs.masked_fill(masked == 0, 0.0), rtol=1e-5, atol=1e-5)
    assert mine[[0, 3]].eq(0).all()
    assert not notices


def test_cuts_are_where_equal_beginnings_end():
    """Against a comparison of each pair of rows, token by token, with random images and common beginnings."""
    family = family_of(tiny_families.case("qwen2_5_vl").model.config)
    rng, prompt, width, image = torch.Generator().manual_seed(0), 4, 100, family.image_token_id

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, generator=rng)

    tokens = 60 + draw(50, 12, prompt + width)
    tokens[:, :prompt] = tokens[draw(2, 12), :prompt]
    keys: list[list[int]] = []
    for row in range(12):
        spans = [(20, 4), (40, 2), (70, 4)]
        if row:
            other, stop = int(draw(row, 1)), prompt + int(draw(width, 1))
            tokens[row, prompt:stop] = tokens[other, prompt:stop]
        for start, size in spans:
            tokens[row, start : start + size] = image
        keys.append([int(draw(2, 1)) for _ in spans])
    lengths = [80 + int(draw(21, 1)) for _ in range(12)]
    mask = torch.arange(prompt + width) < prompt + torch.tensor(lengths).unsqueeze(1)
    grids = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 4]]).repeat(12, 1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "mm_token_type_ids": (tokens == image).long(),
        "image_grid_thw": grids,
        "pixel_values": torch.zeros(int(grids.prod(1).sum()), 3),
    }
    batch = ModelInputs.from_processor(inputs, family, torch.full((12,), 3))
    shared = shared_rows(batch, torch.tensor(keys).flatten(), prompt)

    marked = []  # each row as a list in which tokens of different images differ
    for row in range(12):
        number = iter(key for key, size in zip(keys[row], (4, 2, 4), strict=True) for _ in range(size))
        marked.append([("image", next(number)) if t == image else t for t in tokens[row].tolist()][: prompt + lengths[row]])
    for row in range(12):
        ends = set()
        same = [k for k in range(12) if marked[k][:prompt] == marked[row][:prompt]]
        assert shared.group[row] == same[0]
        for other in same:
            end = next(
                (n for n, (a, b) in enumerate(zip(marked[row], marked[other], strict=False)) if a != b),
                min(len(marked[row]), len(marked[other])),
            )
            while isinstance(marked[row][end - 1], tuple):
                end -= 1
            ends.add(end)
        cuts, last = [], prompt
        for end in sorted(ends):
            if end - last >= SHARED_TOKENS and end < len(marked[row]):
                cuts.append(last := end)
        assert shared.cuts[row] == cuts
    assert sum(map(len, shared.cuts)) > 6
