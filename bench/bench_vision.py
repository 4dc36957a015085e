"""Images to rows, and positions, against the processors and functions of transformers."""

from types import SimpleNamespace

import harness
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from vlmkernels import mrope_positions, pack_patches
from vlmkernels.models.image_processor import FastImageProcessor

NUM = 8
SIZES = {"patch_size": 14, "mean": Qwen2VLImageProcessor.image_mean, "std": Qwen2VLImageProcessor.image_std}

on_cpu = pytest.mark.skipif(harness.GPU, reason="the peers prepare images on the CPU")


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def compare_rows(benchmark, case, providers, expected, floors):
    """``expected``: the rows of transformers, by dtype. The table says how large the rows are: what is copied to a GPU."""

    def check(name, result):
        rows = result["pixel_values"] if isinstance(result, dict) else result
        error = (rows.float() - expected[rows.dtype].float()).abs().max().item()
        # PIL's resize and arithmetic round otherwise.
        assert error <= (0.1 if "PIL" in name else 0), f"{name} is wrong by {error}"
        return f"{error:.0e}, rows of {rows.numel() * rows.element_size() / 2**20:.0f} MiB"

    harness.compare(benchmark, case, providers, check, floors, limit_s=60)


@on_cpu
def test_pack_patches(benchmark):
    """No resize: what is left of a processor's work is one pass over the pixels."""
    images = list(noise(NUM, 3, 1344, 1344))
    torchvision, pil = Qwen2VLImageProcessor(do_resize=False), Qwen2VLImageProcessorPil(do_resize=False)
    exact = torchvision(images, return_tensors="pt")["pixel_values"]
    pixels = torchvision(images, do_rescale=False, do_normalize=False, temporal_patch_size=1)["pixel_values"]
    expected = {torch.float32: exact, torch.bfloat16: exact.bfloat16(), torch.uint8: pixels}

    def ours(dtype, out=None):
        once = 1 if dtype == torch.uint8 else 2
        return lambda: pack_patches(images, **SIZES, temporal_patch_size=once, dtype=dtype, out=out).pixel_values

    providers = {f"vlmkernels, {str(dtype)[6:]}": ours(dtype) for dtype in expected}
    for dtype, rows in expected.items():
        providers[f"vlmkernels, {str(dtype)[6:]} into out="] = ours(dtype, torch.empty_like(rows))
    providers["transformers, torchvision"] = lambda: dict(torchvision(images, return_tensors="pt"))
    providers["transformers, PIL"] = lambda: dict(pil(images, return_tensors="pt"))
    buffer = torch.empty_like(exact)
    floors = {"write the float32 rows": lambda: buffer.fill_(1.0), "write the bfloat16 rows": lambda: buffer[::2].fill_(1.0)}
    compare_rows(benchmark, f"pack_patches {NUM} x 1344 x 1344", providers, expected, floors)


@on_cpu
def test_processor(benchmark):
    """Photographs of 1600 x 1200 made smaller by smart_resize, as a data set gives them."""
    images = [Image.fromarray(image.numpy()) for image in noise(NUM, 1600, 1200, 3)]
    processors = {
        "vlmkernels FastImageProcessor": FastImageProcessor(),
        "transformers, torchvision": Qwen2VLImageProcessor(),
        "transformers, PIL": Qwen2VLImageProcessorPil(),
    }
    providers = {name: lambda p=p: dict(p(images, return_tensors="pt")) for name, p in processors.items()}
    exact = providers["transformers, torchvision"]()["pixel_values"]
    buffer = torch.empty_like(exact)
    floors = {"write the float32 rows": lambda: buffer.fill_(1.0)}
    compare_rows(benchmark, f"processor {NUM} x 1600 x 1200", providers, {torch.float32: exact}, floors)


def test_mrope_positions(benchmark):
    """64 sequences of four images of 4 x 4 to 12 x 12 tokens, padded on the left."""
    rng, rows, grids = torch.Generator().manual_seed(0), [], []
    for _ in range(64):
        row = []
        for height, width in torch.randint(4, 13, (4, 2), generator=rng).tolist():
            row += [0] * 20 + [1] * (height * width)
            grids.append([1, 2 * height, 2 * width])
        rows.append(torch.tensor(row + [0] * 60))
    length = max(map(len, rows))
    pad = lambda row: torch.nn.functional.pad(row, (length - len(row), 0))  # noqa: E731
    types = torch.stack([pad(row) for row in rows]).to(harness.DEVICE)
    mask = torch.stack([pad(torch.ones_like(row)) for row in rows]).to(harness.DEVICE)
    grid = torch.tensor(grids).to(harness.DEVICE)

    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    model.get_vision_position_ids = lambda *args, **kwargs: Qwen2VLModel.get_vision_position_ids(model, *args, **kwargs)
    providers = {
        "vlmkernels": lambda: mrope_positions(types, grid, attention_mask=mask),
        "transformers get_rope_index": lambda: Qwen2VLModel.get_rope_index(
            model, types, types, image_grid_thw=grid, attention_mask=mask
        ),
    }
    expected = providers["transformers get_rope_index"]()

    def check(name, result):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), f"{name} is wrong"
        return "none"

    positions = torch.empty_like(expected[0])
    floors = {"write the positions": lambda: positions.fill_(1)}
    harness.compare(benchmark, f"mrope_positions 64 x {length}, 4 images each", providers, check, floors)
