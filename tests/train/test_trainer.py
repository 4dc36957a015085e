"""The trainer against TRL with the same weights and completions, and with every mix of images."""

import math
import os

import pytest
import torch
from support import tiny, tiny_families
from support.engines import FunctionEngine
from support.training import (
    FixedGenerate,
    Gradients,
    config,
    fixed_completions,
    length_reward,
    lora,
    perturb,
    run_ours,
    train,
    vowel_reward,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels.models.families import media_token_ids
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.image_features import use_image_features
from vlmkernels.models.packs import pad_completions
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ("none", {"loss_type": "dapo"}),
        ("one", {"loss_type": "grpo", "scale_rewards": "none"}),
        ("one", {"loss_type": "dapo", "beta": 0.3, "num_iterations": 2, "max_steps": 2}),
        ("several", {"loss_type": "grpo", "beta": 0.3, "mask_truncated_completions": True}),
        ("several", {"loss_type": "dapo", "scale_rewards": "batch", "temperature": 0.7, "reward_weights": [1.0, -0.5]}),
        ("one", {"loss_type": "dapo", "steps_per_generation": 4, "max_steps": 2, "epsilon_high": 0.3}),
        ("none", {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2}),
        ("none", {"loss_type": "dr_grpo", "delta": 1.1, "steps_per_generation": 4, "max_steps": 2}),
        (
            "none",
            {
                "loss_type": "cispo",
                "epsilon_high": 1.02,
                "top_entropy_quantile": 0.5,
                "steps_per_generation": 4,
                "max_steps": 2,
            },
        ),
        (
            "none",
            {"loss_type": "vespo", "entropy_coef": 0.1, "off_policy_mask_threshold": 0.01, "num_iterations": 2, "max_steps": 2},
        ),
    ],
    ids=[
        "text dapo",
        "image grpo",
        "image dapo kl, two iterations",
        "images grpo kl",
        "images dapo",
        "two steps per generation",
        "gspo",
        "dr_grpo",
        "cispo",
        "vespo",
    ],
)
def test_loss_gradient_and_metrics_equal_trl(tmp_path, monkeypatch, images, options):
    trl = pytest.importorskip("trl")
    # TRL shuffles completions over the micro-batches, and metrics are means over micro-batches.
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    model = tiny.text_model() if images == "none" else tiny.vlm()
    processor = tiny.tokenizer() if images == "none" else tiny.processor()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data, funcs = tiny.rows(4, images), [length_reward, vowel_reward]

    def run(trainer_class, config_class, stub, **extra):
        args = config(tmp_path / trainer_class.__module__, config_class, **options, **extra)
        policy = type(model).from_pretrained(tmp_path / "model")
        dataset = data
        if config_class is not GRPOConfig:
            from datasets import Dataset

            dataset = Dataset.from_list(data)
        trainer = trainer_class(policy, funcs, args=args, train_dataset=dataset, processing_class=processor)
        stub(trainer)
        if trainer.ref_model is not None:
            perturb(trainer.ref_model)
        gradients = Gradients()
        return train(trainer, gradients), gradients.steps

    def stub_trl(trainer):
        trainer._generate_single_turn = lambda prompt_ids, *_, **__: (fixed_completions(len(prompt_ids)), None)

    def stub_ours(trainer):
        trainer.engine = FixedGenerate(trainer)

    trl_only = {"gradient_checkpointing": False}
    theirs, their_gradients = run(trl.GRPOTrainer, trl.GRPOConfig, stub_trl, **trl_only)
    ours, our_gradients = run(GRPOTrainer, GRPOConfig, stub_ours)
    assert len(ours) == len(theirs) == options.get("max_steps", 1)
    for mine, other in zip(ours, theirs, strict=True):
        names = {name for name in other if "time" not in name} - {"entropy_coef"}
        assert names <= mine.keys()
        for name in names:
            assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=2e-6), name
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in other.items():
            scale = max(g.abs().max() for g in other.values())
            torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=2e-5 * float(scale), msg=name)


