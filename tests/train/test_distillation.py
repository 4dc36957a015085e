"""On-policy distillation: gradients against plain forward passes of both models, and teachers that do not fit."""

import json
import math

import pytest
import torch
from support import tiny
from support.fake_vllm import FakeVLLM
from support.training import FixedGenerate, Gradients, config, fixed_completions, length_reward, lora
from transformers import Qwen2_5_VLForConditionalGeneration

from vlmkernels.models.image_features import accepts_image_features
from vlmkernels.train import GRPOTrainer, distillation

torch.set_num_threads(1)
DATA = tiny.rows(4, "several")


def larger(rows: int = 53) -> Qwen2_5_VLForConditionalGeneration:
    """A teacher of another width, whose head has more rows than the policy's 50."""
    config = tiny.vlm().config
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.vocab_size, config.vision_config.out_hidden_size = 48, 6, rows, 48
    torch.manual_seed(7)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The folder of a teacher with its processor."""
    folder = tmp_path_factory.mktemp("teacher")
    larger().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return str(folder)


def run(folder, teacher, funcs=None, model=None, resume=None, **options):
    """Train with fixed completions. Returns the trainer, the logs of its steps and their gradients."""
    peft_config, processor = options.pop("peft_config", None), options.pop("processing_class", None) or tiny.processor()
    args = config(folder, **options)
    data = tiny.rows(4, "none") if processor is not None and not hasattr(processor, "image_processor") else DATA
    model = tiny.vlm() if model is None else model
    trainer = GRPOTrainer(model, funcs, args, data, None, processor, peft_config=peft_config, teacher=teacher)
    trainer.engine, gradients = FixedGenerate(trainer), Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry], gradients.steps


def logits(model, row, completion):
    """The logits that predict the tokens of a completion, by transformers alone."""
    processor, images = tiny.processor(), row["images"]
    text = tiny.CHAT_TEMPLATE
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": row["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    new = torch.tensor([completion])
    for name, value in {"input_ids": new, "attention_mask": new * 0 + 1, "mm_token_type_ids": new * 0}.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], value], 1)
    return model(**inputs).logits[0, -len(completion) - 1 : -1]


def expected(teacher, beta, temperature, coef, completions=None, policy=None, size=4):
    """The mean divergence per token, and the gradients of the loss, over all tokens of a step."""
    policy, teacher = policy or tiny.vlm(), Qwen2_5_VLForConditionalGeneration.from_pretrained(teacher)
    completions, total = completions or fixed_completions(2 * size), 0.0
    for index, completion in enumerate(completions):
        row = DATA[index // size]
        log_p = (logits(policy, row, completion) / temperature).log_softmax(-1)
        with torch.no_grad():
            log_q = (logits(teacher, row, completion)[:, :50] / temperature).log_softmax(-1)

        def kl(log_target, log_input):
            return torch.nn.functional.kl_div(log_input, log_target, log_target=True, reduction="sum")

        if beta in (0, 1):
            total = total + (kl(log_q, log_p) if beta == 0 else kl(log_p, log_q))
        else:
            log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
            total = total + beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    mean = total / sum(map(len, completions))
    (coef * mean).backward()
    return mean.item(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def assert_close(gradients, other, tolerance=2e-5):
    assert gradients.keys() == other.keys()
    size = max(g.abs().max() for g in other.values())
    errors = {name: float((gradients[name] - g).abs().max() / size) for name, g in other.items()}
    assert max(errors.values()) <= tolerance, max(errors.items(), key=lambda item: item[1])


CASES = {
    "packs": {},
    "copies": {"share_prefix": False, "distillation_beta": 0.0},
    "splits": {"max_tokens_per_microbatch": 60, "distillation_beta": 0.3, "temperature": 0.7, "distillation_coef": 0.5},
    "one micro-batch": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "loss_type": "grpo"},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_plain_forward_passes(tmp_path, teacher, case):
    options = CASES[case]
    trainer, (log,), (gradients,) = run(tmp_path, teacher, **options)
    assert trainer.prepared.shares_prefix == trainer.teacher.prepared.shares_prefix == ("share_prefix" not in options)
    beta, coef = options.get("distillation_beta", 1.0), options.get("distillation_coef", 1.0)
    mean, other = expected(teacher, beta, options.get("temperature", 1.0), coef)
    assert log["loss"] == pytest.approx(coef * mean, rel=1e-4)
    assert log["time/teacher"] > 0
    assert_close(gradients, other)


@pytest.mark.parametrize("case", ["lora", "copies for the teacher"])
def test_the_divergence_is_added_to_the_grpo_loss(tmp_path, teacher, case):
    """Gradients are the sum of those of GRPO and of pure distillation, which needs no rewards.

    With LoRA the vision tower is frozen, and the policy reads features, but the teacher pixels.
    """
    options = {"max_tokens_per_microbatch": 100}
    given = teacher
    if case == "copies for the teacher":
        given = larger(50)
        given.config.text_config.attention_dropout = 0.1  # dropout forbids shared prefixes, also in a frozen model
    runs = []
    for name, chosen, funcs in (("both", given, length_reward), ("grpo", None, length_reward), ("pure", given, None)):
        torch.manual_seed(0)
        peft_config = lora() if case == "lora" else None
        runs.append(run(tmp_path / name, chosen, funcs, peft_config=peft_config, **options))
    (trainer, (log,), (both,)), (_, (grpo_log,), (grpo,)), (_, (pure_log,), (pure,)) = runs
    has_features = case == "lora" and accepts_image_features(tiny.vlm())
    assert trainer.prepared.reuses_image_features == has_features
    prompts = trainer._experience.rollout.prompts.inputs
    assert {"pixel_values", "image_features"} & prompts.keys() == {"pixel_values", *["image_features"][:has_features]}
    assert trainer.teacher.prepared.shares_prefix == (case != "copies for the teacher")
    assert trainer.objective.models.micro_batches.shares_prefix == (case != "copies for the teacher")
    assert log["loss"] == pytest.approx(grpo_log["loss"] + pure_log["loss"], rel=1e-4)
    assert log["distillation/divergence"] == pytest.approx(pure_log["distillation/divergence"], rel=1e-4)
    assert_close(both, {name: gradient + pure[name] for name, gradient in grpo.items()})
    assert "distillation/divergence" not in grpo_log
    assert not {name for name in pure_log if name.startswith("reward")} | {"entropy", "policy_loss"} & pure_log.keys()


@pytest.mark.parametrize("freeze", [False, True])
def test_completions_of_a_vllm_server(tmp_path, teacher, freeze):
    """The teacher scores what vLLM sampled. With a frozen tower the policy reads features, and the teacher pixels."""
    fake, gradients = FakeVLLM(), Gradients()
    options = {"rollout_engine": "vllm_server", "vllm_server_base_url": fake.url, "use_cpu": True, "freeze_vision": freeze}
    try:
        model, args = tiny.vlm(tied=False), config(tmp_path, **options)
        trainer = GRPOTrainer(model, None, args, DATA, processing_class=tiny.processor(), teacher=teacher)
        trainer.add_callback(gradients)
        trainer.train()
    finally:
        fake.http.shutdown()
        fake.http.server_close()
    rollout = trainer._experience.rollout
    assert ("image_features" in rollout.prompts.inputs) == freeze
    mean, other = expected(teacher, 1.0, 1.0, 1.0, rollout.token_ids(), tiny.vlm(tied=False))
    assert trainer.state.log_history[0]["distillation/divergence"] == pytest.approx(mean, rel=1e-4)
    assert_close(gradients.steps[0], {name: g for name, g in other.items() if not (freeze and "visual" in name)})


def test_other_families(tmp_path):
    """A Qwen2-VL teaches a Qwen2.5-VL, and a vision-language model a text model, with and without copies of the prompts."""
    other = tiny.qwen2_vl(1)
    other.config.vision_end_token_id = tiny.vlm().config.vision_end_token_id
    cases = [(tiny.vlm, other, tiny.processor()), (tiny.text_model, tiny.vlm(1), tiny.tokenizer())]
    for number, (build, teacher, processor) in enumerate(cases):
        gradients = []
        for share in ("auto", False):
            folder = tmp_path / f"{number} {share}"
            gradients += run(folder, teacher, model=build(), processing_class=processor, share_prefix=share)[2]
        assert_close(*gradients)


def test_a_run_without_rewards(tmp_path, teacher):
    """The divergence falls with one completion per prompt; a run that resumes within a batch repeats the first."""
    options = {"num_generations": 1, "max_steps": 6, "optim": "adamw_torch", "learning_rate": 3e-3, "log_completions": True}
    options |= {"num_iterations": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 3}
    trainer, logs, _ = run(tmp_path, teacher, **options)
    found = [log["distillation/divergence"] for log in logs]
    assert found[-1] < 0.5 * found[0]
    assert trainer._experience.advantages is trainer._experience.old_logps is None
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["rewards"] == []
    assert about["teacher"]["path"] == teacher
    assert about["teacher"]["shares prefix"]
    assert "first 50 rows" in about["teacher"]["notes"][0]
    stored = json.loads((tmp_path / "completions" / "step-000001.json").read_text())
    evaluated = trainer.evaluate(DATA)
    assert evaluated["eval_completions/mean_length"] == 3.5
    assert not {name for name in evaluated if "reward" in name}
    assert {row["advantage"] for group in stored["groups"] for row in group["completions"]} == {None}
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "experience_0.pt").exists()
    own = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert (checkpoint / "model.safetensors").stat().st_size < 1.1 * own + 2**14
    again = run(tmp_path, teacher, resume=str(checkpoint), **options)[1]
    assert [log["distillation/divergence"] for log in again] == pytest.approx(found, rel=1e-5)
    with pytest.raises(ValueError, match="saved mid-batch: reward_funcs must be None, because its batch has no advantages"):
        run(tmp_path, None, length_reward, resume=str(checkpoint), **{**options, "num_generations": 4})


def test_arguments_that_do_not_fit_are_named(tmp_path):
    def make(teacher="path", model=None, funcs=None, **options):
        model = tiny.vlm() if model is None else model
        args = config(tmp_path, **options)
        return GRPOTrainer(model, funcs, args, DATA, processing_class=tiny.processor(), teacher=teacher)

    with pytest.raises(ValueError, match="reward_funcs must be given without a teacher or an environment"):
        make(None)
    with pytest.raises(ValueError, match=r"distillation_beta must be 1.0 without a teacher, got 0.5"):
        make(None, funcs=length_reward, distillation_beta=0.5)
    for teacher, name in {3: "int", torch.nn.Linear(1, 1): "Linear"}.items():
        with pytest.raises(TypeError, match=f"teacher must be a model of transformers or its path, got {name}"):
            make(teacher)
    for name, value in {"beta": 0.1, "entropy_coef": 0.1, "rollout_correction": "token_mask"}.items():
        with pytest.raises(ValueError, match=f"{name} must be .* without reward functions, because there is no GRPO loss"):
            make(**{name: value})
    with pytest.raises(ValueError, match="num_generations must be >= 2, to compare completions, got 1"):
        make(funcs=length_reward, num_generations=1)
    with pytest.raises(ValueError, match=r"reward_weights must have one number per reward function, 0, got \[1.0\]"):
        make(reward_weights=[1.0])
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="metric_for_best_model must be another metric than eval_reward"):
        make(**best)
    model = tiny.vlm()
    with pytest.raises(ValueError, match="teacher must not share parameters with model"):
        make(model, model)
    with pytest.raises(ValueError, match="teacher_model_init_kwargs must be None for a teacher that is given as a model"):
        make(tiny.vlm(), teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match=r"teacher cannot be loaded: model must be an existing folder .*/nowhere"):
        make("/nowhere")


def changed(**options):
    """A teacher with other settings in its configuration."""
    model = tiny.vlm(1)
    for name, value in options.items():
        owner = model.config if hasattr(model.config, name) else model.config.vision_config
        setattr(owner, name, value)
    return model


def test_teachers_that_do_not_fit_are_named(tmp_path):
    def make(teacher):
        return GRPOTrainer(tiny.vlm(), None, config(tmp_path), DATA, processing_class=tiny.processor(), teacher=teacher)

    with pytest.raises(ValueError, match=r"the 50 rows of the vocabulary of model, .*, got 53 rows and no tokenizer"):
        make(larger())
    with pytest.raises(ValueError, match="with image_token_id = 48 in its configuration, got 47"):
        make(changed(image_token_id=47))
    with pytest.raises(ValueError, match="with patch_size = 14 in its vision_config, got 16"):
        make(changed(patch_size=16))
    with pytest.raises(ValueError, match="image inputs of a qwen2_5_vl, like model, got a qwen2 without pixel_values"):
        make(tiny.text_model())
    processor = tiny.processor()
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "teacher")
    tiny.vlm(1).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"with image_mean = .*0.48.* in its image processor, got .0.5, 0.5, 0.5."):
        make(str(tmp_path / "teacher"))


def test_vocabularies():
    own, other = tiny.tokenizer(), tiny.tokenizer()
    other.add_tokens(["extra"])
    assert distillation.compare_vocabularies((50, 50), own, tiny.tokenizer()) == []
    assert "first 50 rows" in distillation.compare_vocabularies((64, 50), own, tiny.tokenizer())[0]
    with pytest.raises(ValueError, match="got 51 tokens and 64 rows: token 50 is 'extra', not None") as error:
        distillation.compare_vocabularies((50, 64), own, other)
    assert "50 tokens and 50 rows" in str(error.value)
    with pytest.raises(ValueError, match="a row for each of the 50 token ids of model, got 49 rows"):
        distillation.compare_vocabularies((50, 49), own, tiny.tokenizer())
    (note,) = distillation.compare_vocabularies((50, 50), own, None, "no files")
    assert note == "only the sizes of the vocabularies were compared, 50 rows, without a tokenizer (no files)"
