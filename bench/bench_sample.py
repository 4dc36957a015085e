"""sample_logps, compared with the draw of earlier versions and with transformers: tokens, log-probabilities and kept mass.

Useful bytes: the logits, read once.

Errors are those of logps against fp64 on the first rows, relative to the largest value. A token is wrong if its uniform is not
in its part of the cumulative distribution function in fp64. torch.multinomial draws other numbers, so only its
log-probabilities are checked.
"""

import harness
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlmkernels import gather_logps, sample_logps

CASES = {"64 x 151936": (64, 151936)}
if harness.GPU:
    CASES |= {"8 x 151936": (8, 151936), "512 x 151936": (512, 151936)}
OPTIONS = {
    "all tokens": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 20, top_p 0.8": {"top_k": 20, "top_p": 0.8},
    "min_p 0.05": {"min_p": 0.05},
    "greedy": None,
}
CHECKED = 8  # rows
ROUNDING = 1e-5


def warped(scores, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities that transformers samples with."""
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


def with_logps(logits, ids, probabilities):
    logps = gather_logps(logits, ids)
    kept = logps if probabilities is None else logps - probabilities.gather(1, ids.unsqueeze(1)).squeeze(1).log()
    return ids, logps, kept


def inverted(logits, uniform, options):
    """The draw of earlier versions: the inverse of a cumulative sum in fp64."""
    probabilities = warped(logits.float(), **options)
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    below = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(total - 1))
    return with_logps(logits, torch.searchsorted(sums, below, right=True).squeeze(1), probabilities)


def multinomial(logits, options):
    """The draw of transformers, with the log-probabilities of its tokens."""
    probabilities = warped(logits.float(), **options)
    return with_logps(logits, torch.multinomial(probabilities, 1).squeeze(1), probabilities)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_sample(benchmark, case, dtype, options):
    num, vocab = CASES[case]
    rng = torch.Generator(harness.DEVICE).manual_seed(0)
    logits = (3 * torch.randn(num, vocab, generator=rng, device=harness.DEVICE)).to(dtype)
    uniform = torch.rand(num, generator=rng, device=harness.DEVICE, dtype=torch.float64)
    greedy, filters = OPTIONS[options] is None, OPTIONS[options] or {}
    draws = None if greedy else uniform

    providers = {
        f"vlmkernels {name}": lambda name=name: sample_logps(logits, draws, backend=name, **filters)
        for name in harness.backends("sample_logps", logits)
    }
    if greedy:
        providers["argmax + gather_logps"] = lambda: with_logps(logits, logits.argmax(-1), None)
    else:
        providers["transformers' warpers + inverse CDF in fp64"] = lambda: inverted(logits, uniform, filters)
        providers["transformers' warpers + multinomial"] = lambda: multinomial(logits, filters)

    exact = logits[:CHECKED].double()
    log_p = exact.log_softmax(-1)
    cdf = warped(exact, **filters).cumsum(-1)

    def check(name, result):
        ids, logps, *_ = result
        rows = ids[:CHECKED].unsqueeze(1)
        expected = log_p.gather(1, rows).squeeze(1)
        error = ((logps[:CHECKED].double() - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-4, f"{name} is wrong: relative error {error} of logps"
        # Which of equal scores top_p keeps depends on the sort, and 16-bit logits are often equal.
        if greedy:
            assert exact.gather(1, rows).squeeze(1).equal(exact.amax(1)), name
        elif "multinomial" not in name and not (dtype != torch.float32 and "top_p" in filters):
            end = cdf.gather(1, rows).squeeze(1)
            start = torch.where(rows.squeeze(1) > 0, cdf.gather(1, (rows - 1).clamp(min=0)).squeeze(1), 0)
            inside = (uniform[:CHECKED] <= end + ROUNDING) & (uniform[:CHECKED] >= start - ROUNDING)
            assert inside.all(), f"{name} is wrong: a token is not where its uniform is"
        return f"logp {error:.0e}"

    floors = {"largest element of a row": lambda: logits.amax(-1)}
    title = f"sample_logps {case}, {str(dtype).removeprefix('torch.')}, {options}"
    size = logits.numel() * logits.element_size()
    harness.compare(benchmark, harness.Case(title, providers, check, floors, limit_s=10, bytes=size))