def test_mixed_batch_gives_the_gradient_of_its_samples_alone(tmp_path):
    """A micro-batch with no, one and two images, against the full logits of each sample without padding."""
    options = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "loss_type": "grpo"}
    data = tiny.rows(3, "mixed")
    trainer, (log,), (gradients,) = run_ours(tmp_path, data, **options)
    advantages = trainer._experience.advantages
    model, processor, losses = tiny.vlm(), tiny.processor(), []
    for index, completion in enumerate(fixed_completions(12)):
        row = data[index // 4]
        parts = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(text=[text], images=row["images"] or None, return_tensors="pt")
        for name, new in {"input_ids": completion, "attention_mask": [1] * 9, "mm_token_type_ids": [0] * 9}.items():
            inputs[name] = torch.cat([inputs[name], torch.tensor([new[: len(completion)]])], 1)
        logits = model(**inputs).logits[0, -len(completion) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(completion)), completion]
        losses.append(-(advantages[index] * (logps - logps.detach()).exp()).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_equals_one_large_batch(tmp_path, loss_type):
    data = tiny.rows(4, "mixed")
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "loss_type": loss_type}
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "loss_type": loss_type}
    _, (first,), (many,) = run_ours(tmp_path, data, **small)
    _, (second,), (one,) = run_ours(tmp_path, data, **large)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-6)
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=2e-5 * float(one[name].abs().max()) + 1e-7)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_checkpointed_activations_give_the_same_gradient(tmp_path):
    data = tiny.rows(4, "mixed")
    _, _, (plain,) = run_ours(tmp_path, data, beta=0.1)
    trainer, _, (checkpointed,) = run_ours(tmp_path, data, beta=0.1, gradient_checkpointing=True)
    assert trainer.model.model.language_model.gradient_checkpointing
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("change", ["none", "cap", "scale", "square"])
def test_changes_of_a_model_to_its_logits_are_detected(change):
    model = tiny.text_model()
    # The configuration has both values, but the model applies one only if the test changes its forward.
    model.config.final_logit_softcapping, model.config.logit_scale = 5.0, 0.25
    changes = {"none": lambda x: x, "cap": lambda x: 5 * torch.tanh(x / 5), "scale": lambda x: x / 4, "square": lambda x: x**2}
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = changes[change](output.logits)
        return output

    model.forward = changed
    if change == "square":
        with pytest.raises(
            NotImplementedError, match=r"Qwen2ForCausalLM must pass on, scale or cap its logits, got \[1.0, 400"
        ):
            logit_arguments(model, model.lm_head)
        return
    arguments = logit_arguments(model, model.lm_head)
    assert arguments == {"none": {}, "cap": {"softcap": 5.0}, "scale": {"logit_scale": 0.25}}[change]
    ids = torch.arange(12).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = pad_completions(inputs, torch.ones(2, 4, dtype=torch.bool))
    with torch.no_grad():
        expected = model(**inputs).logits[:, 1:-1].log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1)
        logps = completion_logps(model, batch, head=model.lm_head, arguments=arguments, temperature=1.0)
    torch.testing.assert_close(logps.view(2, 4), expected)


