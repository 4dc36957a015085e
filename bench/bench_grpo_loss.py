"""The DAPO loss with a KL term on given log-probabilities, forward and backward, and group advantages, compared with peers.

Useful bytes: log-probabilities of the policy, the old policy and the reference, entropies, the mask, and the gradient.

Errors are those of the loss and its gradient against fp64, relative to the largest value.
"""

import importlib.util

import harness
import pytest
import torch

from vlmkernels import GRPOLossConfig, group_advantages, grpo_loss

# (completions, tokens): a micro-batch; long answers; a whole batch.
CASES = [(64, 512), (64, 4096), (512, 2048)]
# On the CPU, calls timed together: a single call is short, and another provider has just used the caches. On a GPU the harness
# chooses the number.
CALLS = 1 if harness.GPU else 50
OPTIONS = {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False, "epsilon_high": 0.28}
CONFIG = GRPOLossConfig(**OPTIONS)


def make(num, length):
    """The mask keeps half to all of each row; the policies differ as after a few steps."""
    rng = torch.Generator(harness.DEVICE).manual_seed(0)

    def randn():
        return torch.randn(num, length, generator=rng, device=harness.DEVICE)

    logps = -randn().exp()
    lengths = torch.randint(length // 2, length + 1, (num, 1), generator=rng, device=harness.DEVICE)
    mask = torch.arange(length, device=harness.DEVICE) < lengths
    return {
        "logps": logps,
        "advantages": randn()[:, 0].clone(),
        "old_logps": logps + 0.1 * randn(),
        "ref_logps": logps + 0.1 * randn(),
        "entropy": randn().abs(),
        "loss_mask": mask,
        "num_items": mask.sum().float(),
    }


def formula(logps, advantages, old_logps, ref_logps, entropy, loss_mask, num_items):
    """The loss without metrics and without clamping of large values."""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high)
    advantages = advantages.unsqueeze(1)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    gap = ref_logps - logps
    return ((loss + CONFIG.beta * (gap.exp() - gap - 1)) * loss_mask).sum() / num_items


def step(loss, batch):
    """A provider that returns the loss and its gradient with respect to ``logps``."""

    def once():
        value = loss(**batch)
        return value.detach(), torch.autograd.grad(value, batch["logps"])[0]

    return repeated(once)


def repeated(once):
    """Run ``once`` CALLS times and keep one result at a time, as in training."""

    def run():
        for _ in range(CALLS):
            result = once()
        return result

    return run


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_grpo_loss(benchmark, shape):
    torch._dynamo.reset()
    batch = make(*shape)
    double = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    double["logps"].requires_grad_()
    exact = step(formula, double)()
    batch["logps"].requires_grad_()

    def ours(name):
        return step(lambda **inputs: grpo_loss(**inputs, config=CONFIG, backend=name).loss, batch)

    providers = {f"vlmkernels {name}, with metrics": ours(name) for name in harness.backends("grpo_loss", batch["logps"])}
    if importlib.util.find_spec("trl"):
        from support.trl_loss import trl_args, trl_loss

        args = trl_args(**OPTIONS)

        def theirs(**inputs):
            return trl_loss(args, rollout_logps=None, **inputs)[0]

        providers["TRL GRPOTrainer._compute_loss"] = step(theirs, batch)
        providers["torch.compile of TRL's"] = step(torch.compile(theirs, dynamic=False), batch)
    providers["torch.compile of the formula, no metrics"] = step(torch.compile(formula, dynamic=False), batch)
    providers["eager formula, no metrics"] = step(formula, batch)

    def check(name, result):
        errors = [((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(result, exact, strict=True)]
        assert max(errors) < 1e-4, f"{name} is wrong: relative errors {errors}"
        return f"loss {errors[0]:.0e}, gradient {errors[1]:.0e}"

    inputs = [x.detach().view(torch.int8) if x.dtype == torch.bool else x.detach() for x in batch.values()]
    floors = {"read each input once": repeated(lambda: [x.sum() for x in inputs])}
    title = f"grpo_loss {shape[0]} x {shape[1]}" + (f", {CALLS} calls" if CALLS > 1 else "")
    read = CALLS * sum(x.numel() * x.element_size() for x in inputs)
    bytes = dict.fromkeys(providers, read + CALLS * 4 * batch["loss_mask"].numel()) | dict.fromkeys(floors, read)
    harness.compare(benchmark, harness.Case(title, providers, check, floors, limit_s=20, bytes=bytes))


def advantages_formula(rewards, weights, size):
    """As in TRL's trainer, with its metrics: the mean and the standard deviation of each group."""
    grouped = (rewards * weights).nansum(1).view(-1, size)
    mean, std = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
    return ((grouped - mean) / (std + 1e-4)).flatten(), mean.flatten(), std.flatten()


@pytest.mark.parametrize(("num", "size"), [(64, 8), (4096, 16)])
def test_group_advantages(benchmark, num, size):
    """Three reward functions. Errors are those of the advantages against fp64, relative to the largest one."""
    torch._dynamo.reset()
    rng = torch.Generator(harness.DEVICE).manual_seed(0)
    rewards = torch.randn(num, 3, generator=rng, device=harness.DEVICE)
    weights = torch.tensor([1.0, 0.5, 0.2], device=harness.DEVICE)
    exact = advantages_formula(rewards.double(), weights.double(), size)[0]

    def ours(name):
        return repeated(lambda: group_advantages(rewards, size, weights=weights, backend=name).advantages)

    providers = {f"vlmkernels {name}, with metrics": ours(name) for name in harness.backends("group_advantages", rewards)}
    compiled = torch.compile(advantages_formula, dynamic=False)
    providers["torch.compile of the formula"] = repeated(lambda: compiled(rewards, weights, size)[0])
    providers["eager formula"] = repeated(lambda: advantages_formula(rewards, weights, size)[0])

    def check(name, result):
        error = ((result.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-5, f"{name} is wrong: relative error {error}"
        return f"{error:.0e}"

    title = f"group_advantages {num} x 3, groups of {size}" + (f", {CALLS} calls" if CALLS > 1 else "")
    harness.compare(benchmark, harness.Case(title, providers, check, limit_s=5))
