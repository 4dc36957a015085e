"""Passes with masked images, measurements of image use, and passes of a teacher: tokens, operations, memory, phases."""

from dataclasses import replace

import pytest
import torch
from support import tiny
from support.planner import CPU, SMALL

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.branches import split_at_images
from vlmkernels.models.families import family_of
from vlmkernels.ops.linear_kl import linear_kl
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.plan import MACHINES, ModelShape, Workload, costs, fit, plan
from vlmkernels.plan.costs import StepCosts
from vlmkernels.plan.fit import train_arguments
from vlmkernels.plan.workload import PRECISIONS, StepTokens
from vlmkernels.rollout.base import Rollout
from vlmkernels.train import image_use

torch.set_num_threads(1)
MASKED = {"perception_loss_weight": 0.01}


@pytest.fixture(scope="module")
def shape():
    return ModelShape.from_config(tiny.vlm().config)


@pytest.fixture(scope="module")
def teacher():
    config = tiny.vlm().config.to_dict()
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    config["text_config"]["layer_types"] = ["full_attention"] * 3
    config["vision_config"]["out_hidden_size"] = 64
    return ModelShape.from_config(type(tiny.vlm().config)(**config), "teacher")


# Masked images


def test_tokens_equal_those_of_a_batch_with_masked_images(shape):
    model, processor = tiny.vlm(), tiny.processor()
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2**20}
    row = {"prompt": [{"role": "user", "content": "what do you see?"}]}
    rows = [{**row, "images": [tiny.image(k, SMALL.width, SMALL.height)]} for k in range(SMALL.prompts)]
    prompts = encode([read_sample(row, k) for k, row in enumerate(rows)], processor, family_of(model.config))
    length, of_images = prompts.inputs["attention_mask"].sum(1)[0].item(), shape.vision.image_tokens(SMALL.width, SMALL.height)
    before = split_at_images(prompts)[0].inputs["attention_mask"].sum(1)[0].item()
    assert 0 < before < length - of_images
    work = replace(SMALL, prompt_tokens=length - of_images, text_before_images=before, **MASKED)
    count = SMALL.prompts * SMALL.group_size
    ids = torch.ones(count, SMALL.completion_tokens, dtype=torch.int64)
    group = torch.arange(SMALL.prompts).repeat_interleave(SMALL.group_size)
    rollout = Rollout(prompts, group, ids, ids.bool(), torch.zeros(count, dtype=torch.bool), masked_prompts=prompts)
    for shared, packed in ((True, model), (False, None)):
        batch = rollout.branches(torch.arange(count), packed, ids.bool())
        found = StepTokens.from_workload(shape, replace(work, share_prefix=shared), branches=True)
        assert batch.inputs["input_ids"].numel() == found.passed
        assert len(batch.targets) == 2 * ids.numel()
        alone = StepTokens.from_workload(shape, replace(work, share_prefix=shared))
        assert (found.patches, found.image_tokens) == (2 * alone.patches, 2 * alone.image_tokens)
        for budget in (3 * length, 200, 10**4):
            packs = rollout.parts(slice(None), budget, shared=shared, hidden_size=32, branches=True)
            cut = replace(work, share_prefix=shared, microbatch_tokens=budget)
            assert len(packs) == StepTokens.from_workload(shape, cut, branches=True).packs
            passed = StepTokens.from_workload(shape, cut, cut_branches=True)
            prompts_run = sum(len({group[k].item() for k in pack}) if shared else len(pack) for pack in packs)
            assert passed.passed == prompts_run * length + ids.numel()
            assert passed.patches == prompts_run * shape.vision.patches(SMALL.width, SMALL.height)


def test_pairs_of_both_branches(shape):
    work = replace(SMALL, text_before_images=5, **MASKED)
    once, twice = (StepTokens.from_workload(shape, work, branches=branches) for branches in (False, True))
    shared = sum(span.pairs() for span in once.spans if span.stop == 5)
    assert shared == SMALL.prompts * 5**2 / 2
    assert twice.pairs == pytest.approx(2 * once.pairs - shared)


