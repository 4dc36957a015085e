"""Our versions of verl's functions, compared with verl 0.9.1, whose files are loaded without their dependencies.

``make setup`` installs verl beside the environment: pip install --no-deps --target .venv/peers verl==0.9.1
"""

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from vlmkernels.integrations import verl as ours
from vlmkernels.integrations.patch import parameters

PEERS = Path(sys.prefix) / "peers"
if not (PEERS / "verl").is_dir():
    pytest.skip(f"verl is not in {PEERS}: pip install --no-deps --target {PEERS} verl==0.9.1", allow_module_level=True)

# Imports of core_algos that its policy losses do not use.
STUBS = {
    "omegaconf": ["DictConfig"],
    "tensordict": ["TensorDict"],
    "verl": [],
    "verl.utils": ["as_torch_index", "group_mean_std"],
    "verl.utils.device": ["get_device_name", "get_torch_device"],
    "verl.utils.import_utils": [],
    "verl.utils.experimental": [],
    "verl.utils.kernel": [],
    "verl.trainer": [],
    "verl.trainer.config": ["AlgoConfig"],
    "verl.trainer.ppo": [],
    "verl.workers": [],
    "verl.workers.config": ["ActorConfig"],
}
FILES = [
    "verl.utils.torch_functional",
    "verl.trainer.ppo.core_algos",
    "verl.utils.experimental.torch_functional",
    "verl.utils.kernel.linear_cross_entropy",
]


@pytest.fixture(scope="module")
def verl():
    """verl's modules, which are in sys.modules while the tests of this file run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in STUBS.items():
            module = types.ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, type(attribute, (), {}))
            patch.setitem(sys.modules, name, module)
        sys.modules["verl.utils.import_utils"].deprecated = lambda name: lambda function: function
        for name in FILES:
            spec = importlib.util.spec_from_file_location(name, PEERS / f"{name.replace('.', '/')}.py")
            patch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
            spec.loader.exec_module(sys.modules[name])
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, sys.modules[name])
        yield types.SimpleNamespace(**{name.removeprefix("verl.").replace(".", "_"): sys.modules[name] for name in FILES})


def assert_close(mine, other, what, rel=5e-6, scale=None):
    """Assert |mine - other| <= rel * scale. scale: the largest value of other by default."""
    assert mine.shape == other.shape, what
    error = (mine.double() - other.double()).abs().max().item()
    scale = other.double().abs().max().item() if scale is None else scale
    assert error <= rel * scale, f"{what}: {error:.1e}"


def make(dtype=torch.float32, shape=(3, 7), width=16, vocab=53):
    rng = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=rng).to(dtype)

    targets = torch.randint(vocab, shape, generator=rng)
    return normal(*shape, width).requires_grad_(), normal(vocab, width).requires_grad_(), targets


@pytest.mark.parametrize("shape", [(3, 7), (9,)])
def test_fused_linear_for_ppo(verl, shape):
    module = verl.utils_experimental_torch_functional.FusedLinearForPPO
    for chunk_size, backend in ((512, "torch"), (4, "torch")):
        results = []
        for cls in (ours.FusedLinearForPPO, module):
            hidden, weight, ids = make(shape=shape)
            log_probs, entropy = cls(chunk_size, backend)(hidden, weight, ids.int(), temperature=0.7)
            loss = (log_probs * ids).sum() - 0.3 * (entropy * ids).sum()
            results.append([log_probs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))])
        for name, mine, other in zip(("log_probs", "entropy", "dhidden", "dweight"), *results, strict=True):
            assert_close(mine, other, name)
    hidden, weight, ids = make(torch.bfloat16, shape)
    assert [x.dtype for x in ours.FusedLinearForPPO()(hidden, weight, ids)] == [torch.float32] * 2  # verl's entropy: bf16
    with pytest.raises(ValueError, match="impl_backend must be one of torch, liger, got 'cuda'"):
        ours.FusedLinearForPPO(impl_backend="cuda")


def test_linear_cross_entropy():
    """Compared with the formula in fp64, because verl's kernel needs CUDA. Results are flat for any shape of hidden."""
    hidden, weight, ids = make()
    logp = ((hidden.double() @ weight.double().T) / 0.7).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).flatten()
    chosen = logp.gather(-1, ids.unsqueeze(-1)).flatten()
    for reduction, expected in (("none", chosen), ("sum", chosen.sum()), ("MEAN", chosen.mean())):
        results = ours.linear_cross_entropy(hidden, weight, ids, 0.7, reduction)
        gradients = []
        for a, b in (results, (expected, entropy)):
            gradients.append(torch.autograd.grad(a.sum() + b.square().sum(), (hidden, weight), retain_graph=True))
        names = ("log_probs", "entropy", "dhidden", "dweight")
        for name, mine, other in zip(names, (*results, *gradients[0]), (expected, entropy, *gradients[1]), strict=True):
            assert_close(mine.detach(), other.detach(), f"{name} {reduction}")
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'max'"):
        ours.linear_cross_entropy(hidden, weight, ids, 1.0, "max")
    # Here verl's running maximum, which starts at 0, underflows (verl-project/verl#7439).
    offset = torch.cat([hidden.detach(), torch.full((*hidden.shape[:-1], 1), 100.0)], -1)
    far = torch.cat([weight.detach(), torch.full((len(weight), 1), -50.0)], -1)
    logps, _ = ours.linear_cross_entropy(offset.double(), far.double(), ids, 0.7)
    assert_close(logps, chosen.detach(), "logits near -7000", 1e-9)


