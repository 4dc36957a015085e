"""The decoder with fixed slots: steps between checks, graphs, slots, operations per layer, and errors."""

import copy
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from support import tiny, tiny_families
from support.groups import EOS, LENGTH, PAD, amplified, processed, prompts_of
from support.recorded_graphs import RecordedGraphs
from support.trajectories import ScriptedEpisodes, setting, vocabulary_ends
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from vlmkernels.models import norms
from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.head import logit_arguments
from vlmkernels.ops.linear_logps import linear_logps
from vlmkernels.ops.linear_sample_logps import linear_sample_logps
from vlmkernels.rollout import token_sampler
from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.decode import decode_groups, make_decoder
from vlmkernels.rollout.slots import Slots, bucket
from vlmkernels.rollout.step_graphs import CudaCapture, StepGraphs


@torch.no_grad()
def decode(model, prompts, generations, sampling, steps=1, graphs=None, episodes=None, **options):
    """The completions and the decoder that sampled them."""
    group = [prompt for prompt in range(len(prompts)) for _ in range(generations)]
    group = group if episodes is None else episodes.group.tolist()
    rng = torch.Generator().manual_seed(5)
    uniform = torch.rand(len(group), sampling.max_new_tokens, dtype=torch.float64, generator=rng)
    options["uniform"] = uniform if sampling.temperature else None
    decoder = make_decoder(model, prompts, group, sampling, **options)
    decoder.steps_per_check, decoder.graphs, decoder.episodes = steps, graphs, episodes
    decoder.run()
    return decoder.decoded(with_turns=False), decoder


def assert_equal(actual, expected):
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.mask, expected.mask)
    assert torch.equal(actual.truncated, expected.truncated)
    for name in ("logps", "log_kept_mass"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        assert not getattr(actual, name)[~actual.mask].any()


OPTIONS = [
    {},
    {"temperature": 0},
    {"min_new_tokens": 30},
    {"top_p": 0.8},
    {"repetition_penalty": 1.7, "min_new_tokens": 5, "top_k": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_do_not_depend_on_the_steps_between_checks(options):
    """With all completions at once and with slots that are used again; with graphs, which replay what they captured."""
    model = use_tree_attention(amplified(tiny.vlm()))
    prompts = prompts_of((1, 0, 2), model)
    sampling = Sampling(40, EOS, PAD, **options)
    expected, _ = decode(model, prompts, 4, sampling)
    assert len(set(expected.mask.sum(1).tolist())) > 2
    for steps, slots in ((3, None), (8, 5), (50, 5)):
        capture = RecordedGraphs()
        actual, decoder = decode(model, prompts, 4, sampling, steps, StepGraphs(capture), max_num_seqs=slots)
        assert_equal(actual, expected)
        assert decoder.graphs.reason is None
        assert 1 < capture.captures < capture.replays


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "kimi_k25"])
def test_graphs_of_other_layers(name):
    """Recurrent layers, sliding windows, experts, and values that are narrower than keys."""
    model, prompts = tiny_families.case(name).model, processed(name)
    previous = model.config.get_text_config()._attn_implementation
    try:
        use_tree_attention(model)
        sampling = Sampling(36, EOS, PAD, suppress_tokens=EOS)
        expected, _ = decode(model, prompts, 2, sampling, max_num_seqs=3)
        capture = RecordedGraphs()
        actual, decoder = decode(model, prompts, 2, sampling, 4, StepGraphs(capture), max_num_seqs=3)
        assert_equal(actual, expected)
        assert decoder.graphs.reason is None
        assert capture.replays > 20
    finally:
        undo_tree_attention(model)
        model.set_attn_implementation(previous)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5"])
def test_turns_do_not_depend_on_the_steps_between_checks(name):
    model, prompts, group, results = setting(name)
    model = use_tree_attention(amplified(model))
    longest = max(r.inputs["input_ids"].shape[1] for rs in results for r in rs)
    sampling = Sampling(3 * longest + 20, vocabulary_ends(model)[::3], PAD, repetition_penalty=1.2, min_new_tokens=2)
    expected, _ = decode(model, prompts, 0, sampling, episodes=ScriptedEpisodes(group, results))
    for slots in (None, 2):
        capture, episodes = RecordedGraphs(), ScriptedEpisodes(group, results, seed=slots)
        actual, _ = decode(model, prompts, 0, sampling, 5, StepGraphs(capture), episodes, max_num_seqs=slots)
        assert_equal(actual, expected)


@torch.no_grad()
def test_graphs_draw_for_the_completions_of_each_call():
    """TRL calls generate for every turn, of some of the completions, and each call draws random numbers for its own."""
    model = use_tree_attention(amplified(tiny.text_model()))
    prompts, results = prompts_of((0,), model), []
    for capture in (None, RecordedGraphs()):
        decoder = make_decoder(model, prompts, [0] * 4, Sampling(LENGTH, (), PAD, top_k=20))
        decoder.graphs = None if capture is None else StepGraphs(capture)
        torch.manual_seed(0)
        for completions in ([0, 1], [3, 2]):
            decoder.sampler.draw_for(completions)
            decoder.pending.clear()
            decoder.pending.extend(completions)
            decoder._run()
        results.append(decoder.decoded(with_turns=False))
    assert_equal(*results)
    assert capture.replays > 4


def test_a_step_that_waits_is_not_captured(caplog):
    """It runs eagerly, and one line says why."""
    model = use_tree_attention(amplified(tiny.text_model()))
    prompts = prompts_of((0, 0), model)
    expected, _ = decode(model, prompts, 3, Sampling(LENGTH, EOS, PAD))
    model.model.layers[1].register_forward_hook(lambda module, args, output: output[0].sum().item() and None)
    capture = RecordedGraphs()
    actual, decoder = decode(model, prompts, 3, Sampling(LENGTH, EOS, PAD), 2, StepGraphs(capture))
    assert_equal(actual, expected)
    assert capture.captures == 0
    assert "operation not permitted when stream is capturing" in decoder.graphs.reason


def test_used_memory_is_used_again():
    """Prompts and completions take the memory of those that have ended; buffers are replaced only to hold more tokens."""
    model = use_tree_attention(amplified(tiny.text_model()))
    prompts = prompts_of((0,) * 8, model).select(torch.arange(8) % 2)
    _, decoder = decode(model, prompts, 2, Sampling(40, (), PAD), max_num_seqs=4)
    assert decoder.cache._num_rows == 2
    assert decoder.cache.capacity == 40
    assert decoder.cache.version <= 4
    assert len(decoder.first_logits) <= 2


def test_slots():
    assert [bucket(n, 20) for n in range(1, 21)] == [1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, *[20] * 4]
    slots = Slots(8, 10, 4, torch.device("cpu"))
    assert [slots.put(k) for k in range(7)] == [*range(7)]
    assert len(slots.arranged()) == slots.width == 8
    for slot in (0, 2, 3):
        slots.free(slot)
    assert slots.compact() == ([4, 5, 6], [0, 2, 3])
    assert slots.completions[:4] == [4, 1, 5, 6]
    slots.free(1)
    assert slots.compact() == ([3], [1])
    assert slots.arranged() == [4, 6, 5]
    slots.free(0)
    assert slots.compact() == ([2], [0])
    assert slots.arranged() == [5, 6]


class Operations(TorchDispatchMode):
    """Counts the ops that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        inputs = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        views = isinstance(result, torch.Tensor) and result.data_ptr() in inputs and not func._schema.is_mutable
        if not views and "empty" not in func.overloadpacket.__name__:
            self.counts[func.overloadpacket.__name__] += 1
        return result


def operations(model, prompts, tokens):
    with Operations() as found:
        decode_groups(model, prompts, 4, Sampling(tokens, (), PAD))
    return found.counts


@torch.library.custom_op("vlmkernels_test::rms_norm", mutates_args=())
def one_kernel(x: torch.Tensor, shape: list[int], weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm``, which is one kernel on a GPU and several ops on the CPU."""
    return torch.nn.functional.rms_norm(x, shape, weight, eps)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 25), ("cuda", 16)])
