"""Training with tools, against plain code that runs each trajectory by itself, and against TRL."""

import copy
from dataclasses import replace

import pytest
import torch
import trl
from datasets import Dataset
from support.tool_models import Microscope, tool_model
from support.training import Gradients, config, perturb
from trl import GRPOConfig as TRLConfig

from vlmkernels.models.trajectories import chain
from vlmkernels.train import GRPOTrainer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'environment_factory'", "ignore:__array__ implementation")
OPTIONS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 150}


def image_reward(completions, **kwargs):
    """Different for trajectories that are equal, so that their advantages are not 0."""
    parts = [[p for m in c if isinstance(m["content"], list) for p in m["content"]] for c in completions]
    return [sum(p["type"] == "image" for p in row) + k * k % 7 / 3 for k, row in enumerate(parts)]


def trained(tmp_path, made, model, rewards, tools=None, teacher=None, **options):
    """A trainer after its steps, and their gradients."""
    args = config(tmp_path, **{**OPTIONS, **options})
    tools = {"tools": [made.tool]} if tools is None else tools
    trainer = GRPOTrainer(model, rewards, args, made.rows, processing_class=made.processor, teacher=teacher, **tools)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


def plain_distributions(model, rollout, k):
    """The log-probabilities of the vocabulary after each token of trajectory k, from a forward pass of its own."""
    turns, prompt = rollout.turns, rollout.prompts.select(rollout.group[[k]]).trim()
    segments = [turns.inputs.select(torch.tensor([s])).trim() for s in turns.members[k]]
    whole = chain([prompt, *segments])
    logits = model(**whole.inputs, use_cache=False).logits[0].float()
    count = int(rollout.completion_mask[k].sum())
    assert torch.equal(whole.inputs["input_ids"][0, -count:], rollout.completion_ids[k, :count])
    return logits[-count - 1 : -1].log_softmax(-1)


def with_pixels_only(inputs):
    return replace(inputs, inputs={name: x for name, x in inputs.inputs.items() if "features" not in name})