class Config(types.SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def config(**settings):
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.4, "tau_pos": 1.0}
    return Config(**{**defaults, "tau_neg": 1.05, "global_batch_info": {}, **settings})


@pytest.mark.parametrize("kind", ["vanilla", "gspo", "sapo"])
def test_policy_losses(verl, kind, monkeypatch):
    core = verl.trainer_ppo_core_algos
    monkeypatch.setattr(core, "ActorConfig", Config)
    theirs, mine = core.POLICY_LOSS_REGISTRY[kind], ours.POLICY_LOSSES[f"vlmkernels_{kind}"]
    rng = torch.Generator().manual_seed(1)
    old = -torch.rand(4, 6, generator=rng) - 0.1
    log_prob, advantages = old + 0.4 * torch.randn(4, 6, generator=rng), torch.randn(4, 6, generator=rng)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0]).unsqueeze(1)
    globals_ = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9, "loss_scale_factor": 5}
    for mode in ours.AGGREGATIONS:
        for info, weights, settings in (
            ({}, None, {"clip_ratio_low": None, "clip_ratio_high": None}),
            (globals_, torch.rand(4, 6, generator=rng), {"clip_ratio_c": 1.2}),
        ):
            results = []
            for function in (mine, theirs):
                leaf = log_prob.clone().requires_grad_()
                loss, metrics = function(
                    old_log_prob=old, log_prob=leaf, advantages=advantages, response_mask=mask, loss_agg_mode=mode,
                    config=config(global_batch_info=info, **settings), rollout_is_weights=weights,
                )  # fmt: skip
                results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics))
            (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = results
            assert_close(loss, their_loss, f"loss {mode}", scale=their_gradient.abs().sum().item())
            assert_close(gradient, their_gradient, f"gradient {mode}")
            assert metrics == pytest.approx(their_metrics, rel=1e-5, abs=1e-6)
            assert list(metrics) == list(their_metrics)


def test_policy_loss_errors():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    loss = ours.POLICY_LOSSES["vlmkernels_vanilla"]
    for arguments, message in (
        ({"config": None}, "config must be given"),
        ({"loss_agg_mode": "batch-mean"}, "loss_agg_mode must be one of token-mean, .*, got 'batch-mean'"),
        ({"config": config(clip_ratio_c=1.1)}, "clip_ratio_c must be >= 1 \\+ clip_ratio_high = 1.15, got 1.1"),
        ({"config": config(global_batch_info={"dp_size": 2})}, "batch_num_tokens must be given with dp_size = 2, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(x, x, x, mask, **{"config": config()} | arguments)
    result, _ = loss(x, x.clone().requires_grad_(), x, torch.zeros(2, 3), config=config())
    assert result == 0  # no token counts; verl's result is NaN


def test_patch(verl, monkeypatch):
    """The patch changes verl's modules and registry and puts them back."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.1")
    functional, kernel = verl.utils_experimental_torch_functional, verl.utils_kernel_linear_cross_entropy
    registry = verl.trainer_ppo_core_algos.POLICY_LOSS_REGISTRY
    before = functional.FusedLinearForPPO, kernel.linear_cross_entropy, dict(registry)
    assert parameters(kernel.linear_cross_entropy) == parameters(ours.linear_cross_entropy)
    with ours.patch_verl():
        assert functional.FusedLinearForPPO is ours.FusedLinearForPPO
        assert kernel.linear_cross_entropy is ours.linear_cross_entropy
        loss = verl.trainer_ppo_core_algos.get_policy_loss_fn("vlmkernels_gspo")
        assert loss is ours.POLICY_LOSSES["vlmkernels_gspo"]
        with pytest.raises(RuntimeError, match="patch_verl must be undone before it is called again"):
            ours.patch_verl()
    assert (functional.FusedLinearForPPO, kernel.linear_cross_entropy, registry) == before
    import vlmkernels.integrations.verl_workers  # noqa: F401

    assert functional.FusedLinearForPPO is ours.FusedLinearForPPO
    ours.Patch.active["patch_verl"].undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    with pytest.raises(RuntimeError, match=r"patch_verl needs verl 0.9.\*, got 0.8.0"):
        ours.patch_verl()
