"""How much predictions depend on images: measured exactly, in training without changing the run."""

import pytest
import torch
from support import tiny
from support.groups import amplified, completions_of, prompts_of
from support.training import config, length_reward, lora

from vlmkernels.models.masked_images import GREY, mask_images, uniform_pixels
from vlmkernels.train import GRPOTrainer
from vlmkernels.train.image_use import image_use


def test_equals_the_divergence_of_the_logits():
    model, prompts = amplified(tiny.vlm()), prompts_of([1, 0, 2], amplified(tiny.vlm()))
    group, (ids, mask) = torch.tensor([0, 0, 1, 2]), completions_of([3, 2, 4, 1])
    found = image_use(model, tiny.processor(), prompts, group, ids, mask, temperature=0.7)
    grey, expected = mask_images(prompts, uniform_pixels(tiny.processor(), GREY)), []
    for k in (0, 1, 3):
        length, logps = int(mask[k].sum()), []
        for inputs in (prompts, grey):
            row = inputs.select(group[k : k + 1]).trim().append(ids[k : k + 1, :length], mask[k : k + 1, :length].long())
            with torch.no_grad():
                logps.append((model(**row.inputs).logits[0, -length - 1 : -1] / 0.7).log_softmax(-1))
        expected.append((logps[0].exp() * (logps[0] - logps[1])).sum(-1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-5)
    assert found.mean() > 0.01


def test_a_model_that_ignores_its_image_has_none():
    model, prompts = amplified(tiny.vlm()), prompts_of([1, 2], tiny.vlm())
    ids, mask = completions_of([3, 2])
    arguments = model, tiny.processor(), prompts_of([1, 1], tiny.vlm()), torch.arange(2), ids, mask
    assert image_use(*arguments, exchange=True).mean() > 0.01
    model.base_model.visual.merger.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert image_use(model, tiny.processor(), prompts, torch.arange(2), ids, mask).max() < 1e-5
    assert image_use(*arguments, exchange=True).max() < 1e-5


CASES = {
    "copies": {"share_prefix": False},
    "features": {"peft_config": True, "max_tokens_per_microbatch": 90},
}


@pytest.mark.parametrize("case", CASES)
def test_a_measured_run_is_the_same_run(tmp_path, case):
    options, found = dict(CASES[case]), {}
    peft_config = lora() if options.pop("peft_config", False) else None
    for steps in (None, 2):
        torch.manual_seed(0)
        args = config(tmp_path, max_steps=3, image_use_steps=steps, **options)
        trainer = GRPOTrainer(
            tiny.vlm(), [length_reward], args, tiny.rows(8, "mixed"), processing_class=tiny.processor(),
            peft_config=peft_config,
        )  # fmt: skip
        trainer.train()
        found[steps] = trainer.state.log_history, {n: p.detach() for n, p in trainer.model.named_parameters()}
    logs, parameters = found[2]
    assert [entry["step"] for entry in logs if entry.get("image_use/kl", 0) > 0] == [1, 3]  # steps are logged after them
    for name, parameter in found[None][1].items():
        assert torch.equal(parameters[name], parameter), name