CASES = {
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "qwen3_5": {},
    "lfm2_vl": {},
    "internvl": {},
    "text results": {"name": "qwen2_5_vl", "images": False},
    "copies of the prompt": {"name": "qwen2_5_vl", "share_prefix": False},
    "a budget of tokens": {"name": "qwen2_5_vl", "max_tokens_per_microbatch": 330},
    "two slots": {"name": "qwen2_5_vl", "max_num_seqs": 2},
    "frozen tower, and a teacher": {"name": "qwen2_5_vl", "freeze": True, "teacher": True},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_equal_trajectories_by_themselves(tmp_path, case):
    """One step on policy: DAPO's loss over the tokens of the model, and nothing over those of its tools."""
    options = {"name": case, **CASES[case]}
    name, images = options.pop("name"), options.pop("images", True)
    freeze, teacher = options.pop("freeze", False), options.pop("teacher", None)
    made = tool_model(name, images=images)
    model = copy.deepcopy(made.model)
    if teacher:
        perturb(teacher := copy.deepcopy(made.model))
    if freeze:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("visual" not in key)
    before = {key: x.detach().clone() for key, x in model.state_dict().items()}
    trainer, (gradients,) = trained(tmp_path, made, model, image_reward, teacher=teacher, **options)
    experience = trainer._experience
    rollout, advantages = experience.rollout, experience.advantages
    assert len({tuple(row) for row in rollout.token_ids()}) > 1
    assert rollout.turns.inputs.num_images.any() == images
    model.load_state_dict(before)
    if "image_features" in rollout.prompts.inputs:
        assert freeze
    model.zero_grad()
    loss, total = 0.0, int(rollout.sampled_mask.sum())
    for k in range(8):
        mask = rollout.sampled_mask[k][rollout.completion_mask[k]]
        ids, distributions = rollout.completion_ids[k, : len(mask)][mask], plain_distributions(model, rollout, k)[mask]
        logps = distributions.gather(1, ids.unsqueeze(1)).squeeze(1)
        if teacher:
            with torch.no_grad():
                others = plain_distributions(teacher, rollout.with_inputs(with_pixels_only), k)[mask]
            loss = loss + torch.nn.functional.kl_div(others, distributions, log_target=True, reduction="sum") / total
        loss = loss - (advantages[k] * (logps - logps.detach()).exp()).sum() / total
        if rollout.logps is not None:
            torch.testing.assert_close(rollout.logps[k][rollout.sampled_mask[k]], logps.detach(), rtol=1e-4, atol=1e-4)
            assert not rollout.logps[k][~rollout.sampled_mask[k]].any()
    loss.backward()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    largest = max(float(x.abs().max()) for x in expected.values())
    for key, x in expected.items():
        torch.testing.assert_close(gradients[key], x, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=key: f"{n}: {m}")
    assert log["tools/frac_sampled_tokens"] == pytest.approx(total / int(rollout.completion_mask.sum()))
    assert log["completions/mean_length"] == pytest.approx(total / 8)


@pytest.mark.parametrize(("name", "how"), [("qwen2_5_vl", "environment"), ("qwen3_vl", "tools")])
def test_equals_trl_over_three_steps(tmp_path, name, how):
    """Greedy completions (top_k = 1), losses, tool metrics and parameters, with images in the results."""
    made = tool_model(name)
    tools = {"tools": [made.tool]} if how == "tools" else {"environment_factory": Microscope}
    # All trajectories of a group are equal, so that only the entropy bonus has a gradient.
    options = {**OPTIONS, "top_k": 1, "entropy_coef": 0.1, "max_steps": 3, "max_tool_calling_iterations": 2}
    runs = []
    for cls, settings in ((GRPOTrainer, config(tmp_path / "ours", **options)), (trl.GRPOTrainer, None)):
        seen = []

        def reward(completions, completion_ids, seen=seen, **kwargs):
            seen.append(completion_ids)
            return image_reward(completions)

        if settings is None:
            settings = config(tmp_path / "trl", TRLConfig, **options, gradient_checkpointing=False)
        model, data = copy.deepcopy(made.model), Dataset.from_list(made.rows)
        trainer = cls(model, reward, settings, data, processing_class=copy.deepcopy(made.processor), **tools)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((seen, logs, {key: x.detach().clone() for key, x in model.named_parameters()}))
    (our_ids, ours, our_weights), (their_ids, theirs, their_weights) = runs
    assert our_ids == their_ids
    assert len(our_ids) == 3
    for a, b in zip(ours, theirs, strict=True):
        names = ["loss", "reward", "tools/call_frequency", "tools/failure_frequency", "completions/mean_length"]
        names += ["completions/clipped_ratio", *(["rewards/Microscope/mean"] if how == "environment" else [])]
        assert [a[key] for key in names] == pytest.approx([b[key] for key in names], abs=1e-5), names
        assert a["tools/call_frequency"] > 0
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["grad_norm"] > 0.01
    for key, x in their_weights.items():
        torch.testing.assert_close(our_weights[key], x, rtol=1e-4, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")


def test_dynamic_sampling(tmp_path):
    """Trajectories of several rounds become one batch, in which images of results belong to their calls."""
    made = tool_model("qwen2_5_vl")
    rounds = []

    def reward(completions, **kwargs):
        """Only the last group of each round has different rewards."""
        rounds.append(completions)
        return [float(k == len(completions) - 1) for k in range(len(completions))]

    options = {"dynamic_sampling": True, "max_tool_calling_iterations": 1, "num_generations": 2}
    options["per_device_train_batch_size"] = 4
    trainer, _ = trained(tmp_path, made, copy.deepcopy(made.model), reward, **options)
    first, second = rounds
    rollout, scored = trainer._experience.rollout, trainer._last_scored[0]
    assert scored.completions == [*first[2:], *second[-2:]]
    assert rollout.turns.inputs.num_images.any()
    assert len(rollout.turns.members) == len(scored.episodes) == 4
    images = [sum(int(rollout.turns.inputs.num_images[s]) for s in segments) for segments in rollout.turns.members]
    assert images == [len(episode.images) for episode in scored.episodes]
    log = trainer.state.log_history[0]
    calls = [message["role"] == "tool" for c in (*first, *second) for message in c]
    assert log["tools/call_frequency"] == pytest.approx(sum(calls) / len(first + second))


def test_images_of_results_follow_the_resolution_of_the_step(tmp_path):
    made = tool_model("qwen2_5_vl")
    largest = []
    for schedule in (None, [{"step": 0, "max_pixels": 28 * 28}]):
        model = copy.deepcopy(made.model)
        trainer, _ = trained(tmp_path, made, model, image_reward, image_resolution_schedule=schedule)
        rollout = trainer._experience.rollout
        inputs = rollout.prompts.inputs, rollout.turns.inputs.inputs
        largest.append([int(x["image_grid_thw"].prod(1).max()) for x in inputs])
    assert largest[1] == [4, 4]  # patches
    assert min(largest[0]) > 4
