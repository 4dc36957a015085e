"""The norms of models as ``rms_norm``, as they are on a GPU."""

import copy
import pickle

import pytest
import torch
from support import tiny_families
from support.budget import assert_within_budget

from vlmkernels.models import norms
from vlmkernels.models.attention import undo_tree_attention, use_tree_attention
from vlmkernels.models.norms import undo_fused_norms, use_fused_norms


def norm_of(name):
    """The first norm of a decoder, with a weight that is not constant."""
    decoder = copy.deepcopy(tiny_families.case(name).model.get_decoder())
    norm = decoder.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 1.5, len(norm.weight)))
    return decoder, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5"])
def test_forward_and_gradients(monkeypatch, name, dtype):
    monkeypatch.setattr(norms, "_is_fused", lambda norm, x: True)
    decoder, norm = norm_of(name)
    rng = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 5, len(norm.weight), generator=rng).to(dtype) for _ in range(2))

    def run(dtype):
        norm.to(dtype)
        inputs = x.to(dtype).requires_grad_()
        out = norm(inputs)
        dx, dw = torch.autograd.grad(out, (inputs, norm.weight), gradient.to(dtype))
        return {"out": out.detach(), "dx": dx, "dw": dw}

    def formula():
        norm.double()
        inputs, weight = x.double().requires_grad_(), norm.weight.detach().clone().requires_grad_()
        scaled = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + norms._epsilon(norm))
        out = scaled * (weight + (name != "qwen2_5_vl"))
        dx, dw = torch.autograd.grad(out, (inputs, weight), gradient.double())
        return {"out": out.detach(), "dx": dx, "dw": dw}

    norm.to(dtype)
    exact, eager = formula(), run(dtype)
    use_fused_norms(decoder)
    assert "forward" in vars(norm)
    actual = run(dtype)
    for key in exact:
        assert_within_budget(key, actual[key], eager[key], exact[key])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_dtype_with_autocast(monkeypatch, name):
    """``rms_norm`` returns fp32 with autocast on a GPU; the norm returns the dtype of its input, as without fusion."""
    monkeypatch.setattr(norms, "_is_fused", lambda norm, x: True)
    monkeypatch.setattr(norms, "rms_norm", lambda x, *args: torch.nn.functional.rms_norm(x, *args).float())
    decoder, norm = norm_of(name)
    norm.bfloat16()
    x = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = norm(x)
    actual = use_fused_norms(decoder).layers[0].input_layernorm(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


def test_copies_and_undo():
    model = copy.deepcopy(tiny_families.case("text").model)
    use_tree_attention(use_tree_attention(model))
    norm = model.model.norm
    assert vars(copy.deepcopy(norm))["forward"].__self__ is not norm
    x = torch.randn(2, len(norm.weight))
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), norm(x))
    undo_tree_attention(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_norms_stay_as_they_are():
    """Those with another epsilon, gate or center, and those whose forward has been replaced."""
    for name in ("aya_vision", "qwen3_next"):
        decoder = use_fused_norms(copy.deepcopy(tiny_families.case(name).model.get_decoder()))
        kinds = {type(module).__name__: "forward" in vars(module) for module in decoder.modules()}
        assert all(not fused for kind, fused in kinds.items() if kind in ("Cohere2LayerNorm", "Qwen3NextRMSNormGated"))
    decoder, norm = norm_of("text")
    norm.forward = lambda x: 2 * x
    assert use_fused_norms(decoder).layers[0].input_layernorm(1) == 2
    assert undo_fused_norms(decoder).layers[0].input_layernorm(1) == 2
