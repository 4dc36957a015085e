"""The code blocks of docs/integrations run unchanged, and equal the trainers' formulas and ms-swift's own function."""

import ast
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support import tiny

PAGES = {path.stem: path.read_text() for path in (Path(__file__).parents[2] / "docs" / "integrations").glob("*.md")}
# The Python blocks of each page, and of each section of others.md.
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for page, text in PAGES.items()}
BLOCKS |= {section: [code] for section, code in re.findall(
    r"\n## ([\w -]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGES["others"], flags=re.DOTALL
)}  # fmt: skip
SWIFT = Path(sys.prefix) / "peers" / "swift" / "rlhf_trainers" / "grpo_trainer.py"


@pytest.fixture
def recipe(monkeypatch):
    """recipe(trainer, modules): run the trainer's block with stubs of modules and their classes; return the patched class."""

    def run(trainer: str, modules: dict[str, list[str]]) -> type:
        for module, names in modules.items():
            parts = module.split(".")
            for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if not isinstance(sys.modules.get(name), Stub):
                    monkeypatch.setitem(sys.modules, name, Stub(name))
            for name in names:
                own = {method: lambda *arguments, **options: "its own" for method in ("forward", "_forward_micro_batch")}
                setattr(sys.modules[module], name, type(name, (), own))
        exec(BLOCKS[trainer][0], {})
        return getattr(sys.modules[module], name)

    return run


class Stub(types.ModuleType):
    """A package of a trainer that is not installed."""

    __path__: ClassVar[list[str]] = []


def test_every_trainer_has_a_block():
    trainers = {"VLM-R1", "R1-V", "EasyR1", "OpenRLHF"}
    assert set(BLOCKS) - trainers == {"trl", "liger", "verl", "transformers", "ms-swift", "others"}
    assert trainers < set(BLOCKS)


def test_trl():
    trl = pytest.importorskip("trl")
    before, names = trl.GRPOTrainer._compute_loss, {}
    exec(BLOCKS["trl"][0], names)
    assert trl.GRPOTrainer._compute_loss.__module__ == "vlmkernels.integrations.trl"
    names["patch"].undo()
    assert trl.GRPOTrainer._compute_loss is before


