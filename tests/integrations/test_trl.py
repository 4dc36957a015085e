"""TRL's trainers have the same losses, metrics, gradients and parameters with and without ``patch_trl``."""

import copy
import functools
import importlib
import json
import sys
import types
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

trl = pytest.importorskip("trl")

import torch  # noqa: E402
from support import forks, tiny_families, trl_processes  # noqa: E402
from support.groups import SHARING, processed  # noqa: E402
from support.trl_runs import STEPS, FixedEngine, build, rows, tiny_model, train  # noqa: E402

from vlmkernels import linear_kl  # noqa: E402
from vlmkernels.integrations import trl as ours  # noqa: E402
from vlmkernels.integrations.trl import patch_trl  # noqa: E402
from vlmkernels.integrations.trl.features import FeatureCache  # noqa: E402
from vlmkernels.models import families  # noqa: E402
from vlmkernels.models.attention import use_tree_attention  # noqa: E402
from vlmkernels.models.hunyuan import number_images_per_sample  # noqa: E402
from vlmkernels.models.image_features import accepts_image_features, encode_images  # noqa: E402
from vlmkernels.models.loading import base_model, sampling_override  # noqa: E402
from vlmkernels.rollout import generate as rollout  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT, ONE, SEVERAL = [[]], [[(28, 28)], [(56, 28)]], [[(28, 28)], [(56, 28), (28, 28)]]
SAMPLING = {"top_k": 100, "top_p": 0.95, "repetition_penalty": 1.2, "generation_kwargs": {"min_new_tokens": 2}}
UNGROUPED = {"generation_kwargs": {"no_repeat_ngram_size": 2}}
SEQUENCE = {"importance_sampling_level": "sequence"}
VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_clip_max": 2.0}


@dataclass
class Case:
    """images: the image sizes of each row, see ``rows``. shares: whether completions share a prompt."""

    model: str
    images: list
    options: dict = field(default_factory=dict)
    trainer: str = "GRPO"
    shares: bool = True
    lora: bool = False


