"""Changing the mode of a loaded model."""

from collections import Counter

import torch
from peft import get_peft_model
from support import tiny
from support.training import lora
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels.models.head import logit_arguments, output_head
from vlmkernels.models.loading import disable_dropout, dropout_rates, frozen_weights_cast_once, inference


def test_disable_dropout():
    """Dropout modules of every kind, and rates that are numbers in attention layers."""
    model = tiny.vlm()
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    model.model.visual.blocks[0].attn.dropout = 0.2
    model.noise = torch.nn.ModuleList([torch.nn.Dropout(0.3), torch.nn.Dropout2d(0.4), torch.nn.AlphaDropout(0.5)])
    rates = [rate for module in model.modules() for rate in dropout_rates(module).values()]
    assert sorted(rates) == [0.1, 0.2, 0.3, 0.4, 0.5]
    disable_dropout(model)
    assert not any(dropout_rates(module) for module in model.modules())
    assert model.model.language_model.layers[0].self_attn.attention_dropout == 0


def test_inference_restores_the_mode_of_each_module():
    """A frozen vision tower that the user set to evaluation mode stays in it."""
    model = tiny.vlm().train()
    model.model.visual.eval()
    modes = [module.training for module in model.modules()]
    with inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    logit_arguments(model, output_head(model))
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {False, True}


class Casts(TorchDispatchMode):
    """Counts the casts of each of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.names, self.counts = {x.data_ptr(): name for name, x in tensors.items()}, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (name := self.names.get(args[0].data_ptr())):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_frozen_weights_once():
    """As it does those that are trained. Which ones are trained is the same afterwards."""
    model = get_peft_model(tiny.text_model(), lora())
    layers = {name: module.weight for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ids = torch.arange(4).unsqueeze(0)
    with inference(model), frozen_weights_cast_once(model), torch.autocast("cpu", torch.bfloat16), Casts(layers) as casts:
        first, second = (model(input_ids=ids).logits for _ in range(2))
    assert casts.counts == dict.fromkeys(layers, 1)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    with inference(model), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids).logits
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
