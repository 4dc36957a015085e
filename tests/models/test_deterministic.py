"""Deterministic mode: log-probabilities have the same bits for any batch, in a tiny model of every family that it supports."""

import copy

import pytest
import torch
import transformers
from support import tiny, tiny_families
from support.groups import SHARING, processed
from support.training import Gradients, config, length_reward, train

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.deterministic import Deterministic, deterministic_unsupported, undo_deterministic, use_deterministic
from vlmkernels.models.families import recurrent_layers
from vlmkernels.models.head import call_in_head, completion_logps, logit_arguments, output_head
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.decode import decode_groups
from vlmkernels.rollout.generate import Generate
from vlmkernels.train import GRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2
torch.set_num_threads(1)

LENGTHS = (6, 1, 5, 3, 2)


def copied(name, dtype=torch.float32):
    return copy.deepcopy(tiny_families.case(name).model).to(dtype).eval()


# One family for each kind of decoder and vision tower.
FAMILIES = [
    *("text", "qwen2_5_vl", "qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "hunyuan_vl", "llava", "idefics3", "gemma3"),
    *("paligemma", "gemma4_unified", "kimi_k25", "molmo2"),
]


def rollout_of(name):
    """Random completions, two or three of each of some prompts with and without images."""
    prompts = processed(name)
    group = torch.tensor([0, 0, 1, 2, 2])
    prompts = prompts.select(torch.tensor([0, 1, len(prompts) - 1]))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny_families.token_id("a"), tiny_families.token_id("z"), mask.shape, generator=generator)
    return Rollout(prompts, group, ids, mask, torch.zeros(len(group), dtype=torch.bool))


def logps_of(model, rollout, layout, parts):
    head, result = output_head(model), torch.zeros(rollout.completion_ids.shape)
    arguments = logit_arguments(model, head)
    for samples in torch.arange(len(rollout.group)).tensor_split(parts):
        batch = rollout.packed(samples, model) if layout == "packed" else rollout.padded(samples)
        with torch.no_grad():
            logps = completion_logps(model, batch, head=head, arguments=arguments, temperature=0.9)
        mask = rollout.completion_mask[samples]
        result[samples] = torch.zeros(mask.shape).masked_scatter_(mask, logps)
    return result


LAYOUTS = [("packed", 1), ("packed", 3), ("padded", 1), ("padded", 3)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SHARING])
def test_logps_do_not_depend_on_the_batch(name):
    """Packs and padded rows, all completions at once, some, and each by itself."""
    model, rollout = copied(name), rollout_of(name)
    use_deterministic(model)
    results = {layout: logps_of(model, rollout, *layout) for layout in LAYOUTS}
    expected = results.pop(("packed", 1))
    for layout, logps in results.items():
        assert torch.equal(logps, expected), layout
    undo_deterministic(model)
    torch.testing.assert_close(logps_of(model, rollout, "packed", 1), expected, rtol=1e-4, atol=2e-5)
    others = [logps_of(model, rollout, *layout) for layout in LAYOUTS]
    assert not all(torch.equal(others[0], other) for other in others)  # without the mode


@pytest.mark.parametrize("threads", [1, 2])
def test_bf16_and_threads(threads):
    model, rollout = copied("text", torch.bfloat16), rollout_of("text")
    use_deterministic(model)
    torch.set_num_threads(threads)
    try:
        results = [logps_of(model, rollout, *layout) for layout in LAYOUTS]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["text", "qwen3_vl_moe"])