# fmt: off
CASES = {
    # every family and every loss
    "dapo": Case("qwen2_5_vl", SEVERAL, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "grpo": Case("qwen3_vl", ONE, {"loss_type": "grpo", "beta": 0.1, **SAMPLING}),
    "bnpo, LoRA": Case("llava", ONE, {"loss_type": "bnpo", "beta": 0.1}, lora=True),
    "dr_grpo": Case("smolvlm", ONE, {"loss_type": "dr_grpo", "delta": 1.5, "steps_per_generation": 2}),
    "cispo": Case("gemma3", [[(28, 28)]], {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 5.0}),
    "sapo": Case("internvl", ONE, {"loss_type": "sapo", "top_entropy_quantile": 0.6, "entropy_coef": 0.01, **UNGROUPED}),
    "vespo": Case("text", TEXT, {"loss_type": "vespo", "use_adaptive_entropy": True, "entropy_target": 5.56}),
    "luspo, LoRA": Case("text", TEXT, {"loss_type": "luspo", **SEQUENCE, "beta": 0.05}, lora=True),
    # other options
    "gspo, evaluated": Case("text", TEXT, {"loss_type": "grpo", **SEQUENCE, "eval_strategy": "steps", "eval_steps": 3}),
    "masks": Case("text", TEXT, {"mask_truncated_completions": True, "off_policy_mask_threshold": 0.001, "beta": 0.1}),
    "fp32 head": Case("text", TEXT, {"cast_lm_head_to_fp32": True, "temperature": 0.7, "pad_to_multiple_of": 8}),
    "experts": Case("moe", TEXT, {"router_aux_loss_coef": 0.1}),
    "hybrid": Case("qwen3_5", ONE, {"beta": 0.1, "gradient_checkpointing": True}),
    "hybrid, experts": Case("qwen3_5_moe", ONE, {"router_aux_loss_coef": 0.1, "gradient_accumulation_steps": 2}),
    "convolutions": Case("lfm2_vl", ONE, {"beta": 0.1}, shares="lfm2_vl" in SHARING),
    "bidirectional images": Case("gemma4", ONE, {"beta": 0.1}),
    "engine, tokens": Case("text", TEXT, {**VLLM, "vllm_importance_sampling_mode": "token_truncate"}),
    "engine, sequences": Case("text", TEXT, {**VLLM, "vllm_importance_sampling_mode": "sequence_mask"}),
    "rloo": Case("qwen2_5_vl", ONE, {"beta": 0.1, "gradient_accumulation_steps": 2, "min_p": 0.01}, trainer="RLOO"),
}
# fmt: on


def options_of(case: Case) -> dict:
    options = {"config": getattr(trl, f"{case.trainer}Config"), **case.options}
    if case.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return options


def assert_same(mine, theirs, steps=STEPS):
    assert len(mine.logs) == len(theirs.logs) > steps
    for own, other in zip(mine.logs, theirs.logs, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            rel = 5e-4 if name == "grad_norm" else 1e-4  # rounding grows with the steps, by the version of torch
            # The loss of RLOO is close to 0, and has the rounding error of log-probabilities of sequences, of about -30.
            assert own[name] == pytest.approx(value, rel=rel, abs=5e-6, nan_ok=True), (other["step"], name)
    for name, parameter in theirs.parameters.items():
        torch.testing.assert_close(mine.parameters[name], parameter, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_trl(tmp_path, monkeypatch, name):
    case = CASES[name]
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FixedEngine)
    arguments = (tmp_path, getattr(trl, f"{case.trainer}Trainer"), *tiny_model(case.model), rows(4, case.images))
    theirs = train(build(*arguments, **options_of(case)))
    with patch_trl():
        mine = train(build(*arguments, **options_of(case)))
    assert mine.trainer._scorer.shares_prefix == case.shares
    assert any(log.get("grad_norm", 0) > 0 for log in theirs.logs)
    assert_same(mine, theirs)


def test_aya_vision_is_scored_as_it_samples(tmp_path, monkeypatch):
    """TRL multiplies the logits by ``logit_scale``, the model does not. With a scale of 1 the runs are equal."""
    config = tiny_model("aya_vision")[0].config.text_config
    assert config.logit_scale != 1
    trainer, inputs = one_batch(tmp_path, "aya_vision", ONE)
    ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    width = inputs["completion_ids"].shape[1]
    media = {name: inputs.get(name) for name in ours.MEDIA}
    logits = trainer.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -width - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    kept = inputs["completion_mask"].bool()
    for scorer, is_same in ((trainer._scorer, True), (None, False)):
        trainer._scorer = scorer
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, **media)[0]
        assert torch.allclose(logps[kept], expected[kept], atol=1e-4) == is_same

    monkeypatch.setattr(config, "logit_scale", 1.0)
    arguments = (tmp_path, trl.GRPOTrainer, *tiny_model("aya_vision"), rows(4, ONE))
    theirs = train(build(*arguments, max_steps=3, beta=0.1))
    with patch_trl():
        mine = train(build(*arguments, max_steps=3, beta=0.1))
    assert_same(mine, theirs, steps=3)


def test_hunyuan_vl_numbers_images_per_sample(tmp_path):
    """transformers numbers the images of a batch. TRL with the same change of the model as the patch is equal to the patch."""

    def numbered(model, *args, **kwargs):
        trainer = trl.GRPOTrainer(number_images_per_sample(model), *args, **kwargs)
        number_images_per_sample(trainer.accelerator.unwrap_model(trainer.ref_model))
        return trainer

    arguments = (*tiny_model("hunyuan_vl"), rows(4, SEVERAL))
    theirs = train(build(tmp_path, numbered, *arguments, max_steps=3, beta=0.1))
    with patch_trl():
        mine = train(build(tmp_path, trl.GRPOTrainer, *arguments, max_steps=3, beta=0.1))
    assert_same(mine, theirs, steps=3)


def one_batch(tmp_path, name: str, images: list, trainer=None, **options):
    """Return a trainer with our methods and one of its micro-batches."""
    trainer = build(tmp_path, trainer or ours.GRPOTrainer, *tiny_model(name), rows(4, images), num_iterations=2, **options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def outcome(trainer, inputs: dict):
    """Return the loss, metrics and gradients of a micro-batch."""
    trainer._metrics["train"] = defaultdict(list)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), dict(trainer._metrics["train"]), gradients


@pytest.mark.parametrize("change", ["tool_mask", "advantages of tokens", "bf16", "bf16, fp32 head", "nothing counts"])
def test_loss_of_a_batch_equals_trl(tmp_path, change):
    """Batches that do not occur in the runs above. A trainer without ``_scorer`` runs TRL's own code."""
    options = {"bf16": "bf16" in change, "cast_lm_head_to_fp32": "fp32 head" in change, "top_entropy_quantile": 0.7}
    trainer, inputs = one_batch(tmp_path, "qwen2_5_vl", ONE, **options)
    mask = inputs["completion_mask"]
    if change == "tool_mask":
        inputs["tool_mask"] = (torch.arange(mask.shape[1]) % 3 != 1).long().expand_as(mask)
    elif change == "advantages of tokens":
        inputs["advantages"] = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    elif change == "nothing counts":
        inputs["completion_mask"] = torch.zeros_like(mask)
    loss, metrics, gradients = outcome(trainer, inputs)
    trainer._scorer = None
    expected, their_metrics, theirs = outcome(trainer, inputs)
    tolerance = 2e-2 if "bf16" in change else 1e-5
    assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert metrics.keys() == their_metrics.keys()
    for name, value in their_metrics.items():
        # In bf16 a ratio or an entropy close to a bound may cross it.
        rel, tol = (2e-2, 0.2 if name.startswith("clip") else 2e-2) if "bf16" in change else (1e-5, 1e-6)
        assert metrics[name] == pytest.approx(value, nan_ok=True, rel=rel, abs=tol), name
    assert gradients.keys() >= theirs.keys()
    size = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= (0.1 if "bf16" in change else 1e-5) * size + 1e-7, name


def watched(trainer) -> tuple[list[int], list[tuple[int, int]]]:
    """Return lists that will hold, per call, the patches of the vision tower and the input size of the language model."""
    patches, tokens = [], []
    inner = base_model(trainer.accelerator.unwrap_model(trainer.model)).model
    inner.visual.register_forward_pre_hook(lambda module, args, kwargs: patches.append(len(args[0])), with_kwargs=True)
    inner.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    return patches, tokens


def test_prompts_and_images_run_once(tmp_path):
    """Two prompts with four completions each, in the rollout and in the training step, whose rows TRL shuffles."""
    trainer = build(tmp_path, ours.GRPOTrainer, *tiny_model("qwen2_5_vl"), rows(2, ONE), num_iterations=1, max_steps=1)
    patches, tokens = watched(trainer)
    train(trainer)
    inputs = trainer._buffered_inputs[0]
    prompts = zip(inputs["prompt_ids"].tolist(), inputs["prompt_mask"], strict=True)
    lengths = {tuple(ids): int(mask.sum()) for ids, mask in prompts}
    assert len(lengths) == 2  # the two images differ in size
    first, *steps, last = tokens
    assert patches == [4 + 8] * 2
    assert first == (1, sum(lengths.values()))
    assert all(step[1] <= 8 for step in steps)
    assert last == (1, sum(lengths.values()) + int(inputs["completion_mask"].sum()))


def test_a_frozen_tower_runs_once_per_generation_batch(tmp_path):
    """The rollout, the old and the reference model and six training passes in another row order share its features."""
    case = Case("qwen2_5_vl", ONE, {"beta": 0.1, "steps_per_generation": 2}, lora=True)
    arguments = (tmp_path, trl.GRPOTrainer, *tiny_model(case.model), rows(4, case.images))
    if not accepts_image_features(arguments[2]):
        pytest.skip("this version of transformers does not accept features in place of pixels")
    theirs = train(build(*arguments, **options_of(case)))
    with patch_trl():
        trainer = build(*arguments, **options_of(case))
        patches, _ = watched(trainer)
        mine = train(trainer)
    assert patches == [2 * (4 + 8)]
    assert_same(mine, theirs)


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_regroup(tmp_path, trainer):
    """Two micro-batches of two prompts with four completions: each has the rows of one prompt, and the steps are equal."""
    arguments = (tmp_path, getattr(trl, f"{trainer}Trainer"), *tiny_model("qwen2_5_vl"), rows(4, ONE))
    options = {"config": getattr(trl, f"{trainer}Config"), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options |= {"beta": 0.1} | ({"loss_type": "grpo"} if trainer == "GRPO" else {})
    theirs = train(build(*arguments, **options))
    with patch_trl(regroup=True):
        mine = train(build(*arguments, **options))
    assert [len(batch["prompt_index"].unique()) for batch in mine.trainer._buffered_inputs] == [1] * 2
    grids = [len(batch["image_grid_thw"].unique(dim=0)) for batch in theirs.trainer._buffered_inputs]
    assert max(grids) == 2  # TRL's own micro-batch has both prompts, whose images differ in size
    for run in (mine, theirs):
        for log in run.logs:
            for name in [name for name in log if name.startswith(("clip_ratio", "entropy", "kl"))]:
                del log[name]  # means over other micro-batches
    assert_same(mine, theirs)


@pytest.mark.parametrize("options", [{}, UNGROUPED], ids=["decode_groups", "generate"])
def test_ids_without_a_token_are_not_sampled(tmp_path, options):
    """The vocabulary of the model is larger than that of the tokenizer, and the ids beyond are likely."""
    model, processor = tiny_model("text")
    model = copy.deepcopy(model)  # other tests use it too
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 16)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] = 4 * model.get_output_embeddings().weight[:16]
    arguments = (model, processor, rows(2, TEXT))
    for trainer, expected in ((trl.GRPOTrainer, True), (ours.GRPOTrainer, False)):
        built = build(tmp_path, trainer, *arguments, **options)
        batch = built._generate_and_score_completions(built.train_dataset.to_list() * 4)
        assert (batch["completion_ids"] >= size).any() == expected


