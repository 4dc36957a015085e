"""linear_logps without logits (chunk_bytes=0) against the fp64 reference, with one split of the vocabulary and with several."""

import pytest
import torch
from support.budget import assert_within_budget
from support.linear_cases import make

from vlmkernels import linear_grpo_loss, linear_logps
from vlmkernels.backend import load
from vlmkernels.ops.linear_logps import fused as linear_logps_fused
from vlmkernels.ops.linear_logps.inputs import SelectedRows
from vlmkernels.ops.linear_logps.sweep import Head

pytestmark = pytest.mark.device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUSED = {"backend": "triton", "chunk_bytes": 0}


@pytest.fixture
def fused(need, device):
    """The Triton module, if it runs here."""
    need("linear_logps_fused", "triton", torch.zeros(1, 1, device=device))
    return load("linear_logps_fused", "triton")


def check(operands, targets, **options):
    """logp and entropy against fp64, within the error of the fp32 reference: no logit is rounded to 16 bits."""

    def run(dtype, **how):
        hidden, weight, bias = (x if x is None else x.to(dtype or x.dtype) for x in operands)
        return linear_logps(hidden, weight, targets, bias=bias, return_entropy=True, **options, **how)

    results = run(None, **FUSED), run(torch.float32, backend="reference"), run(torch.float64, backend="reference")
    scale = max(1.0, results[2][0].abs().max().item()) if targets.numel() else 1.0
    for name, *values in zip(("logp", "entropy"), *results, strict=True):
        assert_within_budget(name, *values, scale=scale)
    return results[0]


@pytest.mark.parametrize("processors", [1, 7])  # one split of the vocabulary, and several
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [((1,), 2, 1), ((2, 3), 7, 5), ((21,), 1003, 33), ((130,), 256, 64)],  # odd; several blocks of rows, whole ones of V and H
)
def test_matches_fp64(fused, device, monkeypatch, nan_filled, processors, dtype, rows, vocab, width):
    monkeypatch.setattr(fused, "processors", lambda _: processors)
    operands, targets = make(rows, vocab, width, dtype, device)
    check(operands, targets, temperature=0.7)
    check([*operands[:2], None], targets, temperature=1.3, logit_scale=0.5, softcap=4.0)