def test_operations_per_layer(monkeypatch, device, limit):
    """Of a step, in fp32 on the CPU and in bf16 on a GPU."""
    if device == "cuda":
        monkeypatch.setattr(norms, "_is_fused", lambda norm, x: True)
        monkeypatch.setattr(norms, "rms_norm", one_kernel)
    counts = {}
    for layers in (2, 4):
        config = tiny.text_model().config.to_dict() | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        model = Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.float32 if device == "cpu" else torch.bfloat16)
        use_tree_attention(model.eval())
        prompts = prompts_of((0, 0), model)
        operations(model, prompts, 1)  # runs the model on a token to see how it changes its logits
        counts[layers] = (operations(model, prompts, 8) - operations(model, prompts, 4)).total() / 4
    per_layer = (counts[4] - counts[2]) / 2
    assert per_layer <= limit, counts
    assert counts[2] - 2 * per_layer <= 45, counts


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 9, "min_new_tokens": 3}], ids=str)
@pytest.mark.parametrize("name", ["text", "aya_vision"])
def test_16_bit_logps_are_those_of_linear_logps(monkeypatch, name, options):
    """Bit by bit: the head of the rollout is that of training. The head of aya_vision scales its logits."""
    model, prompts, calls = tiny_families.case(name).model, processed(name), []

    def recorded(hidden, **arguments):
        sampled = linear_sample_logps(hidden, **arguments)
        calls.append((hidden.clone(), sampled))
        return sampled

    monkeypatch.setattr(token_sampler, "linear_sample_logps", recorded)
    model = use_tree_attention(copy.deepcopy(model).bfloat16())
    decoded, decoder = decode(model, prompts, 2, Sampling(5, (), PAD, **options))
    hidden, ids, logps = (torch.cat(x) for x in zip(*((h, s.ids, s.logps) for h, s in calls), strict=True))
    arguments = logit_arguments(model, model.get_output_embeddings())
    temperature = options.get("temperature", 1) or 1
    expected = linear_logps(hidden, model.get_output_embeddings().weight, ids, temperature=temperature, **arguments)
    assert torch.equal(logps, expected)
    assert len(decoded.ids.unique()) > 3
    count = len(decoded.ids)
    assert torch.equal(decoded.logps, logps.view(-1, count).T)
    assert torch.equal(decoded.ids, ids.view(-1, count).T)
    assert len(next(iter(decoder.first_logits.values()))) == hidden.shape[1]