@pytest.mark.parametrize("page", ["liger", "ms-swift"])
def test_liger_kernel(page):
    """Runs the patch and the call of Liger's class on its page, and the plugin for ms-swift."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    names: dict = {}
    for block in BLOCKS[page] if page == "liger" else BLOCKS[page][1:]:
        exec(block, names)
    assert chunked_loss.LigerFusedLinearGRPOLoss.__module__ == "vlmkernels.integrations.liger"
    assert page == "ms-swift" or names["loss"].isfinite()
    names["patch"].undo()
    assert chunked_loss.LigerFusedLinearGRPOLoss.__module__.startswith("liger_kernel")


def test_flags_of_swift_rlhf():
    """Every flag of the page is an argument of ms-swift 4.6 or of transformers, and plugins are imported with the arguments."""
    from transformers import TrainingArguments

    arguments = SWIFT.parents[1] / "arguments"
    if not arguments.exists():
        pytest.skip(f"ms-swift is not there: pip install --no-deps --target {SWIFT.parents[2]} ms-swift==4.6.0")
    source = "\n".join(path.read_text() for path in arguments.rglob("*.py"))
    fields = set(re.findall(r"^    (\w+): ", source, flags=re.MULTILINE)) | TrainingArguments.__dataclass_fields__.keys()
    flags = set(re.findall(r"--(\w+)", PAGES["ms-swift"]))
    assert {"rlhf_type", "external_plugins", "use_liger_kernel"} <= flags
    assert flags <= fields
    tree = ast.parse((arguments / "base_args" / "base_args.py").read_text())
    (start,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__")
    assert "_import_external_plugins" in ast.unparse(start)


def test_transformers(tmp_path):
    tiny.vlm().save_pretrained(tmp_path)
    names: dict = {}
    exec(BLOCKS["transformers"][0].replace("path/to/Qwen2.5-VL", str(tmp_path)), names)
    config = names["model"].config
    assert config.text_config._attn_implementation == "vlmkernels"
    assert config.vision_config._attn_implementation == "vlmkernels_flash_varlen"


def prompts_with_completions():
    """Return a tiny Qwen2.5-VL and inputs of two samples: one image each, left-padded prompts, completions of three tokens."""
    processor, model = tiny.processor(), tiny.vlm(tied=False)
    texts = [
        processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in [
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}]} for t in ("a", "more?")
        ]
    ]
    inputs = dict(processor(text=texts, images=[tiny.image(0), tiny.image(1)], return_tensors="pt", padding=True))
    completion = torch.tensor([[1, 2, 3], [7, 5, 6]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completion], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(completion)], 1)
    kinds = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(completion)], 1).to(kinds.dtype)
    return model, inputs


def trainer_of(cls, model, **attributes):
    """Return a trainer with the attributes that the functions read."""
    trainer = cls()
    trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer.template = types.SimpleNamespace(padding_free=False)
    trainer.model_kwarg_keys = {"use_cache", "logits_to_keep"}
    vars(trainer).update(attributes)
    return trainer


def formula(model, inputs, temperature=1.0):
    """Return log-probabilities and entropies (B, L - 1) of all tokens but the first, from the logits of the model."""
    logp = (model(**inputs).logits[:, :-1] / temperature).log_softmax(-1)
    chosen = logp.gather(-1, inputs["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1)


def assert_same(model, mine, expected):
    """Assert that values and the gradients of all parameters are equal."""
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(1, 2, mine.numel()).view(mine.shape)
    gradients = []
    for result in (mine, expected):
        model.zero_grad()
        (result * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-3)


def swifts_own():
    """Return ms-swift's own method, compiled from its source, because its module imports packages that are not installed."""
    tree = ast.parse(SWIFT.read_text())
    name = "_get_logps_via_local_forward"
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    names = {"entropy_from_logits": entropy_from_logits, "selective_log_softmax": selective_log_softmax, "torch": torch}
    exec("from typing import *\n" + ast.unparse(node), names)
    return names[name]


@pytest.mark.parametrize("oracle", ["formula", "ms-swift"])
def test_ms_swift(recipe, oracle):
    cls = recipe("ms-swift", {"swift.rlhf_trainers.grpo_trainer": ["GRPOTrainer"]})
    model, inputs = prompts_with_completions()
    trainer = trainer_of(cls, model, temperature=0.7)
    arguments = (model, inputs, 3, inputs["input_ids"])
    logps, entropy = trainer._get_logps_via_local_forward(*arguments, compute_entropy=True)
    if oracle == "formula":
        expected, expected_entropy = (x[:, -3:] for x in formula(model, inputs, 0.7))
        assert trainer._get_logps_via_local_forward(*arguments)[1] is None
    else:
        if not SWIFT.exists():
            pytest.skip(f"ms-swift is not there: pip install --no-deps --target {SWIFT.parents[2]} ms-swift==4.6.0")
        own = swifts_own()
        names = own.__code__.co_varnames[: own.__code__.co_argcount]
        mine = cls._get_logps_via_local_forward.__code__
        assert mine.co_varnames[: mine.co_argcount] == names
        with torch.no_grad():
            expected, expected_entropy = own(trainer, *arguments, compute_entropy=True)
        torch.testing.assert_close(logps.detach(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy.detach(), expected_entropy, atol=1e-5, rtol=1e-5)
        trainer.template.padding_free = True  # two sequences in one row
        packed = {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2]]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
        arguments = (tiny.text_model(), packed, 6, packed["input_ids"])
        with torch.no_grad():
            results = [f(trainer, *arguments, compute_entropy=True) for f in (cls._get_logps_via_local_forward, own)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        return
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    assert_same(model, logps, expected)


@pytest.mark.parametrize(("name", "cls"), [("VLM-R1", "VLMGRPOTrainer"), ("R1-V", "Qwen2VLGRPOTrainer")])
def test_r1(recipe, name, cls):
    cls = recipe(name, {"open_r1.trainer.grpo_trainer": [cls]})
    model, inputs = prompts_with_completions()
    ids, mask, pixels, grid = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], inputs["image_grid_thw"]
    trainer = trainer_of(cls, model)
    images = {"pixel_values": pixels, "image_grid_thw": grid}
    call = partial(trainer._get_per_token_logps, model, ids, mask)
    call = partial(call, pixels, grid) if name == "R1-V" else partial(call, **images)
    mine = call()
    expected, _ = formula(model, inputs)
    assert mine.shape == expected.shape
    last = (ids == model.config.image_token_id).int().cumsum(1).argmax(1)  # of the image tokens
    assert (mine[0, : last[0]] == 0).all()
    completion = slice(ids.shape[1] - 4, None)
    assert_same(model, mine[:, completion], expected[:, completion])
    with torch.inference_mode():  # as R1-V calls the reference model
        again = call()
    torch.testing.assert_close(again, mine.detach())


