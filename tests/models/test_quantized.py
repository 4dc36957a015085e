"""QLoRA: models in 4 bits train, sample, save and resume like their dequantized copies, and faults are named."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from support import tiny
from support.training import FixedGenerate, Gradients, config, length_reward, train, vowel_reward
from transformers import BitsAndBytesConfig

from vlmkernels.data.samples import encode
from vlmkernels.models import quantized
from vlmkernels.models.head import call_in_head, output_head
from vlmkernels.models.loading import load_model
from vlmkernels.models.quantized import has_bitsandbytes, prepare_quantized, quantized_arguments
from vlmkernels.plan.workload import NF4, OPTIMIZERS
from vlmkernels.train import GRPOTrainer

IN_4_BITS = {"load_in_4bit": True}
APART = Path(sys.prefix) / "bitsandbytes"  # where make setup installs it


def test_in_a_process_with_bitsandbytes():
    """Run the other tests of this file where bitsandbytes can be imported."""
    if has_bitsandbytes():
        pytest.skip("the other tests run in this process")
    if not APART.exists():
        pytest.skip(f"bitsandbytes is not there: pip install --no-deps --target {APART} bitsandbytes")
    paths = [str(APART), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "6 passed, 1 skipped" in done.stdout


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="test_in_a_process_with_bitsandbytes runs this test")


@pytest.fixture(scope="module")
def folder(bnb, tmp_path_factory):
    """A tiny VLM with its processor, as a folder."""
    path = tmp_path_factory.mktemp("model")
    tiny.vlm().save_pretrained(path)
    tiny.processor().save_pretrained(path)
    return str(path)


def adapters() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def trainer_of(folder, output, quantization=IN_4_BITS, peft_config=None, **options) -> GRPOTrainer:
    args = config(output, model_init_kwargs={"quantization_config": quantization}, **options)
    rewards = [length_reward, vowel_reward]
    return GRPOTrainer(folder, rewards, args, tiny.rows(6), peft_config=peft_config or adapters())


def test_gradients_equal_those_of_the_dequantized_model(folder, tmp_path):
    """With a shared prefix, its own rollout and checkpointing, against the weights in fp32 run by transformers and peft."""
    trainer = trainer_of(folder, tmp_path, beta=0.1, loss_type="grpo", gradient_checkpointing=True)
    assert trainer.prepared.shares_prefix
    assert trainer.ref_model is None
    with torch.random.fork_rng():
        plain = load_model(folder, quantized_arguments({"quantization_config": IN_4_BITS}, torch.float32)).dequantize()
        torch.manual_seed(0)
        plain = get_peft_model(plain, adapters()).eval()
    own = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    plain.load_state_dict(own, strict=False)
    gradients = Gradients()
    logs = train(trainer, gradients)
    assert logs[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert logs[0]["frac_weights_changed"] > 0.5
    assert logs[0]["kl"] > 0.01

    experience = trainer._experience
    samples = [sample for _, sample in trainer.samples.__getitems__([0, 1])]
    prompts = encode(samples, tiny.processor(), trainer.prepared.family)  # with float pixels
    rollout = replace(experience.rollout, prompts=prompts)
    batch = rollout.padded(torch.arange(len(rollout.group)))

    def logps() -> torch.Tensor:
        def scored(hidden, weight, targets, rows, bias):
            return (hidden.flatten(0, -2)[rows] @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

        return call_in_head(plain, batch, output_head(plain), scored)[0]

    with plain.disable_adapter(), torch.no_grad():
        ref = logps()
    policy, mask = logps(), rollout.completion_mask
    torch.testing.assert_close(policy.detach(), experience.rollout.logps[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ref, experience.ref_logps[mask], atol=1e-4, rtol=1e-4)
    ratio, advantages = (policy - policy.detach()).exp(), experience.advantages[:, None].expand(mask.shape)[mask]
    kl = (ref - policy).exp() - (ref - policy) - 1
    each = -(ratio * advantages) + 0.1 * ratio * kl
    per_sample = torch.stack([part.mean() for part in each.split(mask.sum(1).tolist())])
    (2 * per_sample.mean() / 2).backward()
    found = gradients.steps[0]
    assert len(found) == 2 * sum("lora_A" in name for name in own)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=2e-3)


def test_checkpoints_hold_adapters_only_and_resume_exactly(folder, tmp_path):
    """Also with an optimizer whose moments have 8 bits, for adapters large enough that bitsandbytes quantizes them."""
    large = LoraConfig(r=140, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options = {"optim": "adamw_8bit", "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": large}
    whole = trainer_of(folder, tmp_path, **options)
    whole.train()
    assert {p.dtype for p in whole.model.parameters()} == {torch.uint8, torch.float32}
    moments = {(state["state1"].dtype, parameter.numel() >= 4096) for parameter, state in whole.optimizer.state.items()}
    assert moments == {(torch.uint8, True), (torch.float32, False)}
    checkpoint = tmp_path / "checkpoint-2"
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert (checkpoint / "adapter_config.json").exists()
    assert weights < 5 * sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    resumed = trainer_of(folder, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, found = (get_peft_model_state_dict(trainer.model) for trainer in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_eight_bits(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, {"load_in_8bit": True})
    trainer.engine = FixedGenerate(trainer)
    gradients = Gradients()
    train(trainer, gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.steps[0].values())
    assert len(gradients.steps[0]) > 40


def test_faults_are_named(folder, tmp_path, monkeypatch):
    model = load_model(folder, quantized_arguments({"quantization_config": IN_4_BITS}, torch.float32))
    with pytest.raises(ValueError, match="peft_config must be given for a quantized model"):
        prepare_quantized(model)
    with pytest.raises(NotImplementedError, match=r"deterministic mode: .* is quantized"):
        trainer_of(folder, tmp_path, deterministic=True)
    with pytest.raises(ValueError, match=r"language-model head, of which the loss .*llm_int8_skip_modules.*Linear4bit"):
        trainer_of(folder, tmp_path, {**IN_4_BITS, "llm_int8_skip_modules": ["visual"]})
    with pytest.raises(ValueError, match=r"rollout_engine must be 'transformers' with a quantized model.*, got 'vllm_server'"):
        trainer_of(folder, tmp_path, use_vllm=True, vllm_mode="server")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'vlmkernels\[qlora\]'"):
        config(tmp_path, model_init_kwargs={"quantization_config": IN_4_BITS})


def test_settings(bnb, tmp_path):
    """What a dict leaves out is that of QLoRA; a BitsAndBytesConfig stays as it is."""
    found = quantized_arguments({"quantization_config": IN_4_BITS, "dtype": "bfloat16"}, torch.bfloat16)
    assert found["dtype"] == "bfloat16"
    settings = found["quantization_config"]
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    given = {**IN_4_BITS, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float16", "quant_method": "bitsandbytes"}
    settings = quantized_arguments({"quantization_config": given}, torch.bfloat16)["quantization_config"]
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_compute_dtype) == ("fp4", torch.float16)
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    args = config(tmp_path, model_init_kwargs={"quantization_config": own})
    found = quantized_arguments(args.model_init_kwargs, torch.bfloat16)["quantization_config"]
    assert found.to_dict() == own.to_dict()
    assert '"bnb_4bit_compute_dtype": "float16"' in args.to_json_string()  # as loggers store it
    assert quantized_arguments(None, torch.float32) == {}
    with pytest.raises(ValueError, match=r"keys of BitsAndBytesConfig, got 'load_in_4bits'.*load_in_4bit"):
        quantized_arguments({"quantization_config": {"load_in_4bits": True}}, torch.float32)
    with pytest.raises(ValueError, match="must set load_in_4bit or load_in_8bit to true"):
        quantized_arguments({"quantization_config": {"load_in_4bit": False}}, torch.float32)


def test_bytes_match_those_of_the_planner(bnb):
    layer = bnb.nn.Linear4bit(1024, 512, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": torch.randn(512, 1024)})
    weight = layer.to("cpu").weight
    state = weight.quant_state
    assert weight.dtype == torch.uint8
    assert weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes == pytest.approx(NF4 * 512 * 1024, rel=0.001)
    parameter = torch.nn.Parameter(torch.randn(512, 1024))
    parameter.grad = torch.randn(512, 1024)
    optimizer = bnb.optim.AdamW8bit([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    held = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert held == pytest.approx(OPTIMIZERS["adamw_8bit"] * parameter.numel(), rel=0.001)