def products_of(run) -> int:
    """Return the operations of the matrix products in a call, also within the kernels, which FlopCounterMode does not enter."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        run()
    return sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def logits_of(width: int, vocab: int, rows: int, dtype=torch.float32):
    return torch.randn(rows, width, dtype=dtype, requires_grad=True), torch.randn(vocab, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_operations_of_the_head_given_masked_images_equal_those_that_torch_counts(shape, full):
    found = StepCosts(shape, replace(SMALL, lora_r=0 if full else 4, **MASKED), CPU)
    hidden, weight = logits_of(shape.decoder.hidden, shape.vocab, found.scored)
    weight.requires_grad_(full)
    targets = torch.zeros(found.scored, dtype=torch.int64)
    forward = products_of(lambda: linear_logps(hidden, weight, targets))
    assert forward == sum(cost.gemm for cost in found.masked_scores())
    logps = linear_logps(hidden, weight, targets).sum()
    assert products_of(logps.backward) == sum(cost.gemm for cost in found.masked_scores(backward=True))
    small = StepCosts(shape, replace(found.work, logits_bytes=4 * shape.vocab), CPU)
    logps = linear_logps(hidden, weight, targets, chunk_bytes=4 * shape.vocab).sum()  # computes the logits again
    assert products_of(logps.backward) == sum(cost.gemm for cost in small.masked_scores(backward=True))


def test_what_masked_images_change(shape):
    alone, masked = plan(shape, SMALL, CPU), plan(shape, replace(SMALL, reference=True, **MASKED), CPU)
    assert masked.loss_tokens.passed == 2 * alone.tokens.passed
    assert masked.phase("reference log-probs").tokens == masked.tokens.passed == alone.tokens.passed
    for name in ("forward and loss", "backward"):
        assert masked.phase(name).flops > 1.8 * alone.phase(name).flops
    assert masked.memory["activations"] == 2 * alone.memory["activations"]
    frozen = {"lora_r": 4}
    encoded = [plan(shape, replace(SMALL, **frozen, **changes), CPU).phase("sampling").flops for changes in ({}, MASKED)]
    tower = StepCosts(shape, SMALL, CPU)
    t = tower.tokens
    cost = tower.tower(t.patches, t.image_tokens, t.vision_pairs, 1)
    assert encoded[1] - encoded[0] == pytest.approx(cost.gemm + cost.attention)
    with pytest.raises(ValueError, match=r"perception_loss_weight must be 0 without images, got 0\.01"):
        replace(SMALL, images=0, **MASKED)
    with pytest.raises(ValueError, match="text_before_images must be <= prompt_tokens = 20, got 21"):
        replace(SMALL, text_before_images=21)


# Image use


def test_image_use(shape):
    assert (costs.MEASURED_PROMPTS, costs.MEASURED_COMPLETIONS) == (image_use.MAX_PROMPTS, image_use.MAX_COMPLETIONS)
    work = replace(SMALL, prompts=6, group_size=5, image_use_steps=1)
    found = plan(shape, work, CPU).phase("image use")
    same = StepTokens.from_workload(shape, replace(SMALL, prompts=4, group_size=2), branches=True)
    assert found.tokens == same.passed
    seldom = plan(shape, replace(work, image_use_steps=10), CPU).phase("image use")
    assert (seldom.seconds, seldom.flops) == pytest.approx((found.seconds / 10, found.flops / 10))
    hidden, weight = logits_of(shape.decoder.hidden, shape.vocab, 4 * 2 * SMALL.completion_tokens)
    operands = hidden.detach(), weight.detach()
    counted = products_of(lambda: linear_kl(*operands, *operands, beta=1.0))
    assert StepCosts(shape, work, CPU).image_use()[0][-1].gemm == counted
    with pytest.raises(ValueError, match="image_use_steps must be None without images, got 10"):
        replace(SMALL, images=0, image_use_steps=10)
    with pytest.raises(ValueError, match="image_use_steps must be >= 1, got 0"):
        replace(SMALL, image_use_steps=0)


# A teacher


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
def test_operations_of_the_divergence_equal_those_that_torch_counts(shape, teacher, full):
    found = StepCosts(shape, replace(SMALL, lora_r=0 if full else 4), CPU, teacher.with_image_tokens(8))
    hidden, weight = logits_of(shape.decoder.hidden, shape.vocab, found.scored)
    other, other_weight = logits_of(teacher.decoder.hidden, teacher.vocab, found.scored)
    weight.requires_grad_(full)
    options = {"beta": 1.0, "token_weights": torch.ones(found.scored)}
    counted = products_of(lambda: linear_kl(hidden, weight, other.detach(), other_weight.detach(), **options).backward())
    assert counted == sum(cost.gemm for cost in found.divergence())


def test_what_a_teacher_adds(shape, teacher):
    work = replace(SMALL, teacher_weights="fp32")
    alone, found = plan(shape, work, CPU), plan(shape, work, CPU, teacher)
    own = plan(teacher, replace(work, reference=True), CPU)
    head = StepCosts(own.shape, work, CPU).scores()
    assert found.phase("teacher").flops == pytest.approx(own.phase("reference log-probs").flops - head.gemm)
    assert found.phase("teacher").tokens == alone.tokens.passed
    assert found.memory["teacher"] == 4 * teacher.params
    assert found.memory["teacher's hidden states"] == 4 * 64 * alone.work.completions * SMALL.completion_tokens
    assert found.memory["logits"] == 2 * alone.memory["logits"]
    assert [phase.name for phase in found.phases if phase not in alone.phases] == ["teacher", "forward and loss"]
    halved = plan(shape, replace(work, teacher_weights="bf16"), CPU, teacher)
    assert halved.memory["teacher"] == PRECISIONS["bf16"] * teacher.params
    frozen = plan(shape, replace(work, lora_r=4), CPU, teacher)  # the policy reads features, the teacher pixels
    assert frozen.phase("teacher").flops == found.phase("teacher").flops
    masked = plan(shape, replace(work, **MASKED), CPU, teacher)
    assert masked.phase("teacher").flops == found.phase("teacher").flops


def test_a_teacher_on_several_gpus():
    three, seven = (ModelShape.from_name(f"qwen2.5-vl-{size}") for size in ("3b", "7b"))
    work = Workload(prompts=8, gpus=8, checkpointing=True, microbatch_tokens=4096)
    found = plan(three, work, MACHINES["h100"], seven)
    assert found.memory["teacher"] == 2 * seven.params / 8
    assert found.memory["teacher's head"] == 2 * seven.head
    assert found.phase("teacher").wire == 2 * seven.params * found.loss_tokens.packs


def test_teachers_that_cannot_be_planned(shape, teacher):
    text = ModelShape.from_config(tiny.text_model().config, "text")
    with pytest.raises(ValueError, match="teacher must have a vision tower for prompts with images, got the text model text"):
        plan(shape, SMALL, CPU, text)
    with pytest.raises(ValueError, match="share_prefix must be false for teacher: alone, got true"):
        plan(shape, SMALL, CPU, replace(teacher, unshared="alone"))


def test_fit_with_a_teacher(shape, teacher):
    memory = replace(CPU, precision="bf16", memory=1e9)
    work = replace(SMALL, precision="bf16", image_use_steps=5, **MASKED)
    found = fit(shape, work, memory, ["image_use_steps"], teacher)
    assert found.plan.teacher.name == "teacher"
    arguments = train_arguments(found.plan, "model", teacher="path")
    assert (arguments["teacher"], arguments["teacher_model_init_kwargs"]) == ("path", '{"dtype": "bfloat16"}')
    assert (arguments["perception_loss_weight"], arguments["image_use_steps"]) == ("0.01", "5")
