"""``patch_trl`` with masked images: TRL's loss plus the terms of PAPO, in every layout, and named errors."""

from functools import partial

import pytest

trl = pytest.importorskip("trl")

import torch  # noqa: E402
from support.trl_runs import build, rows, tiny_model  # noqa: E402

from vlmkernels.integrations import trl as ours  # noqa: E402
from vlmkernels.integrations.trl import patch_trl  # noqa: E402
from vlmkernels.integrations.trl.masks import mask_seed  # noqa: E402
from vlmkernels.models.families import family_of  # noqa: E402
from vlmkernels.models.inputs import ModelInputs  # noqa: E402
from vlmkernels.models.loading import base_model  # noqa: E402
from vlmkernels.models.masked_images import BLACK, mask_images, uniform_pixels  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = {"perception_loss_weight": 0.3, "der_loss_weight1": 0.02, "der_loss_weight2": 0.05}
OPTIONS = {"loss_type": "grpo", "num_iterations": 1, "temperature": 0.9, "beta": 0.0}


def batch_of(folder, name, data, lora=False, **options):
    """A trainer, and the first micro-batch that it trains on."""
    from peft import LoraConfig

    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None
    torch.manual_seed(0)
    make = partial(ours.GRPOTrainer, **options)
    trainer = build(folder, make, *tiny_model(name), data, peft_config=adapters, **OPTIONS)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer, trainer._prepare_inputs(inputs)


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def plain_terms(trainer, inputs):
    """The terms of PAPO by one forward pass per row of the model of transformers, with the loss type "grpo"."""
    model, processor = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    tensors = {name.removeprefix("prompt_"): inputs[name] for name in ("prompt_ids", "prompt_mask")}
    prompt = {"input_ids": tensors["ids"], "attention_mask": tensors["mask"]}
    family = family_of(base_model(model).config)
    media = {name: x for name, x in inputs.items() if name in family.inputs and name not in prompt}
    media = {n: x[:, : prompt["input_ids"].shape[1]] if family.axis(n) == "token" else x for n, x in media.items()}
    rows_ = ModelInputs.from_processor({**prompt, **media}, family, torch.tensor(inputs["num_images"]))
    first, group = rows_.originals().unique(return_inverse=True)
    generator = torch.Generator().manual_seed(mask_seed(trainer))
    masked = mask_images(rows_.select(first), uniform_pixels(processor, BLACK), 0.6, generator=generator)

    def logps(batch, row, k):
        length = int(inputs["completion_mask"][k].sum())
        ids, mask = inputs["completion_ids"][k : k + 1, :length], inputs["completion_mask"][k : k + 1, :length]
        logits = model(**batch.select(torch.tensor([row])).trim().append(ids, mask).inputs).logits[0, -length - 1 : -1]
        return (logits / 0.9).log_softmax(-1).gather(1, ids[0, :, None])[:, 0]

    losses = []
    for k in range(len(group)):
        logp, logp_mask = logps(rows_, k, k), logps(masked, int(group[k]), k)
        kl = (logp_mask - logp).exp() - (logp_mask - logp) - 1
        losses.append((-0.3 * kl - 0.02 * logp - 0.05 * logp_mask).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("name", "lora", "options"),
    [("qwen2_5_vl", False, {}), ("qwen2_5_vl", True, {}), ("llava", False, {"share_prefix": False})],
    ids=["shared", "features", "copies"],
)
def test_the_loss_is_that_of_trl_plus_the_terms(tmp_path, name, lora, options):
    data = rows(4, [[(28, 28)], [(56, 56)]])
    results = {}
    for weights in ({}, WEIGHTS):
        trainer, inputs = batch_of(tmp_path, name, data, lora, **options, **weights)
        loss = trainer._compute_loss(trainer.model, inputs)
        results[bool(weights)] = loss.item(), gradients(trainer, loss)
    expected = plain_terms(trainer, inputs)
    assert results[True][0] - results[False][0] == pytest.approx(expected.item(), abs=1e-5)
    assert trainer._metrics["train"]["perception/kl"][0] > 1e-4
    for parameter, gradient in gradients(trainer, expected).items():
        added = results[True][1][parameter] - results[False][1][parameter]
        torch.testing.assert_close(added, gradient, rtol=1e-3, atol=2e-5, msg=parameter)


def test_errors(tmp_path):
    data = rows(4, [[(28, 28)]])

    def make(name="qwen2_5_vl", kind=trl.GRPOTrainer, rows_=data, **options):
        config = getattr(trl, "RLOOConfig" if issubclass(kind, trl.RLOOTrainer) else "GRPOConfig")
        with patch_trl(**({"perception_loss_weight": 0.01} | options)):
            return build(tmp_path, kind, *tiny_model(name), rows_, config=config)

    with pytest.raises(ValueError, match=r"perception_loss_weight must be 0 for an RLOOTrainer, got 0.01"):
        make(kind=trl.RLOOTrainer)
    with pytest.raises(
        ValueError, match=r"perception_loss_weight must be 0 for a Qwen2ForCausalLM, which has no images, got 0.01"
    ):
        make("text", rows_=rows(4, [[]]))
    message = "der_loss_weight1 must be 0 for a train_dataset without image or images, got 0.5"
    with pytest.raises(ValueError, match=message):
        make(rows_=rows(4, [[]]), perception_loss_weight=0.0, der_loss_weight1=0.5)
    with pytest.raises(ValueError, match="perception_loss_weight must be >= 0, got -1"):
        make(perception_loss_weight=-1.0)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \(0, 1\], got 2.0"):
        make(mask_ratio=2.0)

    class Overrides(trl.GRPOTrainer):
        def get_high_entropy_mask(self, *args):
            return super().get_high_entropy_mask(*args)

    message = "perception_loss_weight must be 0 for Overrides, which overrides a part of TRL's loss, got 0.01"
    with pytest.raises(ValueError, match=message):
        make(kind=Overrides)