@pytest.mark.parametrize("padding_free", [False, True])
def test_easy_r1(recipe, monkeypatch, padding_free):
    """Compares padded inputs with images, and packed inputs of a text model, which finds the sequences by their positions."""
    protocol = Stub("verl.protocol")
    protocol.batch_collate = lambda rows: {name: [row[name] for row in rows] for name in rows[0]}
    monkeypatch.setitem(sys.modules, "verl.protocol", protocol)
    cls = recipe("EasyR1", {"verl.workers.actor.dp_actor": ["DataParallelPPOActor"]})
    model, inputs = prompts_with_completions()
    if padding_free:
        model = tiny.text_model()
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        inputs["input_ids"] = inputs["input_ids"] % model.config.vocab_size
    inputs["attention_mask"][1, -1] = 0  # a response that is shorter
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    micro_batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "responses": ids[:, -3:]}
    if not padding_free:
        patches = inputs["image_grid_thw"].prod(1).tolist()
        images = zip(inputs["pixel_values"].split(patches), inputs["image_grid_thw"].split(1), strict=True)
        micro_batch["multi_modal_inputs"] = [{"pixel_values": p, "image_grid_thw": g} for p, g in images]
        kinds, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        positions = model.model.get_rope_index(ids, kinds, grid, attention_mask=mask)[0]
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0).unsqueeze(0), positions])  # text first: (4, B, S)
        micro_batch["position_ids"] = positions.transpose(0, 1)
    actor = cls()
    actor.config = types.SimpleNamespace(ulysses_size=1, padding_free=padding_free)
    actor.actor_module = model
    mine = actor._forward_micro_batch(micro_batch, 0.7)
    expected, _ = formula(model, inputs | {"position_ids": positions}, 0.7)
    assert_same(model, mine, expected[:, -3:] * mask[:, -3:])
    assert mine[1, -1] == 0
    actor.config.ulysses_size = 2
    assert actor._forward_micro_batch(micro_batch, 0.7) == "its own"


def test_open_rlhf(recipe):
    cls = recipe("OpenRLHF", {"openrlhf.models.actor": ["Actor"]})
    model, inputs = prompts_with_completions()
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    action_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    actor = cls()
    vars(actor).update(is_vlm=True, model=model, temperature=0.7, _vlm_config=model.config)
    logps, output = actor.forward(
        ids, action_mask, attention_mask=mask, return_output=True, ring_attn_group=None, packed_seq_lens=None,
        return_entropy=True, **{name: inputs[name] for name in ("pixel_values", "image_grid_thw")},
    )  # fmt: skip
    expected, entropy = (
        x[:, -3:] * action_mask for x in formula(model, inputs | {"input_ids": ids, "attention_mask": mask}, 0.7)
    )
    torch.testing.assert_close(output.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert_same(model, logps, expected)
    again = actor.forward(ids, action_mask, mask, **{name: inputs[name] for name in ("pixel_values", "image_grid_thw")})
    torch.testing.assert_close(again, logps)
    assert not model._forward_hooks
    assert actor.forward(ids, None, mask, return_output=True) == "its own"
    actor.is_vlm = False
    assert actor.forward(ids, action_mask, mask) == "its own"
