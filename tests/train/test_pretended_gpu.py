"""Sampling and training on a pretended GPU: nothing mixes devices, and the host waits only where it must."""

import copy
import re
from collections import Counter

import pytest
import torch
from support import tiny, tiny_families
from support.groups import PAD, amplified, processed, prompts_of
from support.pretend_gpu import DEVICE, OnGPU, on_gpu, pretended_gpu
from support.tool_models import tool_model
from support.training import config, length_reward, vowel_reward

from vlmkernels.models import tree_cache
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.tree_cache import TreeCache
from vlmkernels.ops.tree_attention import TreeLayout
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.decode import make_decoder
from vlmkernels.train import GRPOTrainer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def test_the_pretended_gpu():
    with pretended_gpu() as mode:
        x = on_gpu(torch.arange(3.0))
        assert x.is_cuda
        assert (x[1:] + 1).device == DEVICE
        y = torch.zeros(3, device=DEVICE)
        y[1:] += x[1:]
        assert not mode.waits
        assert y.tolist() == [0, 1, 2]
        assert mode.waits.total() == 1
        with pytest.raises(RuntimeError, match="on the same device"):
            x + torch.arange(3.0)
        with pytest.raises(RuntimeError, match="indices should be on the CPU"):
            torch.arange(3.0)[on_gpu(torch.tensor([1]))]
        for waits in (lambda: x[x > 1], lambda: x[torch.tensor([1])], lambda: torch.ones(1).to(DEVICE), lambda: x.sum().item()):
            mode.clear()
            waits()
            assert mode.waits.total() == 1
        mode.clear()
        assert torch.ones(1).to(DEVICE, non_blocking=True).device == DEVICE
        assert not mode.waits


def own(waits):
    """The waits of this package, by the file and function or kind. The backend of vision attention is one for the CPU."""
    found = Counter()
    for (what, place), count in waits.items():
        if place.startswith("vlmkernels/") and "sdpa_varlen" not in place:
            found[re.search(r"(\w+)\.py", place)[1], what] += count
    return dict(found)


@torch.no_grad()
def test_a_decoding_step_waits_for_its_tokens_only():
    """Once after several steps, of which the captured ones wait for nothing. The tokens are those of the CPU."""
    model = use_tree_attention(amplified(tiny.vlm()))
    prompts = prompts_of((1, 0, 2), model)
    group = [k // 3 for k in range(9)]
    uniform = torch.rand(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def decoder(prompts):
        return make_decoder(model, prompts, group, Sampling(20, (), PAD, repetition_penalty=1.2), uniform=uniform)

    expected = decoder(prompts)
    expected.run()
    with pretended_gpu() as mode:
        model.to(DEVICE)
        actual = decoder(prompts.to(DEVICE))
        assert actual.steps_per_check == 8
        actual._admit([actual.pending.popleft() for _ in range(9)])
        mode.clear()
        actual._run()
        assert own(mode.waits) == {("decoder", "to the host"): 3}  # of 19 steps
        assert actual.graphs.reason is None
        ids = actual.decoded(with_turns=False).ids
        assert isinstance(ids, OnGPU)
        assert torch.equal(ids.host, expected.decoded(with_turns=False).ids)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4", "qwen3_vl_moe"])
@torch.no_grad()
def test_a_decoding_step_of_other_layers_waits_for_its_tokens_only(name):
    """Recurrent layers, sliding windows and experts."""
    model, prompts = copy.deepcopy(tiny_families.case(name).model), processed(name)
    use_tree_attention(model)
    group = [*range(len(prompts))]
    with pretended_gpu() as mode:
        model.to(DEVICE)
        uniform = torch.rand(len(group), 14, dtype=torch.float64)
        decoder = make_decoder(model, prompts.to(DEVICE), group, Sampling(14, (), PAD, top_k=5), uniform=uniform)
        decoder._admit([decoder.pending.popleft() for _ in group])
        mode.clear()
        decoder._run()
        assert {place.partition(":")[0]: count for (_, place), count in mode.waits.items()} == {
            "vlmkernels/rollout/decoder.py": 2
        }


RUNS = {
    "packs": ({}, {("packs", "to the host"): 1, ("packs", "nonzero"): 1, ("passes", "indexing with a mask"): 1}),
    "masked images": (
        {"perception_loss_weight": 0.3},
        {
            ("packs", "to the host"): 1,
            ("branches", "to the host"): 1,
            ("head", "indexing with a mask"): 1,
        },
    ),
    "tools": (
        {"max_num_seqs": 3, "max_completion_length": 150},
        {
            ("packs", "to the host"): 1,
            ("packs", "nonzero"): 1,
            ("passes", "indexing with a mask"): 1,
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_waits_of_a_micro_batch(tmp_path, monkeypatch, name):
    """A whole step runs without mixing devices. In the second micro-batch, no wait is left that is easy to avoid."""
    options, expected = RUNS[name]
    found = []
    compute_loss = GRPOTrainer.compute_loss

    def counted(self, *args, **kwargs):
        before = mode.waits.copy()
        loss = compute_loss(self, *args, **kwargs)
        found.append(own(mode.waits - before))
        return loss

    monkeypatch.setattr(GRPOTrainer, "compute_loss", counted)
    if name == "tools":
        made = tool_model("qwen2_5_vl")
        model, rows, processor, tools = copy.deepcopy(made.model), made.rows, made.processor, [made.tool]
    else:
        model, rows, processor, tools = tiny.vlm(), tiny.rows(4), tiny.processor(), None
    with pretended_gpu() as mode:
        torch.manual_seed(0)
        args = config(tmp_path, **options)
        trainer = GRPOTrainer(model, [length_reward, vowel_reward], args, rows, processing_class=processor, tools=tools)
        trainer.train()
        assert all(isinstance(parameter, OnGPU) for parameter in trainer.model.parameters())
    assert len(found) == 2
    assert found[1] == expected


def test_extensions_repeat_key_heads_on_a_gpu(monkeypatch):
    """With a mask, scaled_dot_product_attention on CUDA would store all scores in fp32 for grouped heads."""
    calls = []
    attention = tree_cache.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        calls.append((query.shape[1], key.shape[1], options["enable_gqa"]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(tree_cache, "scaled_dot_product_attention", recorded)
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 7, 8, generator=rng) for heads in (4, 2, 2)]

    def extended(tensors, device):
        cache = TreeCache(2, device)
        cache.begin([0], [7])
        cache.fill(0, *tensors[1:])
        cache.extend([1], [0], [0], [7])
        return cache.attend_extension(0, *tensors, None, TreeLayout((7,), (-1,)))

    expected = extended(tensors, "cpu")
    with pretended_gpu():
        actual = extended(on_gpu(tensors), DEVICE).host
    torch.testing.assert_close(actual, expected)
    assert calls == [(4, 2, True), (4, 4, False)]