def overriding(model, where):
    """Make ``model`` generate only token 7, in its class or on the instance. Returns the expected reason."""

    class Constant(type(model)):
        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.full((len(input_ids), 3), 7)], 1)

    if where == "subclass":
        model.__class__ = Constant
        return "Constant overrides generate"
    if where == "wrapped":
        model.generate = functools.wraps(model.generate)(functools.partial(Constant.generate, model))
    else:
        model.generate = types.MethodType(Constant.generate, model)
    return f"{type(model).__name__}.generate is set on the instance"


@pytest.mark.parametrize("lora", [False, True], ids=["model", "LoRA"])
@pytest.mark.parametrize("where", ["subclass", "instance", "wrapped", "nowhere"])
def test_generate_of_the_model_is_kept(tmp_path, monkeypatch, where, lora):
    """Also with a PEFT wrapper. PEFT itself, which overrides generate, and a second batch do not count as an override."""
    notices = []
    monkeypatch.setattr(ours.generation.logger, "warning_once", notices.append)
    options = options_of(CASES["luspo, LoRA"] if lora else CASES["gspo, evaluated"])
    built = build(tmp_path, ours.GRPOTrainer, *tiny_model("text"), rows(2, TEXT), **options)
    base = base_model(built.model)
    expected = [f"Prefix sharing: disabled in sampling ({overriding(base, where)})"] if where != "nowhere" else []
    samples = [row for row in built.train_dataset.to_list() for _ in range(4)]
    for _ in range(2):
        batch = built._generate_and_score_completions(samples)
        assert (batch["completion_ids"] == 7).all() == (where != "nowhere")
        assert notices == expected
        notices.clear()
    assert built._scorer.shares_prefix  # the log-probabilities still share prompts