def test_decoding_in_any_number_of_slots(name, dtype):
    model, prompts = copied(name, dtype), processed(name, 0, 1)
    processor = tiny_families.case(name).processor
    engines = {n: Generate(model, processor, Sampling(5), max_num_seqs=n, deterministic=True) for n in (None, 1, 3)}
    uniform = torch.rand(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rollouts = [engine(model, prompts, 2, 1.0, uniform=uniform) for engine in engines.values()]
    for other in rollouts[1:]:
        for field in ("completion_ids", "logps", "log_kept_mass"):
            assert torch.equal(getattr(other, field), getattr(rollouts[0], field))
    one = engines[1](model, prompts.select(torch.tensor([1])), 1, 1.0, uniform=uniform[2:3])
    count = int(one.completion_mask.sum())
    assert torch.equal(one.completion_ids[0], rollouts[0].completion_ids[2, :count])
    assert torch.equal(one.logps[0], rollouts[0].logps[2, :count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["text", "gemma3", "qwen3_vl_moe"])
def test_hidden_states_of_rollout_and_training_are_equal(name, dtype):
    """The inputs of the head in decoding steps have the bits of those in a pack."""
    model, prompts, decoded_states, states = use_deterministic(copied(name, dtype)), processed(name, 0, 1), [], []
    sampling = Sampling(5, (), 0, temperature=0, suppress_tokens=range(200))
    head = output_head(model)
    hook = head.register_forward_pre_hook(lambda module, args: decoded_states.append(args[0].flatten(0, -2)))
    decoded = decode_groups(model, prompts, 1, sampling)
    hook.remove()
    rollout = Rollout(prompts, torch.tensor([0, 1]), decoded.ids, decoded.mask, decoded.truncated)

    def note(hidden, weight, targets, rows, bias):
        states.append(hidden.flatten(0, -2)[rows])
        return hidden.sum().reshape(1)

    with torch.no_grad():
        call_in_head(model, rollout.packed(torch.arange(2), model), head, note)
    decoded_states = [x for x in decoded_states if len(x) == 2]  # without the token that probes the head
    assert torch.equal(torch.stack(decoded_states, 1).flatten(0, 1), states[0])


def test_gradients_and_checkpointing():
    """Gradients are those of the plain model up to rounding, also if layers run again in the backward pass."""
    model, rollout, results = copied("qwen3_vl_moe"), rollout_of("qwen3_vl_moe"), []
    use_tree_attention(model)
    head, samples = output_head(model), torch.arange(len(LENGTHS))
    batches = [rollout.packed(samples, model), rollout.padded(samples)]
    for prepare, checkpointing in ((undo_deterministic, False), (use_deterministic, False), (use_deterministic, True)):
        prepare(model).train(checkpointing)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for batch in batches:
            model.zero_grad()
            logps = completion_logps(model, batch, head=head, arguments={}, temperature=1.0)
            logps.sum().backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append(found | {"": logps.detach()})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert all(torch.equal(other[""], results[2][""]) for other in results[3:])


def test_trainer(tmp_path):
    """Micro-batches of another size give the same log-probabilities, and the engine is deterministic too."""
    logs = []
    for number, size in enumerate((4, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "num_iterations": 2}
        args = config(tmp_path / str(number), deterministic=True, beta=0.1, max_steps=2, **options)
        trainer = GRPOTrainer(tiny.vlm(), [length_reward], args, tiny.rows(8), processing_class=tiny.processor())
        logs.append((train(trainer, Gradients()), trainer._experience))
    (one, first), (other, second) = logs
    assert torch.equal(first.rollout.logps, second.rollout.logps)
    assert torch.equal(first.ref_logps, second.ref_logps)
    assert one[0]["sampling/sampling_logp_difference/max"] == other[0]["sampling/sampling_logp_difference/max"] < 1e-5


def test_refused(tmp_path):
    for name in SHARING:
        if reason := deterministic_unsupported(tiny_families.case(name).model):
            model = tiny_families.case(name).model
            text = model.config.get_text_config()
            assert recurrent_layers(text) or model.config.vision_config.model_type == "pixtral", reason
    model = copied("qwen3_next")
    with pytest.raises(NotImplementedError, match="deterministic mode: Qwen3NextForCausalLM has recurrent layers"):
        use_deterministic(model)
    model = copied("text")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(NotImplementedError, match="Qwen2ForCausalLM is quantized, and its products do not have fixed sizes"):
        use_deterministic(model)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(NotImplementedError, match="its decoder must be one of"):
        use_deterministic(model)
    with pytest.raises(
        ValueError, match=r"deterministic must be False with model\.generate \(share_prefix is False\), got True"
    ):
        Generate(copied("text"), tiny_families.tokenizer(), Sampling(4), share_prefix=False, deterministic=True)
    with pytest.raises(
        ValueError, match="deterministic must be False with use_vllm, whose log-probabilities depend on batches"
    ):
        config(tmp_path, use_vllm=True, deterministic=True)
    with (
        Deterministic(),
        pytest.raises(NotImplementedError, match=r"without aten\.baddbmm\.default, which has no implementation"),
    ):
        torch.baddbmm(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 2))
