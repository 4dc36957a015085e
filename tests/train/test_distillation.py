"""On-policy distillation: gradients against plain forward passes of both models, and teachers that do not fit."""

import json
import math

import pytest
import torch
from support import tiny
from support.training import FixedGenerate, Gradients, config, fixed_completions, length_reward, lora, run_ours
from transformers import Qwen2_5_VLForConditionalGeneration

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


def expected(teacher, beta, temperature, coef, groups=2, size=4):
    """The mean divergence per token, and the gradients of the loss, over all tokens of a step."""
    policy, teacher = tiny.vlm(), Qwen2_5_VLForConditionalGeneration.from_pretrained(teacher)
    completions, total = fixed_completions(groups * size), 0.0
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