def test_overrides_of_the_wrapper_and_of_sampling_methods():
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny_families.case("text").model)
    assert sampling_override(model) is None
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert sampling_override(wrapped) is None
    wrapped.generate = lambda **_: None
    assert sampling_override(wrapped) == "PeftModelForCausalLM.generate is set on the instance"
    del wrapped.generate
    model._sample = lambda *_, **__: None
    assert sampling_override(wrapped) == f"{type(model).__name__}._sample is set on the instance"
    del model._sample
    assert sampling_override(wrapped) is None


def test_images_in_completions_disable_sharing(tmp_path):
    trainer, inputs = one_batch(tmp_path, "qwen2_5_vl", ONE)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    model_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model_inputs |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    convert = functools.partial(trainer._scorer.micro_batch, trainer.model, model_inputs)
    width = inputs["completion_ids"].shape[1]
    assert "tree_layout" in convert(width, [1] * 8).batch.inputs
    ids[3, -2] = trainer.model.config.image_token_id
    assert "tree_layout" not in convert(width, [1] * 8).batch.inputs


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_features_of_several_calls(name):
    """Later calls add samples with and without images, and reuse the features of earlier ones."""
    model, batch = use_tree_attention(copy.deepcopy(tiny_families.case(name).model)), processed(name)
    expected = encode_images(model, batch)
    cache = FeatureCache(model)
    first = batch.num_images.argmax().unsqueeze(0)
    for samples in (first, torch.arange(len(batch)), first):
        actual = cache.encode(batch.select(samples))
        torch.testing.assert_close(actual.inputs, expected.select(samples).inputs, rtol=1e-5, atol=1e-5)


