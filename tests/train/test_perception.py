"""Training with masked images (PAPO): the gradients of the paper, masks that survive a resume, and named errors."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import tiny, trl_runs
from support.training import FixedGenerate, Gradients, config, length_reward, run_ours, train, vowel_reward

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.families import family_of
from vlmkernels.models.head import completion_logps
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.router_replay import RoutedExperts, use_router_replay
from vlmkernels.train import GRPOTrainer
from vlmkernels.train.masks import PerceptionMasks

WEIGHTS = {"perception_loss_weight": 0.3, "der_loss_weight1": 0.02, "der_loss_weight2": 0.05}


def plain_gradients(model, processor, rows, experience, args):
    """The gradients of equation 2 of the paper, in fp64, from one forward pass per sequence of the model of transformers.

    Tokens before masked images run through the experts of the rollout, if it has any, as all tokens do without masks.
    """
    model = copy.deepcopy(model).double()
    policy = SimpleNamespace(model=model, processor_arguments={})
    prompts = encode([read_sample(row, index) for index, row in enumerate(rows)], processor, family_of(model.config))
    masked, rollout, total = PerceptionMasks(processor, policy, args, {"image"})(prompts, 0), experience.rollout, 0.0

    def logps(inputs, k, ids, mask):
        row = inputs.select(rollout.group[k : k + 1]).append(ids[None], mask[None].long())
        values = {name: x.double() if x.is_floating_point() else x for name, x in row.inputs.items()}
        if (experts := rollout.routed_experts) is not None:
            given = torch.cat([experts.prompts[rollout.group[k]], experts.completions[k, : len(ids)]])
            if inputs is masked and has_media(prompts)[rollout.group[k]]:
                given[int((values["input_ids"][0] == model.config.image_token_id).nonzero()[0]) :] = -1
            values["routed_experts"] = given[None]
        return model(**values).logits[0, -len(ids) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]

    for k, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        ids, mask = ids[mask], mask[mask]
        logp = logps(prompts, k, ids, mask)
        loss = -(logp - logp.detach()).exp() * experience.advantages[k].double()
        if has_media(prompts)[rollout.group[k]]:
            logp_mask = logps(masked, k, ids, mask)
            ratio = (logp_mask - logp).exp()
            kl = ratio - ratio.log() - 1
            assert kl.max() < 10  # or the op would bound it
            loss = loss - args.perception_loss_weight * kl
            loss = loss + args.der_loss_weight1 * -logp + args.der_loss_weight2 * -logp_mask
        total = total + loss.sum() / rollout.completion_mask.sum()
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "share"), [("tiny", "auto"), ("llava_next", "auto"), ("llava_next", False)])
def test_gradients_are_those_of_the_paper(tmp_path, name, share):
    if name == "tiny":
        model, processor, rows = tiny.vlm(), tiny.processor(), tiny.rows(2, "mixed")
        first, rows[1]["images"] = 0, [tiny.image(3, width=56, height=56)]
    else:
        (model, processor), first = trl_runs.tiny_model(name), 150
        rows = trl_runs.rows(2, [[], [(28, 56)]])
    args = config(tmp_path, share_prefix=share, **WEIGHTS)
    trainer = GRPOTrainer(
        copy.deepcopy(model), [length_reward, vowel_reward], args, rows, processing_class=copy.deepcopy(processor)
    )
    trainer.engine, gradients = FixedGenerate(trainer, first=first), Gradients()
    logs = train(trainer, gradients)
    loss, expected = plain_gradients(model, processor, rows, trainer._experience, args)
    assert logs[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert logs[0]["perception/kl"] > 0
    size = max(g.abs().max() for g in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients.steps[0][parameter].double(), gradient, rtol=0, atol=5e-5 * float(size))


class WithExperts(FixedGenerate):
    """Returns random experts of each token."""

    def __call__(self, model, prompts, *arguments, **options):
        rollout, generator = super().__call__(model, prompts, *arguments, **options), torch.Generator().manual_seed(2)
        shapes = prompts.inputs["input_ids"].shape, rollout.completion_ids.shape
        experts = (torch.rand(*shape, 2, 4, generator=generator).argsort(-1)[..., :2].short() for shape in shapes)
        return replace(rollout, routed_experts=RoutedExperts(*experts))


def test_routers_choose_after_masked_images(tmp_path):
    """With ``router_replay``, before masked images and without masks the experts are those of the rollout."""
    model, processor, rows = tiny.qwen3_vl_moe(), tiny.processor(), tiny.rows(2, "mixed")
    args = config(tmp_path, router_replay=True, **WEIGHTS)
    trainer = GRPOTrainer(copy.deepcopy(model), [length_reward, vowel_reward], args, rows, processing_class=processor)
    trainer.engine, gradients = WithExperts(trainer), Gradients()
    logs = train(trainer, gradients)
    experience = trainer._experience
    model.set_experts_implementation("eager")  # others have no fp64
    loss, expected = plain_gradients(use_router_replay(model), processor, rows, experience, args)
    assert logs[0]["loss"] == pytest.approx(loss, abs=1e-4)
    size = float(max(g.abs().max() for g in expected.values()))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients.steps[0][parameter].double(), gradient, rtol=0, atol=5e-5 * size)
    policy, samples, found = trainer.objective.models.policy, torch.arange(8), []
    for packed in (trainer.model, None):
        batch = experience.rollout.branches(samples, packed, experience.loss_mask)
        with torch.no_grad():
            found.append(completion_logps(trainer.model, batch, **policy.head_arguments))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def run(folder, resume=None, **options):
    torch.manual_seed(0)
    args = config(folder, save_strategy="steps", save_steps=1, **options)
    trainer = GRPOTrainer(tiny.vlm(), [length_reward], args, tiny.rows(4, "several"), processing_class=tiny.processor())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_parameters(trainer, other):
    for name, parameter in other.model.named_parameters():
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name], parameter, rtol=0, atol=0)


def test_a_resumed_batch_keeps_its_masks(tmp_path):
    options = {"max_steps": 2, "steps_per_generation": 4, **WEIGHTS}
    whole = run(tmp_path, **options)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)  # in the middle of a batch
    assert_same_parameters(resumed, whole)
    run(tmp_path / "without", max_steps=1, steps_per_generation=4)
    message = "perception_loss_weight, der_loss_weight1 and der_loss_weight2 must be 0, because its batch has no masked images"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "without", resume=str(tmp_path / "without" / "checkpoint-1"), **options)


def test_masks_differ_between_steps_and_processes():
    masks = {}
    for step, rank in ((0, 0), (1, 0), (0, 1)):
        args = SimpleNamespace(seed=42, process_index=rank, mask_ratio=0.6)
        policy = SimpleNamespace(model=tiny.vlm(), processor_arguments={})
        row = {"prompt": [{"role": "user", "content": "?"}], "image": tiny.image(0, 56, 56)}
        prompts = encode([read_sample(row, 0)], tiny.processor(), family_of(policy.model.config))
        masks[step, rank] = PerceptionMasks(tiny.processor(), policy, args, {"image"})(prompts, step).inputs["pixel_values"]
    first, *others = masks.values()
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["perception_loss_weight", "der_loss_weight2", "image_use_steps"])
def test_what_needs_images(tmp_path, name):
    off = "None" if name == "image_use_steps" else "0"
    with pytest.raises(
        ValueError, match=rf"{name} must be {off} for a train_dataset without images \(qwen2_5_vl model\), got 1"
    ):
        run_ours(tmp_path, tiny.rows(4, "none"), **{name: 1})
    with pytest.raises(ValueError, match=rf"{name} must be {off} for a train_dataset without images \(text model\), got 1"):
        GRPOTrainer(
            tiny.text_model(), [length_reward], config(tmp_path, **{name: 1}), tiny.rows(4, "none"),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip

    def look(place: str) -> str:
        """Look.

        Args:
            place: where.
        """
        return place

    args = config(tmp_path, **{name: 1})
    with pytest.raises(
        ValueError, match=rf"{name} must be {off} with tools, whose results would need masked images too, got 1"
    ):
        GRPOTrainer(tiny.vlm(), [length_reward], args, tiny.rows(4), processing_class=tiny.processor(), tools=[look])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio must be in \(0, 1\], got 0.0"),
        ({"image_use_steps": 0}, "image_use_steps must be >= 1, got 0"),
        ({"perception_loss_weight": -0.1}, "perception_loss_weight must be >= 0, got -0.1"),
    ],
)
def test_values(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
