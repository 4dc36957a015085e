"""Changing the mode of a loaded model."""

import torch
from support import tiny

from vlmkernels.models.head import logit_arguments, output_head
from vlmkernels.models.loading import disable_dropout, dropout_rates, inference


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