def test_lora_on_the_head():
    """Log-probabilities and gradients equal those of the adapted head's logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny.text_model(), config)
    head = output_head(model)
    ids = torch.arange(12).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapters = [p for p in model.parameters() if p.requires_grad]

    def from_logits():
        return model(**inputs).logits[:, 1:-1].log_softmax(-1).gather(-1, ids[:, 2:, None]).squeeze(-1)

    def from_head():
        batch = pad_completions(inputs, torch.ones(2, 4, dtype=torch.bool))
        return completion_logps(model, batch, head=head, arguments={}, temperature=1.0).view(2, 4)

    torch.testing.assert_close(from_head(), from_logits())
    gradients = [torch.autograd.grad(logps().sum(), adapters) for logps in (from_head, from_logits)]
    torch.testing.assert_close(*gradients)
    with model.disable_adapter():
        torch.testing.assert_close(from_head(), from_logits())


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}])
def test_unsupported_adapters_of_the_head_raise(changes):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.text_model(), LoraConfig(r=4, target_modules=["lm_head"], **changes))
    with pytest.raises(ValueError, match=r"peft_config must .*the language-model head"):
        output_head(model)


def check_logps(trainer, logps):
    """Old log-probabilities in the experience equal those of the initial model, from full logits of padded inputs."""
    rollout = trainer._experience.rollout
    inputs, width = rollout.padded(torch.arange(len(rollout.group))).inputs, rollout.completion_mask.shape[1]
    model = use_image_features(tiny.vlm())  # a frozen tower replaces pixels by features
    use_vision_ops(model, trainer.processing_class)  # because the rows of pixels are uint8
    with torch.no_grad():
        logits = model(**inputs).logits[:, -width - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -width:, None]).squeeze(-1)
    mask = rollout.completion_mask
    torch.testing.assert_close(logps[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_lora_reference_is_the_model_without_its_adapters(tmp_path):
    data = tiny.rows(4, "one")
    trainer, (log,), (gradients,) = run_ours(tmp_path, data, beta=0.3, peft_config=lora())
    assert trainer.ref_model is None
    assert all("lora_" in name for name in gradients)
    assert log["kl"] > 1e-3  # adapters with random weights differ from the base model

    check_logps(trainer, trainer._experience.ref_logps)


def test_second_iteration_uses_the_log_probabilities_of_the_first(tmp_path):
    trainer, (first, second), _ = run_ours(
        tmp_path, tiny.rows(4, "one"), num_iterations=2, max_steps=2, learning_rate=1.0, loss_type="grpo"
    )
    assert first["clip_ratio/region_mean"] == 0
    assert second["clip_ratio/region_mean"] > 0
    assert "reward" in first
    assert "reward" not in second  # the second step sampled nothing
    check_logps(trainer, trainer._experience.old_logps)


@pytest.mark.parametrize("images", ["none", "one", "mixed"])
def test_trains_a_vlm_on_sampled_completions(tmp_path, images):
    options = {"max_steps": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "optim": "adamw_torch"}
    before = tiny.vlm().state_dict()
    trainer, logs, _ = run_ours(tmp_path, tiny.rows(4, images), fixed=False, funcs=[length_reward, "cer"], **options)
    assert [log["step"] for log in logs] == [1, 2]
    assert all(math.isfinite(log["loss"]) and 1 <= log["completions/mean_length"] <= 6 for log in logs)
    ids = trainer._experience.rollout.completion_ids
    assert not torch.isin(ids, torch.tensor(media_token_ids(trainer.model.config, trainer.processing_class))).any()
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("share", ["auto", False])
def test_mixed_precision_casts_weights_once_to_sample(tmp_path, share):
    """Weights are cast once for all tokens, and the casts are released after sampling, so that all weights get gradients."""
    model, casts = tiny.text_model(), []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts[-1] += 1
            return function(*args, **(kwargs or {}))

    options = {"bf16": True, "use_cpu": True, "share_prefix": share, "max_completion_length": 16}
    args = config(tmp_path, **options)
    trainer = GRPOTrainer(model, [length_reward], args, tiny.rows(4, "none"), processing_class=tiny.tokenizer())
    engine = trainer.engine

    def counted(*args):
        casts.append(0)
        with Casts():
            return engine(*args)

    trainer.engine = FunctionEngine(counted, engine.shares_prefix)
    trainer.train()
    assert casts
    assert 0 < max(casts) <= len(weights)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if parameter.dim() > 1)


def test_media_tokens_are_never_sampled(tmp_path):
    model = tiny.vlm()
    banned = [tiny.tokenizer().convert_tokens_to_ids(tiny.SPECIAL[n]) for n in ("image", "video", "vision_start", "vision_end")]
    assert media_token_ids(model.config, tiny.processor()) == sorted(banned)
    assert media_token_ids(tiny.text_model().config, tiny.tokenizer()) == []
    with torch.no_grad():  # the model would sample only these tokens
        model.lm_head.weight[banned] *= 100
    data = tiny.rows(4, "one")
    trainer, _, _ = run_ours(tmp_path, data, model=model, fixed=False, generation_kwargs={"suppress_tokens": [0, 1]})
    assert not torch.isin(trainer._experience.rollout.completion_ids, torch.tensor([*banned, 0, 1])).any()


def test_processor_runs_once_per_prompt(tmp_path):
    trainer, _, _ = run_ours(tmp_path, tiny.rows(4, "one"), num_generations=4)
    rollout = trainer._experience.rollout
    assert len(rollout.completion_ids) == 8
    assert len(rollout.prompts.inputs["image_grid_thw"]) == 2


def test_evaluation_is_logged_with_its_prefix(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, "eval_temperature": 0.0}
    args = config(tmp_path, **options)
    data = {"easy": tiny.rows(3, "mixed"), "hard": tiny.rows(2, "none")}
    trainer = GRPOTrainer(tiny.vlm(), ["cer", length_reward], args, tiny.rows(4), data, processing_class=tiny.processor())
    trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert logged["eval_easy_reward"] >= logged["eval_easy_rewards/length_reward/mean"]
    assert {"eval_hard_rewards/cer/mean", "eval_hard_completions/mean_length"} <= logged.keys()
    assert trainer.evaluate()["eval_easy_reward"] == trainer.evaluate()["eval_easy_reward"]  # greedy


def test_completions_page_holds_everything(tmp_path):
    data = tiny.rows(4, "one")
    data[0]["prompt"][0]["content"] = "what is <b>0</b>?"
    run_ours(tmp_path, data, log_completions=True, num_completions_to_print=6)
    page = (tmp_path / "completions" / "step-000001.html").read_text()
    assert page.count("<section>") == 2
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<tr><td>") == 6
    assert "what is &lt;b&gt;0&lt;/b&gt;?" in page
    assert "length_reward" in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 3}, r"num_generations must divide per_device_train_batch_size \* steps_per_generation = 8, got 3"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"epsilon": 2.0}, r"epsilon must be in \[0, 1\], got 2.0"),
        ({"beta": -1.0}, "beta must be >= 0, got -1.0"),
        ({"loss_type": "ppo"}, "loss_type must be one of .*dapo.*, got 'ppo'"),
        ({"scale_rewards": "max"}, "scale_rewards must be one of group, batch, none, got 'max'"),
        ({"max_completion_length": 0}, "max_completion_length must be >= 1, got 0"),
        ({"generation_batch_size": 6}, r"generation_batch_size must be a multiple of .* = 4, got 6"),
        ({"generation_batch_size": 8, "steps_per_generation": 4}, r"generation_batch_size must equal .* = 16, got 8"),
        (
            {"generation_kwargs": {"temperature": 0.5}},
            "generation_kwargs must not hold temperature or do_sample: .*, got temperature",
        ),
        ({"steps_per_generation": 3}, r"gradient_accumulation_steps must divide, or be a multiple of, .* = 3, got 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_errors_name_argument_rule_and_value(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_generation_kwargs_override_the_fields(tmp_path):
    kwargs = {"top_k": 5, "top_p": None, "eos_token_id": 3, "num_beams": 2}
    sampling = config(tmp_path, top_p=0.9, temperature=0.7, generation_kwargs=kwargs).sampling()
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (6, 0.7, 0.9, 5)
    assert (sampling.eos_token_id, sampling.generation_kwargs) == ([3], {"num_beams": 2})


def test_constructor_errors(tmp_path):
    def make(funcs, **options):
        args = config(tmp_path, **options)
        return GRPOTrainer(tiny.vlm(), funcs, args, tiny.rows(2), processing_class=tiny.processor())

    with pytest.raises(ValueError, match=r"reward_weights must have one number per reward function, 1, got \[1.0, 2.0\]"):
        make(["cer"], reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="num_generations must be >= 2, to compare completions, got 1"):
        make(["cer"], num_generations=1)
    with pytest.raises(ValueError, match="train_dataset must hold at least the 4 prompts of one generation batch, got 2"):
        make(["cer"], gradient_accumulation_steps=4)
    model = tiny.vlm()
    model.config.model_type = "kosmos-2"
    with pytest.raises(NotImplementedError, match=r"model_type must be one of qwen2_vl, .* or a text model, got 'kosmos-2'"):
        GRPOTrainer(model, ["cer"], config(tmp_path), tiny.rows(2), processing_class=tiny.processor())


def test_kinds_of_media_are_checked_before_the_weights_are_loaded(tmp_path):
    case = tiny_families.case("glm4v")
    case.model.config.save_pretrained(tmp_path / "model")  # without weights
    rows = [{"prompt": case.image, "image": tiny.image(0)}, {"prompt": case.video, "videos": [[tiny.image(1)] * 4]}]
    message = "samples must have only images or only videos for glm4v, .* got images in train_dataset: sample 0 and videos in"
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(str(tmp_path / "model"), length_reward, config(tmp_path), rows, processing_class=case.processor)


ENABLED = "(each prompt and its images run once per group)"
REPORTS = {
    "both": ({}, f"enabled in training and sampling {ENABLED}"),
    "none": ({"share_prefix": False}, "disabled in training and sampling (share_prefix is False)"),
    "training": (
        {"generation_kwargs": {"typical_p": 0.9}},
        f"enabled in training {ENABLED}, disabled in sampling (generation_kwargs holds typical_p)",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_prefix_sharing_is_reported_once(tmp_path, capsys, caplog, name):
    options, expected = REPORTS[name]
    run_ours(tmp_path, tiny.rows(2), fixed=False, **options)
    lines = [*caplog.messages, *capsys.readouterr().out.splitlines()]
    assert [line for line in lines if "sharing" in line] == [f"Prefix sharing: {expected}"]


def test_works_from_a_path_with_dropout_and_resumes_lora(tmp_path):
    tiny.vlm().save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "disable_dropout": True, "optim": "adamw_torch"}

    def run(resume=None):
        peft_config = lora()
        peft_config.lora_dropout = 0.5
        args = config(tmp_path / "out", **options)
        trainer = GRPOTrainer(str(tmp_path / "model"), "cer", args, tiny.rows(4), peft_config=peft_config)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    resumed = run(os.path.join(tmp_path, "out", "checkpoint-1"))
    assert resumed.state.global_step == 2
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
