"""The reference of policies with adapters: a copy of the adapter that was given, also in a resumed run."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import tiny
from support.training import FixedGenerate, config, length_reward, vowel_reward

from vlmkernels.train import GRPOTrainer, reference


def trained(name="default", **options) -> PeftModel:
    """A model with an adapter as SFT leaves it: not the identity."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return get_peft_model(tiny.vlm(), LoraConfig(**options), adapter_name=name)


def run(folder, model, resume=None, peft_config=None, **options) -> GRPOTrainer:
    args = config(folder, **{"beta": 0.1, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, **options})
    data = tiny.rows(6, "one")
    funcs = [length_reward, vowel_reward]
    trainer = GRPOTrainer(model, funcs, args, data, processing_class=tiny.processor(), peft_config=peft_config)
    trainer.engine = FixedGenerate(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def divergences(trainer) -> list[float]:
    return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ["norm"], "target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "pissa", "name": "sft"},
    ],
    ids=["lora", "dora", "modules to save", "pissa, named"],
)
def test_reference_is_the_adapter_that_was_given(tmp_path, options):
    """KL is 0 at the first step, and a resumed run has the reference of the first run even if it is given other weights."""
    whole = run(tmp_path, trained(**options))
    found = divergences(whole)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[2] > 1e-6
    checkpoint, name = tmp_path / "checkpoint-2", options.get("name", "default")
    assert not (checkpoint / "ref").exists()
    folder = checkpoint if name == "default" else checkpoint / name
    given = PeftModel.from_pretrained(tiny.vlm(), folder, adapter_name=name, is_trainable=True)
    if options.get("init_lora_weights") == "pissa":  # its base model is not tiny.vlm()
        given = trained(**options)
    resumed = run(tmp_path, given, resume=str(checkpoint))
    assert divergences(resumed) == pytest.approx(found, rel=1e-5)
    trained_names = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    assert trained_names
    assert not any(".ref" in name for name in trained_names)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_reference_of_a_new_adapter_is_the_given_model(tmp_path, init):
    """PiSSA changes the base model, so that it is not the model that was given."""
    new = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    trainer = run(tmp_path, tiny.vlm(), peft_config=new)
    assert divergences(trainer)[0] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[0]["kl"] < divergences(trainer)[-1]


def test_other_adapters_are_saved_and_resumed(tmp_path):
    def two():
        model = trained()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
        return model

    found = divergences(run(tmp_path, two()))
    assert (tmp_path / "checkpoint-2" / "other" / "adapter_config.json").exists()
    assert divergences(run(tmp_path, two(), resume=str(tmp_path / "checkpoint-2"))) == pytest.approx(found, rel=1e-5)


def test_models_and_checkpoints_that_do_not_fit_are_named(tmp_path):
    new = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    run(tmp_path, tiny.vlm(), peft_config=new)
    checkpoint = str(tmp_path / "checkpoint-2")
    saved = PeftModel.from_pretrained(tiny.vlm(), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match="must have the reference of this run, a copy of an adapter, got the model without"):
        run(tmp_path, saved, resume=checkpoint)
    with pytest.raises(ValueError, match="peft_config must be None for a model that has adapters"):
        run(tmp_path, trained(), peft_config=new)
    with pytest.raises(TypeError, match=r"peft_config must be a peft.PeftConfig, got dict"):
        run(tmp_path, tiny.vlm(), peft_config={"r": 4})
    with pytest.raises(ValueError, match=r"must have parameters that require gradients .*, got none"):
        run(tmp_path, PeftModel.from_pretrained(tiny.vlm(), checkpoint))
    with pytest.raises(ValueError, match="must hold the adapter 'sft', like the trained model, got none of this name"):
        run(tmp_path, trained("sft"), beta=0.0, resume=checkpoint_with_other_names(tmp_path))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules=["q_proj"])], ids=["whole model", "new adapter"])
def test_resumed_runs_have_the_divergences_of_the_first(tmp_path, peft_config):
    found = divergences(run(tmp_path, tiny.vlm(), peft_config=peft_config))
    assert found[2] > found[0] == pytest.approx(0, abs=1e-6)
    resumed = run(tmp_path, tiny.vlm(), peft_config=peft_config, resume=str(tmp_path / "checkpoint-2"))
    assert divergences(resumed) == pytest.approx(found, rel=1e-5)


def test_checkpoints_that_record_no_reference_are_named(tmp_path, monkeypatch):
    """Those of a run with beta = 0, and of versions whose reference was the model without adapters."""
    warnings = []
    monkeypatch.setattr(reference.logger, "warning", lambda text, *values: warnings.append(text % values))
    run(tmp_path, trained(), beta=0.0)
    checkpoint = tmp_path / "checkpoint-2"
    run(tmp_path, trained(), beta=0.0, resume=str(checkpoint))
    assert warnings == []
    run(tmp_path, trained(), resume=str(checkpoint))
    manifest = checkpoint / "vlmkernels.json"
    about = json.loads(manifest.read_text())
    assert about.pop("reference") is None
    manifest.write_text(json.dumps(about))
    run(tmp_path, trained(), resume=str(checkpoint))
    expected = "checkpoint-2 records no reference: this run uses a copy of an adapter as it was given"
    assert [expected in text for text in warnings] == [True, True]


def test_the_copy_is_not_saved_trained_or_counted(tmp_path):
    trainer = run(tmp_path, trained(), max_steps=2)
    trainer.save_model(tmp_path / "final")
    assert [path for path in tmp_path.rglob("*") if "ref" in path.name] == [
        tmp_path / "checkpoint-2" / "reference_adapter.safetensors"
    ]
    copied = {id(p) for name, p in trainer.model.named_parameters() if ".ref." in name}
    assert copied
    assert not copied & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    counted = json.loads((tmp_path / "run.json").read_text())["model"]
    own = list(trained().parameters())
    assert counted["parameters"] == sum(p.numel() for p in own)
    assert counted["trained parameters"] == sum(p.numel() for p in own if p.requires_grad)
    assert not [name for name in trainer.model.merge_and_unload().state_dict() if "ref" in name.split(".")]


def test_adapters_named_ref(tmp_path):
    """An inactive one is the reference, and frozen; an active one is trained and saved, but only without a reference."""
    model = trained()
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer = run(tmp_path, model)
    assert divergences(trainer)[0] > 1e-3
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)

    alone = run(tmp_path, trained("ref"), beta=0.0)
    assert list(alone.model.peft_config) == ["ref"]
    assert (tmp_path / "checkpoint-2" / "ref" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="model must not train an adapter named 'ref' with beta > 0"):
        run(tmp_path, trained("ref"))


def test_no_copy_without_a_weight_of_the_divergence(tmp_path):
    trainer = run(tmp_path, trained(), beta=0.0, max_steps=1)
    assert (list(trainer.model.peft_config), trainer.reference_adapter) == (["default"], {})


def checkpoint_with_other_names(folder) -> str:
    run(folder / "named", trained("other"), beta=0.0)
    return str(folder / "named" / "checkpoint-2")