@pytest.mark.parametrize(("width", "aligned"), [(64, True), (40, True), (36, False)])  # in rows of 16 bytes, or not
def test_weights_by_tensor_descriptors(fused, device, monkeypatch, nan_filled, width, aligned):
    """The last blocks of V and H may have any size. If a descriptor does not support the weight, none is used."""
    made = []
    new = fused.TensorDescriptor.from_tensor
    monkeypatch.setattr(fused.TensorDescriptor, "from_tensor", lambda *args: made.append(args) or new(*args))
    operands, targets = make((5,), 301, width, torch.bfloat16, device)
    results = []
    for tma in (False, True):
        monkeypatch.setattr(fused, "blocks_of", lambda *_, tma=tma: fused.ELSEWHERE._replace(tma=tma))
        results.append(check(operands, targets, temperature=0.7))
    assert len(made) == aligned
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("level", [-3e4, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_all_strongly_negative_or_positive(fused, device, monkeypatch, dtype, level):
    """All logits are far below 0: a running maximum that started at 0 would give NaN."""
    monkeypatch.setattr(fused, "processors", lambda _: 3)
    (hidden, weight, _), targets = make((5,), 1003, 16, dtype, device, bias=False)
    bias = torch.full((1003,), level, device=device).to(dtype)
    logp, entropy = check([hidden, weight, bias], targets)
    assert logp.isfinite().all()
    assert entropy.isfinite().all()


def test_tokens_that_are_impossible(fused, device, monkeypatch):
    """Whole splits of the vocabulary at -inf: only their tokens are impossible."""
    monkeypatch.setattr(fused, "processors", lambda _: 8)
    (hidden, weight, bias), targets = make((5,), 1003, 16, torch.float32, device)
    bias[128:900] = -torch.inf
    targets[:] = torch.tensor([0, 127, 950, 1002, 500], device=device)
    (logp, entropy), expected = (
        linear_logps(hidden, weight, targets, bias=bias, return_entropy=True, **how)
        for how in (FUSED, {"backend": "reference"})
    )
    torch.testing.assert_close((logp, entropy), expected)
    assert logp.isneginf().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("selection", ["mask", "rows", "rows+mask", "none selected"])
def test_only_selected_results_are_computed(fused, device, nan_filled, selection):
    """Rows without a result are not read (they are NaN here)."""
    operands, targets = make((12,), 301, 16, torch.bfloat16, device)
    selected = torch.ones(12, dtype=torch.bool, device=device)
    options, index = {}, torch.arange(12, device=device)
    if selection.startswith("rows"):
        index = options["rows"] = torch.tensor([7, 2, 2, 11, 2, 0, 7], device=device)
        targets = targets[:7]
        selected = selected[:7]
    if selection != "rows":
        selected = options["mask"] = (torch.arange(len(targets), device=device) % 3 > 0) & (selection != "none selected")
        targets = targets.masked_fill(~selected, -100)
    used = torch.zeros(12, dtype=torch.bool, device=device)
    used[index[selected]] = True
    operands[0][~used] = torch.nan
    logp, entropy = check(operands, targets, **options)
    assert logp[~selected].eq(0).all()
    assert entropy[~selected].eq(0).all()


def test_strides(fused, device):
    (hidden, weight, bias), targets = make((3, 5), 50, 8, torch.bfloat16, device)
    expected = linear_logps(hidden[:, :-1].contiguous(), weight, targets[:, :-1], bias=bias, **FUSED)
    for view in (hidden, hidden.transpose(0, 1).contiguous().transpose(0, 1), hidden.mT.contiguous().mT):
        for head in (weight, weight.T.contiguous().T):
            assert torch.equal(linear_logps(view[:, :-1], head, targets[:, :-1], bias=bias, **FUSED), expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty(fused, device, shape):
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    hidden, weight = torch.zeros(*shape, 4, device=device), torch.ones(5, 4, device=device)
    logp, entropy = linear_logps(hidden, weight, targets, return_entropy=True, **FUSED)
    assert logp.shape == entropy.shape == shape


def test_a_part_of_the_vocabulary(fused, device):
    """The results that VocabParallel gathers: the softmax of the shard, and -inf for the targets of other shards."""
    (hidden, weight, bias), targets = make((6,), 301, 16, torch.float32, device)
    targets[:] = torch.tensor([0, 99, 100, 200, 201, 300], device=device)
    inputs = (hidden, weight[100:201], bias[100:201], targets, None, None, 0.8, 1.0, None, 100, 301)
    results = [
        torch.ops.vlmkernels.linear_logps_fwd(*inputs, size, 0, 0, name)[:3]
        for size, name in ((0, "triton"), (2**20, "reference"))
    ]
    torch.testing.assert_close(*results)
    assert results[0][0].isfinite().tolist() == [False, False, True, True, False, False]


def test_opcheck(fused, device):
    (hidden, weight, bias), targets = make((2, 3), 20, 4, torch.float32, device)
    inputs = (hidden, weight, bias, targets, targets > 3, None, 0.7, 1.0, None, 0, 20, 0, 0, 0, "triton")
    torch.library.opcheck(torch.ops.vlmkernels.linear_logps_fwd, inputs, test_utils=("test_schema", "test_faketensor"))


def test_gradients_need_logits(device):
    (hidden, weight, _), targets = make((3,), 20, 4, torch.float32, device, bias=False)
    weight.requires_grad_()
    for function in (
        linear_logps,
        lambda *args, **how: linear_grpo_loss(args[0][None], weight, targets[None], targets[:1] * 1.0, **how),
    ):
        with pytest.raises(
            ValueError, match="chunk_bytes must hold one row of logits, 80 bytes, if a gradient is needed, got 0"
        ):
            function(hidden, weight, targets, **FUSED)


def test_a_named_backend_without_it_is_refused(device):
    (hidden, weight, _), targets = make((3,), 20, 4, torch.float32, device, bias=False)
    with pytest.raises(NotImplementedError, match="no backend serves linear_logps_fused: reference: not implemented"):
        linear_logps(hidden, weight, targets, chunk_bytes=0, backend="reference")


def test_it_is_chosen_only_where_it_was_measured_to_be_faster(fused, device, monkeypatch):
    chosen = []
    monkeypatch.setattr(fused, "fwd", lambda hidden, *_: chosen.append(len(hidden)))
    (hidden, weight, _), targets = make((4,), 20, 4, torch.float32, device, bias=False)
    head = weight.clone().requires_grad_()
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    for table in ({}, {(capability, torch.bfloat16): 1}, {(capability, torch.float32): 4}):
        monkeypatch.setattr(linear_logps_fused, "FASTER_FROM", table)
        linear_logps(hidden, weight, targets, backend="triton")
        linear_logps(hidden[:3], weight, targets[:3], backend="triton")  # too few rows
        linear_logps(hidden, head, targets, backend="triton")  # which needs a gradient
        linear_logps(hidden, weight, targets, backend="reference")
        linear_logps(hidden, weight, targets, backend="triton", chunk_bytes=80)
    assert chosen == [4]
    compiled = torch.compile(lambda h: linear_logps(h, weight, targets, backend="triton"), fullgraph=True, backend="eager")
    compiled(hidden)
    assert chosen == [4]


def test_fp32_master_weight(fused, device):
    (hidden, weight, _), targets = make((3,), 20, 4, torch.bfloat16, device, bias=False)
    with torch.no_grad():
        master = weight.float().requires_grad_()
        assert torch.equal(linear_logps(hidden, master, targets, **FUSED), linear_logps(hidden, weight, targets, **FUSED))


def test_splits_fill_the_processors(fused):
    """For 151936 tokens in blocks of 256 on 132 processors, the time is close to that of evenly divided work."""
    for row_blocks in (1, 2, 16, 64, 1000):
        splits = fused.splits_of(row_blocks, 594, 132)
        time = -(-row_blocks * splits // 132) * -(-594 // splits)
        assert time < 1.15 * row_blocks * 594 / 132
    assert fused.splits_of(1, 16, 7) > 1
    assert fused.splits_of(1, 16, 1) == fused.splits_of(1, 1, 132) == 1


def test_every_program_has_a_part_of_its_own(fused, device, monkeypatch):
    """Several groups of row blocks, the last one smaller, each with several splits."""
    monkeypatch.setattr(fused, "processors", lambda _: 132)
    monkeypatch.setattr(fused, "GROUP", 2)
    (hidden, weight, _), targets = make((7 * fused.FP32.rows - 5,), 70, 2, torch.float32, device, bias=False)
    logp = torch.full((3, len(targets)), torch.nan, device=device)
    selected = SelectedRows(targets, logp[0], logp[1], logp.new_empty(len(targets), 2))
    fused.fwd(hidden, None, selected, Head(weight, None, 1.0, 1.0, None))
    expected = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logp[0].double(), expected, rtol=1e-5, atol=1e-5)