def poisoned(model, number):
    """The model, whose logits are NaN for the second sequence of its ``number``-th forward pass."""
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == number:
            output[..., 1, :] = torch.nan

    model.lm_head.register_forward_hook(poison)
    return model


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("number", "token"), [(1, 0), (4, 3)], ids=["first", "later"])
def test_nan_logits(temperature, number, token):
    model = poisoned(use_tree_attention(amplified(tiny.text_model())), number)
    prompts = prompts_of((0, 0), model)
    completion, prompt = (3, 1) if number == 1 else (1, 0)
    message = f"token {token} of completion {completion} of prompt {prompt} cannot be sampled: its logits are NaN or infinite"
    with pytest.raises(RolloutError, match=message):
        decode(model, prompts, 3, Sampling(LENGTH, (), PAD, temperature=temperature))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}], ids=str)
def test_no_token_is_left(options):
    model = use_tree_attention(tiny.text_model().eval())
    prompts, everything = prompts_of((0, 0), model), range(model.config.vocab_size)
    with pytest.raises(RolloutError, match="token 0 of completion 0 of prompt 0 cannot be sampled: no token is left"):
        decode(model, prompts, 3, Sampling(LENGTH, EOS, PAD, suppress_tokens=everything, **options))
    ends, others = [0, 1], range(2, model.config.vocab_size)
    with pytest.raises(RolloutError, match="no token is left"):
        decode(model, prompts, 3, Sampling(LENGTH, ends, PAD, suppress_tokens=others, min_new_tokens=2, **options))


@pytest.mark.gpu
def test_graphs_of_replaced_buffers():
    """On a GPU graphs are captured again after all earlier ones have been freed."""
    graphs = StepGraphs(CudaCapture(torch.device("cuda")))
    for version in range(3):
        buffer, expected = torch.full((4,), float(version), device="cuda"), version
        for _ in range(3):
            graphs(4, version, lambda x=buffer: x.add_(x.square()))
            expected += expected**2
        assert graphs.reason is None
        assert buffer.tolist() == [expected] * 4


def test_ids_that_the_model_lacks_ban_no_token():
    """Negative ones do not count from the end of the vocabulary."""
    model = tiny.text_model()
    vocab, prompts = model.config.vocab_size, prompts_of((0,), model)
    sampling = Sampling(4, (-1, 3, vocab), PAD, suppress_tokens=(-1, -2, 7, vocab + 1), min_new_tokens=2)
    sampler = token_sampler.TokenSampler(sampling, prompts, [0], vocab, torch.zeros(1, 4, dtype=torch.float64))
    assert [table.nonzero()[:, 0].tolist() for table in sampler.banned] == [[3, 7], [7]]


def test_greedy_sampling_ignores_uniform():
    model = use_tree_attention(amplified(tiny.text_model()))
    prompts, sampling = prompts_of((0, 0), model), Sampling(LENGTH, EOS, PAD, temperature=0)
    expected = decode_groups(model, prompts, 2, sampling)
    actual = decode_groups(model, prompts, 2, sampling, uniform=torch.full((4, LENGTH), 0.999, dtype=torch.float64))
    assert_equal(actual, expected)
    assert torch.equal(actual.log_kept_mass, actual.logps)


def test_a_graph_of_the_pool_is_alive_at_each_capture(monkeypatch):
    """The allocator refuses to capture into a pool that had graphs, if none of them is left.

    A capture keeps pinned memory, which holds activations in training.
    """
    alive, calls = [], []

    class Graph:
        def replay(self):
            pass

        def capture_begin(self, pool, capture_error_mode):
            assert not alive or any(previous() is not None for previous in alive)
            alive.append(weakref.ref(self))
            calls.append("begin")

        def capture_end(self):
            calls.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("free"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: calls.append("free pinned"), raising=False)
    graphs = StepGraphs(CudaCapture(torch.device("cuda")))
    for version in range(3):  # buffers are replaced
        for _ in range(3):
            graphs(4, version, lambda: None)
    assert graphs.reason is None
    assert calls == 3 * ["synchronize", "free", "begin", "end"]
    assert len(alive) == 3
    assert sum(graph() is not None for graph in alive) == 1


@pytest.mark.parametrize(
    ("uniform", "message"),
    [
        (torch.zeros(5, 4, dtype=torch.float64), r"uniform must be \(6, 4\), one number per token, got \(5, 4\)"),
        (torch.full((6, 4), 1.0, dtype=torch.float64), r"uniform must be in \[0, 1\), got 1.0 at \(0, 0\)"),
    ],
)
def test_bad_uniform(uniform, message):
    model = use_tree_attention(tiny.text_model())
    with pytest.raises(ValueError, match=message):
        decode_groups(model, prompts_of((0, 0), model), 3, Sampling(4, EOS, PAD), uniform=uniform)
