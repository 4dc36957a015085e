"""Activations in host memory: the gradients are the same, and weights are not copied. On the CPU, nothing is moved."""

import pytest
import torch
from support import tiny
from torch.autograd.graph import saved_tensors_hooks

from vlmkernels.models import offload
from vlmkernels.models.offload import HostActivations, undo_activation_offloading, use_activation_offloading

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture
def moved(monkeypatch):
    """Let every tensor count as one on a device; the list has the shapes of those that were copied."""
    copied, to_host = [], offload._to_host
    monkeypatch.setattr(offload, "is_moved", lambda tensor: True)
    monkeypatch.setattr(offload, "_to_host", lambda tensor: copied.append(tensor.shape) or to_host(tensor))
    return copied


def gradients(model, dtype=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(input_ids=IDS, use_cache=False).logits.float().square().mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_equal_and_weights_are_not_copied(moved, checkpointing, dtype):
    model = tiny.text_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = gradients(model, dtype)
    assert not moved
    use_activation_offloading(model)
    assert use_activation_offloading(model) is model
    found = gradients(model, dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    assert moved
    assert not weights & {tuple(shape) for shape in moved}
    assert 2 <= len(moved) < 10 if checkpointing else len(moved) > 20  # the inputs of two layers, and the last norm
    count = len(moved)
    undo_activation_offloading(model)
    assert not model.base_model._forward_hooks
    gradients(model)
    assert len(moved) == count
    with torch.no_grad():
        use_activation_offloading(model)(input_ids=IDS)
    assert len(moved) == count


def test_a_tensor_is_copied_once_per_version(moved):
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with HostActivations(model):
        y = x * 2
        first = y.sin() + y.cos()  # both save y
        assert len(moved) == 1
        with torch.no_grad():
            y += 1  # another version
        second = y.square()
        assert len(moved) == 2
    before = 2 * x.detach()
    expected = 2 * (before.cos() - before.sin() + 2 * (before + 1))  # each operation gets the values that it saved
    torch.testing.assert_close(torch.autograd.grad((first + second).sum(), x)[0], expected)


def test_nothing_is_moved_on_the_cpu():
    """An outer hook sees what is stored: the tensors themselves."""
    model, saved = tiny.text_model().train(), []
    expected = gradients(model)
    use_activation_offloading(model)
    with saved_tensors_hooks(lambda x: saved.append(type(x)) or x, lambda x: x):
        found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not offload.is_moved(torch.zeros(2**20))
    assert not offload.is_moved(torch.zeros(8, device="meta"))
    assert offload.is_moved(torch.zeros(2**20, device="meta"))


def test_the_hook_ends_with_an_error_of_the_model(moved):
    model = use_activation_offloading(tiny.text_model())
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=IDS + 1000)
    x = torch.randn(4, requires_grad=True)
    x.sin().sum().backward()
    assert not moved or x.shape not in moved
