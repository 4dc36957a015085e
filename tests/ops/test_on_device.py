"""Models, decoding and the trainer on the device of the kernels: a GPU if there is one.

The models here have head dimensions of 32, which every attention kernel supports; those of tiny.py have 8.
"""

import copy

import pytest
import torch
import transformers
from peft import get_peft_model
from support import tiny
from support.engines import FunctionEngine
from support.groups import EOS, LENGTH, PAD, amplified, completions_of, prompts_of
from support.training import Gradients, config, length_reward, lora, train, vowel_reward
from support.trajectories import ScriptedEpisodes, sample_of
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from vlmkernels.models import offload
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.deterministic import use_deterministic
from vlmkernels.models.head import completion_logps
from vlmkernels.models.image_features import accepts_image_features, encode_images
from vlmkernels.models.loading import load_model
from vlmkernels.models.packs import pack_groups
from vlmkernels.models.positions import prompt_positions
from vlmkernels.models.quantized import prepare_quantized, quantized_arguments
from vlmkernels.models.router_replay import use_router_replay
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.decode import decode_groups, decode_trajectories, make_decoder
from vlmkernels.train import GRPOTrainer

pytestmark = pytest.mark.device


def text_model():
    torch.manual_seed(0)
    small = copy.deepcopy(tiny.text_model().config)
    small.update({"hidden_size": 128, "intermediate_size": 64})
    return tiny._finish(Qwen2ForCausalLM(small))


def vlm():
    torch.manual_seed(0)
    small = copy.deepcopy(tiny.vlm().config)
    small.text_config.update({"hidden_size": 128})
    small.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    small.vision_config.update({"hidden_size": 64, "out_hidden_size": 128})
    return tiny._finish(Qwen2_5_VLForConditionalGeneration(small))


MODELS = {"qwen2": (text_model, (0, 0)), "qwen2.5-vl": (vlm, (1, 0, 2))}


@pytest.fixture(params=MODELS)
def model_and_prompts(request, device):
    build, images = MODELS[request.param]
    model = amplified(build())
    return model.to(device), prompts_of(images, model).to(device)


def test_greedy_decoding_equals_generate(model_and_prompts):
    model, prompts = model_and_prompts
    inputs = prompts.repeat(3).inputs
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    expected = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    use_tree_attention(model)
    decoded = decode_groups(model, prompts, 3, Sampling(LENGTH, EOS, PAD, temperature=0))
    width = decoded.ids.shape[1]
    assert decoded.ids.device == expected.device
    assert torch.equal(decoded.ids, torch.where(decoded.mask, expected[:, :width], PAD))