def members() -> dict:
    return {cls: dict(vars(cls)) for cls in (trl.GRPOTrainer, trl.RLOOTrainer)}


def fail():
    raise ZeroDivisionError


def test_undo_at_the_end_of_the_block(tmp_path):
    before = members()
    arguments = (tmp_path, trl.GRPOTrainer, *tiny_model("text"), rows(4, TEXT))
    theirs = train(build(*arguments))
    with patch_trl():
        assert members() != before
        late = build(*arguments)
    assert members() == before
    assert_same(train(late), theirs)  # which runs TRL's own methods again
    with pytest.raises(ZeroDivisionError), patch_trl():
        fail()
    assert members() == before


def test_second_patch_and_trainers_built_before_it(tmp_path, monkeypatch):
    before, notices = members(), []
    monkeypatch.setattr(ours.logger, "warning_once", notices.append)
    arguments = (tmp_path, trl.GRPOTrainer, *tiny_model("text"), rows(4, TEXT))
    theirs = train(build(*arguments))
    early = build(*arguments)
    patch = patch_trl()
    try:
        with pytest.raises(RuntimeError, match="patch_trl must be undone before it is called again, got a second call"):
            patch_trl()
        assert_same(train(early), theirs)
        assert early._scorer is None  # so it runs TRL's own code, although TRL is patched
        assert set(notices) == {"A trainer built before patch_trl() runs TRL's own code"}
        mine = train(build(tmp_path, ours.GRPOTrainer, *arguments[2:]))
    finally:
        patch.undo()
    assert_same(mine, theirs)
    patch.undo()
    assert members() == before


