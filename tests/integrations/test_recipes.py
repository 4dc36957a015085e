"""The blocks of docs/dropins.md, run as they stand, against the trainers' formulas and ms-swift's own function."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch

TEXT = (Path(__file__).parents[2] / "docs" / "dropins.md").read_text()
BLOCKS = dict(re.findall(r"\n## ([\w -]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", TEXT, flags=re.DOTALL))
SWIFT = Path(sys.prefix) / "peers" / "swift" / "rlhf_trainers" / "grpo_trainer.py"


@pytest.fixture
def recipe(monkeypatch):
    """recipe(trainer, module): the block of ``trainer`` run; the stub that stands for ``module``, which it patches."""

    def run(trainer: str, module: str, *classes: str):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            stub = types.ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, stub.__name__, stub)
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], stub)
        for name in classes:
            setattr(stub, name, type(name, (), {}))
        exec(BLOCKS[trainer], {})
        return stub

    return run


def test_every_trainer_has_a_block():
    assert set(BLOCKS) == {"ms-swift", "VLM-R1", "R1-V", "EasyR1", "OpenRLHF"}


def prompts_with_completions():
    """A tiny Qwen2.5-VL and two samples of one image each, prompts padded on the left, completions of three tokens."""
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
    inputs.pop("mm_token_type_ids", None)
    return model, inputs


def trainer_of(cls, model, **attributes):
    """A trainer as far as the functions look at it."""
    trainer = cls()
    trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer.template = types.SimpleNamespace(padding_free=False)
    trainer.model_kwarg_keys = {"use_cache", "logits_to_keep"}
    vars(trainer).update(attributes)
    return trainer


def formula(model, inputs, temperature=1.0):
    """Log-probabilities (B, L - 1) and entropies of all tokens but the first, from all logits."""
    logp = (model(**inputs).logits[:, :-1] / temperature).log_softmax(-1)
    chosen = logp.gather(-1, inputs["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1)


def assert_same(model, mine, expected):
    """Values and the gradients of all parameters."""
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(1, 2, mine.numel()).view(mine.shape)
    gradients = []
    for result in (mine, expected):
        model.zero_grad()
        (result * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-3)


def swifts_own():
    """ms-swift's own method, out of its file: that imports packages which this does not need."""
    tree = ast.parse(SWIFT.read_text())
    name = "_get_logps_via_local_forward"
    (node,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    names = {"entropy_from_logits": entropy_from_logits, "selective_log_softmax": selective_log_softmax, "torch": torch}
    exec("from typing import *\n" + ast.unparse(node), names)
    return names[name]


@pytest.mark.parametrize("oracle", ["formula", "ms-swift"])
def test_ms_swift(recipe, oracle):
    cls = recipe("ms-swift", "swift.rlhf_trainers.grpo_trainer", "GRPOTrainer").GRPOTrainer
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
        return
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    assert_same(model, logps, expected)


@pytest.mark.parametrize(("name", "cls"), [("VLM-R1", "VLMGRPOTrainer"), ("R1-V", "Qwen2VLGRPOTrainer")])
def test_r1(recipe, name, cls):
    cls = getattr(recipe(name, "open_r1.trainer.grpo_trainer", cls), cls)
    model, inputs = prompts_with_completions()
    ids, mask, pixels, grid = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], inputs["image_grid_thw"]
    trainer = trainer_of(cls, model)
    call = trainer._get_per_token_logps
    mine = (
        call(model, ids, mask, pixels, grid)
        if name == "R1-V"
        else call(model, ids, mask, pixel_values=pixels, image_grid_thw=grid)
    )
    expected, _ = formula(model, inputs)
    assert mine.shape == expected.shape
    last = (ids == model.config.image_token_id).int().cumsum(1).argmax(1)  # of the image tokens
    assert (mine[0, : last[0]] == 0).all()
    completion = slice(ids.shape[1] - 4, None)
    assert_same(model, mine[:, completion], expected[:, completion])
    with torch.inference_mode():  # as R1-V calls the reference model
        again = (
            call(model, ids, mask, pixels, grid)
            if name == "R1-V"
            else call(model, ids, mask, pixel_values=pixels, image_grid_thw=grid)
        )
    torch.testing.assert_close(again, mine.detach())


def logits_and_labels():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 7, 31, generator=rng), torch.randint(31, (2, 5), generator=rng)


@pytest.mark.parametrize("compiled", [False, True])
def test_easy_r1(recipe, compiled):
    """Of a view, as the padded actor passes it, and flat, as the padding-free one does; compiled, as the actor compiles it."""
    function = recipe("EasyR1", "verl.utils.torch_functional").log_probs_from_logits
    if compiled:
        function = torch.compile(function, dynamic=True, backend="eager", fullgraph=True)
    for flat in (False, True):
        logits, labels = logits_and_labels()
        results = []
        for of in (function, lambda x, y: x.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)):
            leaf = logits.clone().requires_grad_()
            scaled = leaf / 0.7  # EasyR1 divides in place before
            view = scaled[:, 1:-1]
            result = of(view.reshape(-1, 31), labels.flatten()) if flat else of(view, labels)
            results.append((result.detach(), torch.autograd.grad(result.square().sum(), leaf)[0]))
        torch.testing.assert_close(*results)


def test_open_rlhf(recipe):
    actor = recipe("OpenRLHF", "openrlhf.models.actor")
    logits, labels = logits_and_labels()
    logits = logits[:, :5].clone().requires_grad_()
    logp = (logits / 0.7).log_softmax(-1)
    expected = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mine = actor.log_probs_from_logits(logits, labels, temperature=0.7)
    entropy, expected_entropy = actor.compute_entropy(logits), -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close((mine, entropy), (expected, expected_entropy))
    gradients = [
        torch.autograd.grad((a.square() + b).sum(), logits, retain_graph=True)[0]
        for a, b in ((mine, entropy), (expected, expected_entropy))
    ]
    torch.testing.assert_close(*gradients)