def test_sampled_logps_are_those_of_the_model(model_and_prompts):
    model, prompts = model_and_prompts
    use_tree_attention(model)
    torch.manual_seed(0)
    decoded = decode_groups(model, prompts, 4, Sampling(LENGTH, EOS, PAD, temperature=0.8, suppress_tokens=range(42, 60)))
    inputs = prompts.repeat(4).append(decoded.ids, decoded.mask.long()).inputs
    with torch.no_grad():
        logits = model(**inputs).logits[:, -decoded.ids.shape[1] - 1 : -1]
    expected = (logits / 0.8).log_softmax(-1).gather(-1, decoded.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(decoded.logps, torch.where(decoded.mask, expected, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_equal_eager_steps(model_and_prompts):
    """With slots that are used again. The number of steps between two readings of the tokens has no effect either."""
    model, prompts = model_and_prompts
    use_tree_attention(model)
    group = [k // 4 for k in range(4 * len(prompts))]
    sampling = Sampling(40, EOS, PAD, suppress_tokens=range(42, 60))
    uniform = torch.rand(len(group), 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for graphs in (True, False):
        decoder = make_decoder(model, prompts, group, sampling, max_num_seqs=5, uniform=uniform)
        if graphs:
            assert decoder.steps_per_check > 1
        else:
            decoder.graphs, decoder.steps_per_check = None, 1
        decoder.run()
        assert decoder.graphs is None or decoder.graphs.reason is None
        results.append(decoder.decoded(with_turns=False))
    actual, expected = results
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.mask, expected.mask)
    torch.testing.assert_close(actual.logps, expected.logps, rtol=1e-4, atol=1e-4)


def test_shared_prefixes_equal_copies(model_and_prompts):
    """Log-probabilities of completions and the gradients of all parameters."""
    model, prompts = model_and_prompts
    device = prompts.inputs["input_ids"].device
    group = torch.arange(len(prompts)).repeat_interleave(2)
    ids, mask = (x.to(device) for x in completions_of([3, 5] * len(prompts)))
    results = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            use_tree_attention(model)
            pack = pack_groups(prompts.inputs, prompt_positions(model, prompts.inputs), group, ids, mask, prompts.family)
            hidden = model.base_model(**pack.inputs, use_cache=False).last_hidden_state
            logps = linear_logps(hidden, model.lm_head.weight, pack.targets, rows=pack.rows)
        else:
            inputs = prompts.select(group).append(ids, mask).inputs
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, -mask.shape[1] - 1 : -1]
            logps = linear_logps(hidden, model.lm_head.weight, ids)[mask]
        (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
        results.append((logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, ours) = results
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    size = max(g.abs().max() for g in gradients.values())
    assert ours.keys() == gradients.keys()
    assert all((ours[n] - g).abs().max() <= 2e-3 * size for n, g in gradients.items())


def test_features_stand_for_pixels(device):
    model = use_tree_attention(amplified(vlm())).to(device)
    if not accepts_image_features(model):
        pytest.skip(f"transformers {transformers.__version__} does not accept features in place of pixels")
    prompts = prompts_of((1, 0, 2), model).to(device)
    encoded = encode_images(model, prompts)
    group = torch.arange(len(prompts)).repeat_interleave(2)
    ids, mask = (x.to(device) for x in completions_of([3, 5] * len(prompts)))
    positions = prompt_positions(model, prompts.inputs)
    results = []
    for batch in (prompts, encoded):
        pack = pack_groups(batch.inputs, positions, group, ids, mask, batch.family)
        with torch.no_grad():
            results.append(model.base_model(**pack.inputs, use_cache=False).last_hidden_state[0, pack.rows])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def rollout_of(decoded, prompts, group):
    fields = {"turns": decoded.turns, "routed_experts": decoded.routed_experts}
    return Rollout(prompts, torch.tensor(group), decoded.ids, decoded.mask, decoded.truncated, decoded.logps, **fields)


def scored(model, batch, **options):
    return completion_logps(model, batch, head=model.lm_head, arguments={}, temperature=1.0, **options)


@torch.no_grad()
def test_trajectories(device):
    """Log-probabilities of turns after results with images, from decoding, from packs and from copies."""
    model = use_tree_attention(amplified(vlm())).to(device)
    everything = prompts_of((1, 0, 2), model)
    prompts, group = everything.select(torch.tensor([0, 1])).to(device), [0, 0, 0, 1, 1]
    text, images = sample_of(everything, 1), sample_of(everything, 2)
    results = [[images, text], [text], [], [text, images], [images]]
    longest = images.inputs["input_ids"].shape[1]
    ends = range(3, 30, 2)  # so that turns are short
    sampling = Sampling(3 * longest, ends, PAD, suppress_tokens=range(42, 60))
    torch.manual_seed(0)
    decoded = decode_trajectories(model, prompts, ScriptedEpisodes(group, results), sampling, max_num_seqs=3)
    assert decoded.turns.num_turns > 1
    rollout = rollout_of(decoded, prompts, group)
    expected = decoded.logps[rollout.sampled_mask]
    samples = torch.arange(len(group))
    torch.testing.assert_close(scored(model, rollout.packed(samples, model)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scored(model, rollout.padded(samples)), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_router_replay(device):
    """Packs in which routers get the experts of decoding have its log-probabilities; other experts change them."""
    torch.manual_seed(0)
    sizes = tiny.text_model().config.to_dict() | {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32}
    names = ("vocab_size", "hidden_size", "head_dim", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
    ids = {name: sizes[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    chosen = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, **ids}
    model = amplified(tiny._finish(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{name: sizes[name] for name in names}, **chosen))))
    prompts = prompts_of((0, 0), model).to(device)
    use_router_replay(use_tree_attention(model.to(device)))
    torch.manual_seed(0)
    decoded = decode_groups(model, prompts, 3, Sampling(LENGTH, EOS, PAD), record_experts=True)
    assert (decoded.routed_experts.completions >= 0).any()
    rollout, samples = rollout_of(decoded, prompts, [0, 0, 0, 1, 1, 1]), torch.arange(6)
    batch, expected = rollout.packed(samples, model), decoded.logps[decoded.mask]
    torch.testing.assert_close(scored(model, batch), expected, rtol=1e-3, atol=1e-3)
    experts = batch.inputs["routed_experts"]
    batch.inputs["routed_experts"] = torch.where(experts < 0, experts, 3 - experts)
    assert (scored(model, batch) - expected).abs().max() > 0.01


@torch.no_grad()
def test_deterministic_mode(model_and_prompts):
    """The log-probabilities of a completion in a pack of all have the bits of those in a batch of its own."""
    model, prompts = model_and_prompts
    use_deterministic(model)
    device = prompts.inputs["input_ids"].device
    group = [k // 2 for k in range(2 * len(prompts))]
    ids, mask = (x.to(device) for x in completions_of([3, 5] * len(prompts)))
    rollout = Rollout(prompts, torch.tensor(group), ids, mask, mask[:, 0])
    together = scored(model, rollout.packed(torch.arange(len(group)), model))
    alone = torch.cat([scored(model, rollout.padded(torch.tensor([k]))) for k in range(len(group))])
    assert torch.equal(together, alone)


def test_quantized_model(tmp_path, device):
    """In 4 bits: log-probabilities from decoding and from a pack are equal, and adapters get gradients."""
    pytest.importorskip("bitsandbytes")
    amplified(text_model()).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), quantized_arguments({"quantization_config": {"load_in_4bit": True}}, torch.float32))
    use_tree_attention(loaded.to(device))
    prompts = prompts_of((0, 0), loaded).to(device)
    model = get_peft_model(loaded, lora()).eval()
    prepare_quantized(model)
    torch.manual_seed(0)
    decoded = decode_groups(model, prompts, 2, Sampling(LENGTH, EOS, PAD))
    batch = rollout_of(decoded, prompts, [0, 0, 1, 1]).packed(torch.arange(4), loaded)
    logps = completion_logps(model, batch, head=loaded.lm_head, arguments={}, temperature=1.0)
    torch.testing.assert_close(logps.detach(), decoded.logps[decoded.mask], rtol=1e-3, atol=1e-3)
    logps.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


TRAINING = {
    "qwen2": {},
    "qwen2.5-vl": {},
    "masked images": {"perception_loss_weight": 0.3, "der_loss_weight1": 0.02, "der_loss_weight2": 0.05},
    "image use": {"image_use_steps": 1, "beta": 0.0},
    "dynamic sampling": {"dynamic_sampling": True, "oversampling": 1.5, "beta": 0.0},
    "offloading": {"activation_offloading": True, "gradient_checkpointing": True},
    "adapters in bf16": {"bf16": True, "peft_config": True},
    "teacher": {"distillation_coef": 1.0, "distillation_beta": 0.5, "beta": 0.0},
    "splits": {"max_tokens_per_microbatch": 120, "top_entropy_quantile": 0.6},
}
COMPARED = ("loss", "kl", "entropy", "grad_norm", "image_use/kl", "perception/kl", "distillation/divergence")


@pytest.mark.parametrize("name", TRAINING)
def test_training_step_equals_that_of_the_cpu(tmp_path, device, monkeypatch, name):
    """Two steps with the completions of the first run on the CPU: loss, metrics and gradients are equal."""
    options = {"beta": 0.1, **TRAINING[name]}
    is_lora, half = options.pop("peft_config", False), options.get("bf16", False)
    if name == "offloading":
        monkeypatch.setattr(offload, "MIN_BYTES", 256)
    build, _ = MODELS.get(name, MODELS["qwen2.5-vl"])
    processor = tiny.tokenizer() if name == "qwen2" else tiny.processor()
    rows = tiny.rows(4, "none" if name == "qwen2" else "mixed")
    rollouts, runs = [], []
    for where in ("cpu", device):
        folder = tmp_path / f"{where}{len(runs)}"
        args = config(folder, use_cpu=where == "cpu", max_steps=2, learning_rate=1e-4, **options)
        extra = {"teacher": amplified(build())} if name == "teacher" else {}
        extra |= {"peft_config": lora()} if is_lora else {}
        torch.manual_seed(0)
        trainer = GRPOTrainer(build(), [length_reward, vowel_reward], args, rows, processing_class=processor, **extra)
        assert trainer.accelerator.device.type == where
        engine, kept = trainer.engine, iter(list(rollouts))

        def generated(model, prompts, *arguments, engine=engine, first=not runs, kept=kept):
            rollout = engine(model, prompts, *arguments)
            if first:
                rollouts.append(rollout)
                return rollout
            old, target = next(kept), prompts.inputs["input_ids"].device
            fields = ("completion_ids", "completion_mask", "truncated", "logps", "log_kept_mass")
            moved = {field: x if (x := getattr(old, field)) is None else x.to(target) for field in fields}
            return type(rollout)(prompts=rollout.prompts, group=old.group, **moved)

        trainer.engine = FunctionEngine(generated, engine.shares_prefix)
        gradients = Gradients()
        runs.append((train(trainer, gradients), gradients.steps))
    (expected_logs, expected), (logs, gradients) = runs
    for mine, other in zip(logs, expected_logs, strict=True):
        for key in COMPARED:
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=0.1 if half else 2e-2, abs=1e-3 if half else 1e-4), key
    for mine, other in zip(gradients, expected, strict=True):
        assert mine.keys() == other.keys()
        size = max(g.abs().max() for g in other.values())
        assert all((mine[n].cpu() - g).abs().max() <= (0.1 if half else 2e-2) * size for n, g in other.items())