def test_warnings_and_errors(tmp_path, monkeypatch):
    notices = []
    for module in (ours, ours.generation):
        monkeypatch.setattr(module.logger, "warning_once", notices.append)
    monkeypatch.setattr(rollout.logger, "warning", notices.append)

    def made(name, images, trainer=ours.GRPOTrainer, **options):
        return build(tmp_path, trainer, *tiny_model(name), rows(4, images), **options)

    def with_prefix(*args, **kwargs):
        return ours.GRPOTrainer(*args, share_prefix=True, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(families, "DECODERS", ())
        made("gemma3", [[(28, 28)]])
        reason = "Gemma3ForConditionalGeneration: its decoder must be one of"
        assert notices.pop().startswith(f"Prefix sharing: disabled in training and sampling ({reason}")
        with pytest.raises(ValueError, match=r"share_prefix must be 'auto' or False: Gemma3For.* its decoder must be one of"):
            made("gemma3", [[(28, 28)]], with_prefix)
    with pytest.raises(ValueError, match="share_prefix must be 'auto' or False: use_transformers_continuous_batching sets"):
        made("text", TEXT, with_prefix, use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match="importance_sampling_level must be one of the token level with loss_type = 'vespo'"):
        made("text", TEXT, loss_type="vespo", **SEQUENCE)
    with pytest.raises(ValueError, match=r"torch_compile must be False: .*, got True"):
        made("text", TEXT, torch_compile=True)
    for options, message in (
        ({"loss_type": "bnpo"}, "regroup must be False with loss_type='bnpo', a mean over a micro-batch, got True"),
        ({"use_adaptive_entropy": True}, "regroup must be False with use_adaptive_entropy, a mean"),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "regroup must be False where gradient_accumulation_steps and .* do not divide one another, got 2 and 3",
        ),
    ):
        with patch_trl(regroup=True), pytest.raises(ValueError, match=message):
            made("text", TEXT, trl.GRPOTrainer, **options)
    for options, message in (
        ({"share_prefix": "yes"}, "share_prefix must be 'auto', True or False, got 'yes'"),
        ({"share_prefix": 1}, "share_prefix must be 'auto', True or False, got 1"),
        ({"fast_images": None}, "fast_images must be a bool, got None"),
        ({"regroup": "auto"}, "regroup must be a bool, got 'auto'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            patch_trl(**options)
    assert "patch_trl" not in ours.Patch.active
    assert not notices

    with pytest.raises(TypeError, match=r"GRPOTrainer.__init__\(\) got an unexpected keyword argument 'fast_image'"):
        ours.GRPOTrainer(*tiny_model("text"), fast_image=True)
    trainer = made("text", TEXT)
    name = "_get_per_token_logps_and_entropies"
    with pytest.raises(TypeError, match=rf"GRPOTrainer.{name}\(\) got an unexpected keyword argument 'labels'"):
        getattr(trainer, name)(trainer.model, None, None, 1, labels=None)


ENABLED = "(each prompt and its images run once per group)"
REPORTS = {
    "both": ({}, f"enabled in training and sampling {ENABLED}"),
    "none": ({"share_prefix": False}, "disabled in training and sampling (share_prefix is False)"),
    "training": (
        UNGROUPED,
        f"enabled in training {ENABLED}, disabled in sampling (the generation configuration sets no_repeat_ngram_size)",
    ),
    "engine": (VLLM, f"enabled in training {ENABLED}"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_prefix_sharing_is_reported_once(tmp_path, monkeypatch, capsys, name):
    options, expected = REPORTS[name]
    notices, shared = [], {key: value for key, value in options.items() if key == "share_prefix"}
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FixedEngine)
    monkeypatch.setattr(rollout.logger, "warning", notices.append)
    monkeypatch.setattr(ours.generation.logger, "warning_once", notices.append)
    with patch_trl(**shared):
        other = {key: value for key, value in options.items() if key not in shared}
        train(build(tmp_path, trl.GRPOTrainer, *tiny_model("text"), rows(2, TEXT), max_steps=2, num_iterations=1, **other))
    lines = [line for line in capsys.readouterr().out.splitlines() if "sharing" in line]
    assert [*notices, *lines] == [f"Prefix sharing: {expected}"]


def test_other_attention_is_replaced(tmp_path):
    """A model that was loaded with another implementation shares prefixes too, as in this package's own trainer."""

    def eager(model, *args, **kwargs):
        model.set_attn_implementation("eager")
        return ours.GRPOTrainer(model, *args, **kwargs)

    trainer = build(tmp_path, eager, *tiny_model("text"), rows(2, TEXT), beta=0.1)
    assert trainer._scorer.shares_prefix
    for model in (trainer.model, trainer.ref_model):
        assert trainer.accelerator.unwrap_model(model).config._attn_implementation == "vlmkernels"


def test_errors_for_an_unsupported_trl(monkeypatch):
    def without_images(self, model, input_ids, attention_mask, logits_to_keep, compute_entropy, compute_aux_loss):
        """Stand in for a release of TRL with other arguments."""

    before, name = members(), "_get_per_token_logps_and_entropies"
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    monkeypatch.setitem(ours._ORIGINAL[trl.RLOOTrainer], name, without_images)
    message = f"vlmkernels.integrations.trl needs trl 1.16.*, got 1.99.0: RLOOTrainer.{name} does not accept pixel_values"
    with pytest.raises(NotImplementedError, match=message):
        patch_trl()
    monkeypatch.setitem(ours._ORIGINAL[trl.RLOOTrainer], name, None)
    with pytest.raises(NotImplementedError, match=f"got 1.99.0: RLOOTrainer.{name} is missing"):
        patch_trl()
    assert members() == before

    # A TRL without a function that the integration imports.
    monkeypatch.delattr("trl.trainer.utils.split_tensor_dict")
    for name in [name for name in sys.modules if name.startswith("vlmkernels.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"vlmkernels.integrations.trl needs trl 1.16.\*, got 1.99.0: .* 'split_tensor_dict'"):
        importlib.import_module("vlmkernels.integrations.trl")


def test_a_model_of_no_family(tmp_path, monkeypatch):
    """It is scored without logits too, and a warning says why its completions do not share a prompt."""
    known = tuple(family for family in families.FAMILIES if family.name != "llava")
    monkeypatch.setattr(families, "FAMILIES", known)
    notices = []
    monkeypatch.setattr(rollout.logger, "warning", notices.append)
    trainer, inputs = one_batch(tmp_path, "llava", ONE, beta=0.1)
    (notice,) = notices
    assert "LlavaForConditionalGeneration: model_type must be one of" in notice
    loss, metrics, _ = outcome(trainer, inputs)
    trainer._scorer = None
    expected, theirs, _ = outcome(trainer, inputs)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert {name: value for name, (value,) in metrics.items()} == pytest.approx(
        {name: value for name, (value,) in theirs.items()}, abs=1e-6
    )


def test_a_subclass_keeps_its_overrides(tmp_path):
    class Doubled(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, entropy, aux = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 2 * logps, entropy, aux

    arguments = (tmp_path, Doubled, *tiny_model("text"), rows(4, TEXT))
    theirs = train(build(*arguments, max_steps=STEPS))
    with patch_trl():
        mine = train(build(*arguments, max_steps=STEPS))
    assert mine.trainer._scorer.shares_prefix
    assert_same(mine, theirs)


def test_two_processes(server, tmp_path):
    """Metrics are means over the tokens or sequences of both."""
    forks.run(server, trl_processes.run, tmp_path, world=2)
    runs = json.loads((tmp_path / "logs.json").read_text())
    for theirs, mine in runs:
        assert len(mine) == len(theirs) > 2
        for own, other in zip(mine, theirs, strict=True):
            assert own == pytest.approx(other, rel=2e-5, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_linear_kl_is_the_divergence_of_the_distillation_trainer(beta):
    chunked = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    rng = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(*shape, generator=rng) for shape in ((5, width), (30, width), (30,))] for width in (4, 6))
    names = ("hidden", "weight", "bias")
    operands = dict(zip(names, student, strict=True)) | {f"teacher_{k}": x for k, x in zip(names, teacher, strict=True)}
    expected = chunked.apply(*student, *teacher, beta, 0.8)[0]
    torch.testing.assert_close(linear_kl(**operands, beta=beta, temperature=0.8), expected, rtol=1e-4, atol=1e-5)
