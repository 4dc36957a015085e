"""The accuracy of log-probabilities from a bf16 head and of their gradients, compared with TRL and Liger.

    python bench/accuracy.py          # writes bench/results/accuracy-<device>.json; fails if ours is not the most accurate

Errors are against fp64. Logits lie in [-30, 30], where rounding to bf16 changes them by up to 0.06; targets are samples.
"""

import json
import sys

import harness
import torch
from bench_linear import full_logps, liger_hopper_logps, ours, peers, trl_logps

from vlmkernels import linear_logps

NUM, WIDTH, VOCAB, LARGEST = 512, 1024, 32000, 30.0


def make():
    rng = torch.Generator(harness.DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, device=harness.DEVICE)

    hidden, weight = randn(8, NUM // 8, WIDTH).bfloat16(), randn(VOCAB, WIDTH)
    weight *= LARGEST / (hidden.float() @ weight.T).abs().max()
    weight = weight.bfloat16()
    logits = hidden.double() @ weight.double().T
    targets = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=rng).view(8, -1)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, randn(8), logits


LOGPS = {
    "TRL _ChunkedLogProbFunction": trl_logps,
    "Liger scaled cross-entropy (Hopper)": liger_hopper_logps,
    "full logits": full_logps,
}


def main() -> int:
    hidden, weight, targets, advantages, logits = make()
    exact = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    inputs = (hidden, weight, targets, advantages)
    dlogp = -(advantages.double() / targets.numel()).view(-1, 1, 1)
    dlogits = (-dlogp * logits.softmax(-1)).scatter_add_(-1, targets.unsqueeze(-1), dlogp.expand(*targets.shape, 1))
    gradients = [dlogits @ weight.double(), dlogits.flatten(0, 1).T @ hidden.double().flatten(0, 1)]

    def logps_of(name):
        if name.startswith("vlmkernels"):
            return linear_logps(hidden, weight, targets, backend=name.split()[-1])
        return LOGPS[name](*inputs[:3])[0] if name in LOGPS else None

    rows = []
    for name, loss in (ours() | peers()).items():
        logps = logps_of(name)
        row = {"provider": name}
        if logps is not None:
            error = (logps.double() - exact).abs()
            row |= {"max_logp": error.max().item(), "mean_logp": error.mean().item()}
        for what, actual, true in zip(
            ("hidden", "weight"), torch.autograd.grad(loss(*inputs), inputs[:2]), gradients, strict=True
        ):
            row[f"cosine_{what}"] = 1 - torch.cosine_similarity(actual.double().flatten(), true.flatten(), 0).item()
        rows.append(row)
    content = {"device": harness.device_name(), **harness.provenance(), "rows": rows}
    path = harness.RESULTS / f"accuracy-{harness.slug(harness.device_name())}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(", ".join(f"{key} {value:.2e}" if isinstance(value, float) else value for key, value in row.items()))
    own = [row for row in rows if row["provider"].startswith("vlmkernels")]
    others = [row for row in rows if row not in own]
    worse = [
        (row["provider"], key)
        for row in own
        for key in row.keys() - {"provider"}
        if row[key] > min(other[key] for other in others if key in other)
    ]
    print(f"less accurate than another: {worse}" if worse else "ours is the most accurate")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
