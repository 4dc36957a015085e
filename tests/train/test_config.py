"""Names of arguments, presets, and the limit of prompts."""

from dataclasses import fields

import pytest
from peft import LoraConfig
from support import tiny
from support.training import FixedGenerate, config, length_reward, run_ours

from vlmkernels.ops.grpo_loss.config import PRESETS, GRPOLossConfig
from vlmkernels.train import GRPOConfig, GRPOTrainer
from vlmkernels.train.config import TRL_FIELDS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_generation", r"got num_generation \(did you mean num_generations\?\)"),
        ("learning-rate", r"got learning-rate \(did you mean learning_rate\?\)"),
        ("sync_ref_model", "got sync_ref_model: the reference is fixed"),
        ("vllm_server_host", "got vllm_server_host: use vllm_server_base_url"),
        ("zzz", "got zzz$"),
    ],
)
def test_unknown_names_are_errors_with_a_hint(name, hint):
    with pytest.raises(TypeError, match=f"GRPOConfig must get names of its fields, {hint}"):
        GRPOConfig(**{name: 1})


def test_every_field_of_trl_exists_or_is_explained():
    trl = pytest.importorskip("trl")
    own = {field.name for field in fields(GRPOConfig)}
    assert {field.name for field in fields(trl.GRPOConfig)} <= own | TRL_FIELDS.keys()
    assert not own & TRL_FIELDS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_loss(tmp_path, name):
    args = config(tmp_path, preset=name)
    expected, found = GRPOLossConfig.preset(name, max_completion_length=args.max_completion_length), args.loss_config()
    for field in PRESETS[name]:
        assert getattr(found, field) == getattr(expected, field)


def test_fields_override_their_preset(tmp_path):
    args = config(tmp_path, preset="gspo", epsilon_high=0.1)
    assert (args.epsilon, args.epsilon_high, args.importance_sampling_level) == (3e-4, 0.1, "sequence")
    with pytest.raises(ValueError, match=r"preset must be one of grpo, .*, got 'gsppo' \(did you mean gspo\?\)"):
        config(tmp_path, preset="gsppo")


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({}, "transformers"),
        ({"vllm_mode": "server"}, "transformers"),
        ({"use_vllm": True}, "vllm_colocate"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_server"),
        ({"rollout_engine": "vllm_server"}, "vllm_server"),
        ({"rollout_engine": "vllm_colocate", "use_vllm": True}, "vllm_colocate"),
        ({"rollout_engine": "transformers", "use_vllm": False, "vllm_mode": "server"}, "transformers"),
    ],
)
def test_names_of_the_engine(tmp_path, options, engine):
    """``use_vllm`` and ``vllm_mode`` are synonyms; all three fields then say the same, so that a copy is equal."""
    args = config(tmp_path, **options)
    again = config(tmp_path, **{name: getattr(args, name) for name in ("rollout_engine", "use_vllm", "vllm_mode")})
    for found in (args, again):
        assert found.rollout_engine == engine
        assert found.use_vllm == (engine != "transformers")
        assert (found.vllm_config() is None) == (engine == "transformers")
        if found.use_vllm:
            assert f"vllm_{found.vllm_mode}" == engine


def test_long_prompts_are_named_or_skipped(tmp_path):
    """The length counts the tokens of images; prompts are never cut."""
    data = tiny.rows(4, "one")
    data[1]["prompt"] = [{"role": "user", "content": "a " * 60}]
    with pytest.raises(ValueError, match=r"1.*: the prompt must have at most max_prompt_length = 40 tokens, got \d+"):
        run_ours(tmp_path, data, max_prompt_length=40)
    trainer, _, _ = run_ours(tmp_path, data, max_prompt_length=40, on_bad_sample="skip")
    assert trainer._experience.rollout.prompts.inputs["attention_mask"].sum(1).max() <= 40
    assert trainer.samples.bad.keys() == {1}


def test_long_prompts_of_evaluation_are_named_or_skipped(tmp_path):
    data, long = tiny.rows(4, "none"), tiny.rows(4, "none")
    long[1]["image"] = tiny.image(1, 56, 56)  # its tokens count

    def evaluated(rows, **options):
        args = config(tmp_path, max_prompt_length=30, **options)
        trainer = GRPOTrainer(tiny.vlm(), length_reward, args, data, rows, processing_class=tiny.processor())
        trainer.engine = FixedGenerate(trainer)
        trainer.evaluate()
        return trainer

    with pytest.raises(ValueError, match=r"eval_dataset: sample 1: the prompt must have at most .* 30 tokens, got \d+"):
        evaluated(long)
    dataloader = evaluated(long, on_bad_sample="skip").callback_handler.eval_dataloader
    assert dataloader.dataset.bad.keys() == {1}
    with pytest.raises(ValueError, match="eval_dataset must have a sample that can be read"):
        evaluated(long[1:2], on_bad_sample="skip")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_prompt_length", 0, "must be >= 1, got 0"),
        ("max_prompt_length", "40", "must be an integer, got '40'"),
        ("max_num_seqs", 1.5, "must be an integer, got 1.5"),
        ("num_iterations", True, "must be an integer, got True"),
        ("max_completion_length", None, "must be an integer, got None"),
        ("num_generations", 0, "must be >= 1, got 0"),
        ("num_generations_eval", 0, "must be >= 1, got 0"),
        ("distillation_top_k", 1.5, "must be an integer, got 1.5"),
        ("distillation_top_k", 0, "must be >= 1, got 0"),
        ("distillation_beta", 1.5, r"must be in \[0, 1\], got 1.5"),
        ("distillation_beta", 1e-9, r"must be 0, 1 or in"),
        ("distillation_coef", 0.0, "must be a finite number > 0, got 0.0"),
        ("distillation_coef", float("inf"), "must be a finite number > 0, got inf"),
        ("mask_ratio", "0.6", "must be a number, got '0.6'"),
        ("temperature", None, "must be a number, got None"),
        ("dynamic_sampling", "false", "must be true or false, got 'false'"),
        ("gradient_accumulation_steps", 0, "must be >= 1, got 0"),
        ("per_device_train_batch_size", "4", "must be an integer, got '4'"),
        ("generation_batch_size", -8, "must be >= 1, got -8"),
        ("steps_per_generation", -2, "must be >= 1, got -2"),
        ("scale_rewards", ["group"], r"must be one of group, batch, none, got \['group'\]"),
        ("rollout_correction", 3, "must be None or one of .*, got 3"),
    ],
)
def test_numbers_are_in_range(tmp_path, name, value, rule):
    with pytest.raises((TypeError, ValueError), match=f"{name} {rule}"):
        config(tmp_path, **{name: value})


def test_freeze_vision_leaves_only_the_decoder(tmp_path):
    rows = tiny.rows(4)
    for adapters in (None, LoraConfig(r=2, target_modules="all-linear")):
        args = config(tmp_path, freeze_vision=True)
        trainer = GRPOTrainer(tiny.vlm(), "exact_match", args, rows, processing_class=tiny.processor(), peft_config=adapters)
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        assert trained
        assert not any("visual" in name for name in trained)
        assert trainer.prepared.reuses_image_features
    with pytest.raises(ValueError, match="freeze_vision must be False for a text model"):
        GRPOTrainer(tiny.text_model(), "exact_match", args, tiny.rows(4, "none"), processing_class=tiny.tokenizer())
