"""mrope_positions against get_rope_index of the installed transformers, on random batches."""

from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel  # noqa: E402
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel  # noqa: E402
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel  # noqa: E402

from vlmkernels import mrope_positions  # noqa: E402

pytestmark = pytest.mark.device

# model class, and the arguments of mrope_positions
MODELS = {
    "qwen2_vl": (Qwen2VLModel, {}),
    "qwen2_5_vl": (Qwen2_5_VLModel, {"tokens_per_second": 4}),
    "qwen3_vl": (Qwen3VLModel, {"frames_apart": True}),
}


def theirs(model, types, **kwargs):
    """get_rope_index without a model: it reads only two numbers of the configuration."""
    cls = MODELS[model][0]
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = lambda *args, **kw: cls.get_vision_position_ids(stand_in, *args, **kw)
    return cls.get_rope_index(stand_in, torch.zeros_like(types, dtype=torch.int64), types, **kwargs)


def rounds_seconds() -> bool:
    """Versions of transformers before 5.18 round ``second_per_grid_ts`` down before they multiply."""
    types = torch.tensor([[0, 2, 2]])
    positions, _ = theirs("qwen2_5_vl", types, video_grid_thw=torch.tensor([[2, 2, 2]]), second_per_grid_ts=[0.5])
    return positions[0, 0].tolist() == [0, 1, 1]


def batch_of(sequences, frames_apart):
    """The token types of each sequence, a list of text lengths, images (h, w) and videos (t, h, w) in tokens; the grids."""
    rows, grids = [], {1: [], 2: []}
    for parts in sequences:
        row = [0]
        for part in parts:
            if isinstance(part, int):
                row += [0] * part
                continue
            kind = len(part) - 1
            t, h, w = (1, *part)[-3:]
            grids[kind].append([t, 2 * h, 2 * w])
            apart = kind == 2 and frames_apart
            for frames in [1] * t if apart else [t]:
                row += [kind] * (frames * h * w) + [0]
        rows.append(torch.tensor(row))
    return rows, *(torch.tensor(grids[kind]).view(-1, 3) if grids[kind] else None for kind in (1, 2))


SIDE = st.integers(1, 5)
PART = st.one_of(st.integers(1, 6), st.tuples(SIDE, SIDE), st.tuples(st.integers(1, 3), SIDE, SIDE))
SEQUENCES = st.lists(st.lists(PART, max_size=4), min_size=1, max_size=4)
SECONDS = st.sampled_from([None, 0.5, 1.0, 1.3, 2.0])


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=40, deadline=None)
@given(sequences=SEQUENCES, seconds=SECONDS, padding=st.sampled_from(["left", "right"]))
def test_equals_transformers(model, sequences, seconds, padding):
    options = dict(MODELS[model][1])
    rows, images, videos = batch_of(sequences, "frames_apart" in options)
    length = max(map(len, rows)) + 1
    pad = (lambda n: (n, 0)) if padding == "left" else (lambda n: (0, n))
    types = torch.stack([torch.nn.functional.pad(row, pad(length - len(row))) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), pad(length - len(row))) for row in rows])
    grids = {"image_grid_thw": images, "video_grid_thw": videos}
    their_options = {}
    if model == "qwen2_5_vl" and videos is not None and seconds is not None:
        seconds = float(int(seconds)) if rounds_seconds() else seconds
        options["second_per_grid_ts"] = their_options["second_per_grid_ts"] = torch.full((len(videos),), seconds)
    expected, deltas = theirs(model, types, attention_mask=mask, **grids, **their_options)
    actual = mrope_positions(types, **grids, attention_mask=mask, **options)
    assert torch.equal(actual.position_ids, expected)
    assert torch.equal(actual.deltas, deltas)

    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0, dtype=torch.int32)
    packed = mrope_positions(torch.cat(rows), **grids, cu_seqlens=bounds, **options)
    assert torch.equal(packed.position_ids, expected[:, mask.bool()])
    assert torch.equal(packed.deltas, deltas)


@pytest.mark.skipif(rounds_seconds(), reason=f"transformers {transformers.__version__} rounds seconds down")
def test_seconds_as_a_list():
    rows, _, videos = batch_of([[(3, 1, 1), 2, (3, 2, 1)]], frames_apart=False)
    seconds = [0.7, 1.9]
    expected, _ = theirs("qwen2_5_vl", rows[0][None], video_grid_thw=videos, second_per_grid_ts=seconds)
    actual = mrope_positions(rows[0][None], None, videos, tokens_per_second=4, second_per_grid_ts=seconds)
    assert torch.equal(actual.position_ids, expected)


def test_empty_sequences_and_batches():
    types = torch.tensor([0, 1, 0])
    grid = torch.tensor([[1, 2, 2]])
    packed = mrope_positions(types, grid, cu_seqlens=torch.tensor([0, 0, 3, 3]))
    assert packed.position_ids.tolist() == [[0, 1, 2]] * 3
    assert packed.deltas.tolist() == [[0], [0], [0]]
    assert mrope_positions(torch.zeros(0, 5, dtype=torch.int64)).position_ids.shape == (3, 0, 5)
    assert mrope_positions(torch.zeros(2, 0, dtype=torch.int64)).deltas.tolist() == [[0], [0]]


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu_without_waiting(model):
    options = MODELS[model][1]
    rows, images, videos = batch_of([[3, (2, 3), 1, (2, 2, 3)]] * 2, "frames_apart" in options)
    types = torch.stack(rows)
    expected = mrope_positions(types, images, videos, **options)
    on_gpu = types.cuda(), images.cuda(), videos.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = mrope_positions(*on_gpu, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def error_cases():
    types = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0]])
    grid = torch.tensor([[1, 2, 4], [1, 2, 4]])
    yield (
        "few grids",
        (types, grid[:1]),
        {},
        ValueError,
        "image_grid_thw must have a grid per run of image tokens, got 1 grids and 2 runs",
    )
    yield (
        "no grids",
        (types,),
        {},
        ValueError,
        "image_grid_thw must have a grid per run of image tokens, got 0 grids and 2 runs",
    )
    yield (
        "videos",
        (types, grid, grid),
        {},
        ValueError,
        "video_grid_thw must have a grid per run of video .*, got 2 grids and 0 runs",
    )
    wrong = torch.tensor([[1, 2, 4], [1, 4, 4]])
    rule = r"image_grid_thw\[1\] must be the grid of its tokens, got \(1, 2, 2\) tokens for a run of 2 in sequence 1"
    yield "size", (types, wrong), {}, ValueError, rule
    yield "grid shape", (types, grid[0, :2]), {}, ValueError, r"image_grid_thw must be \(n, 3\), got \(2,\)"
    yield "grid dtype", (types, grid.float()), {}, TypeError, "image_grid_thw must be integers, got float32"
    yield (
        "packed",
        (types, grid),
        {"cu_seqlens": torch.tensor([0, 8])},
        ValueError,
        r"mm_token_type_ids must be \(N,\) with cu_seq",
    )
    yield "padded", (types[0], grid), {}, ValueError, r"mm_token_type_ids must be \(B, S\) without cu_seqlens, got \(4,\)"
    mask = torch.ones(2, 3)
    yield (
        "mask",
        (types, grid),
        {"attention_mask": mask},
        ValueError,
        r"attention_mask must have the shape of .* \(2, 4\), got \(2, 3\)",
    )


ERRORS = {name: case for name, *case in error_cases()}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    args, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        mrope_positions(*args, **options)
