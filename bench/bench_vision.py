"""Packing of patches, merging of features, positions, rotary embeddings and attention of images, compared with transformers."""

import functools
import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLModel,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from vlmkernels import backend, merge_image_features, mrope_positions, pack_patches, placeholder_positions
from vlmkernels.models.image_processor import FastImageProcessor
from vlmkernels.models.rotary import fused_text_rotary, fused_vision_rotary
from vlmkernels.ops.decode_image import map_on_threads
from vlmkernels.ops.varlen_attention import varlen_attention

PEERS = Path(sys.prefix) / "peers"  # see the Makefile
NUM = 8
SIZES = {"patch_size": 14, "mean": Qwen2VLImageProcessor.image_mean, "std": Qwen2VLImageProcessor.image_std}

on_cpu = pytest.mark.skipif(harness.GPU, reason="the peers prepare images on the CPU")


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def compare_rows(benchmark, case, providers, expected, floors, bytes=None):
    """Compare patch rows with ``expected``, the rows of transformers by dtype. The table also has the size of the rows."""

    def check(name, result):
        rows = result["pixel_values"] if isinstance(result, dict) else result
        error = (rows.float() - expected[rows.dtype].float()).abs().max().item()
        # PIL resizes and rounds differently, and so may the GPU.
        tolerance = 0.1 if "PIL" in name else 1e-5 if name.startswith("transformers") and rows.is_cuda else 0
        assert error <= tolerance, f"{name} is wrong by {error}"
        return f"{error:.0e}, rows of {rows.numel() * rows.element_size() / 2**20:.0f} MiB"

    harness.compare(benchmark, harness.Case(case, providers, check, floors, limit_s=60, bytes=bytes))


@on_cpu
def test_pack_patches(benchmark):
    """Without resizing, the work of a processor is one pass over the pixels."""
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


@pytest.mark.skipif(not harness.GPU, reason="needs a GPU")
def test_pack_patches_on_device(benchmark):
    """The same with images on the GPU. Useful bytes: the pixels and the written rows."""
    on_host = list(noise(NUM, 3, 1344, 1344))
    images = [image.to(harness.DEVICE) for image in on_host]
    processor = Qwen2VLImageProcessor(do_resize=False)
    exact = processor(on_host, return_tensors="pt")["pixel_values"].to(harness.DEVICE)
    expected = {torch.bfloat16: exact.bfloat16(), torch.float32: exact}
    names = harness.backends("pack_patches", images[0])

    providers, bytes = {}, {}
    for dtype, rows in expected.items():
        written = rows.numel() * rows.element_size() + sum(image.numel() for image in images)
        buffer = torch.empty_like(rows)
        for name in names:
            for suffix, out in (("", None), (" into out=", buffer)):
                options = {**SIZES, "dtype": dtype, "out": out, "backend": name}
                title = f"vlmkernels {name}, {str(dtype)[6:]}{suffix}"
                providers[title] = lambda options=options: pack_patches(images, **options).pixel_values
                bytes[title] = written
    on_device = {"return_tensors": "pt", "device": harness.DEVICE}
    on_gpu, on_cpu = "transformers, torchvision on the GPU", "transformers, torchvision on the CPU, rows copied to the GPU"
    providers[on_gpu] = lambda: dict(processor(images, **on_device))
    providers[on_cpu] = lambda: processor(on_host, return_tensors="pt")["pixel_values"].to(harness.DEVICE)
    bytes |= {on_gpu: written, on_cpu: written}
    rows = torch.empty_like(expected[torch.bfloat16])
    floors = {"write the bfloat16 rows": lambda: rows.fill_(1.0)}
    bytes["write the bfloat16 rows"] = rows.numel() * rows.element_size()
    compare_rows(benchmark, f"pack_patches {NUM} x 1344 x 1344 on the GPU", providers, expected, floors, bytes)


@on_cpu
def test_processor(benchmark):
    """Photographs of 1600 x 1200 from a dataset, which smart_resize makes smaller."""
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


def jpeg_files(num, height, width):
    """The contents of ``num`` JPEG files of quality 90: real photographs side by side, in the resolution of the camera."""
    row = np.concatenate(pytest.importorskip("sklearn.datasets").load_sample_images().images, 1)
    photo = np.tile(row, (-(-height // row.shape[0]), -(-width // row.shape[1]), 1))[:height, :width]
    files = [io.BytesIO() for _ in range(num)]
    for shift, file in enumerate(files):
        Image.fromarray(np.roll(photo, 31 * shift, 0)).save(file, "JPEG", quality=90)
    return [file.getvalue() for file in files]


def hf_processors_rs(settings):
    """The processor of hf-processors-rs, for encoded images; None if it is not installed."""
    name = "hf_processors_rs"
    if importlib.util.find_spec(name) is None and (PEERS / name).is_dir():
        sys.path.append(str(PEERS))
    if importlib.util.find_spec(name) is None:
        return None
    processor = importlib.import_module(name).AutoImageProcessor.from_dict(settings)
    return lambda files: {"pixel_values": torch.from_numpy(processor(files)["pixel_values"])}


# The limit of the number of pixels, and the size of the photographs.
FILES = {
    "not resized": (28 * 28 * 16384, 1344, 1344),
    "resized to 980 x 980": (28 * 28 * 1280, 1344, 1344),
}


@on_cpu
@pytest.mark.parametrize("case", FILES)
def test_jpeg_files(benchmark, case):
    """From the contents of JPEG files to the rows of patches."""
    longest, height, width = FILES[case]
    files = jpeg_files(NUM, height, width)
    settings = {"size": {"shortest_edge": 56 * 56, "longest_edge": longest}}
    fast, torchvision, pil = (p(**settings) for p in (FastImageProcessor, Qwen2VLImageProcessor, Qwen2VLImageProcessorPil))

    def opened(processor):
        return dict(processor([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt"))

    def by(decoder):
        with backend.use_backend(decoder):
            return dict(fast(files, return_tensors="pt"))

    exact = opened(torchvision)["pixel_values"]
    expected = {torch.float32: exact, torch.uint8: pixels_of(fast, files)}
    providers = {"vlmkernels FastImageProcessor": lambda: by("auto"), "vlmkernels, uint8": lambda: pixels_of(fast, files)}
    providers["vlmkernels, decoder pillow"] = lambda: by("pillow")
    providers["transformers, torchvision"] = lambda: opened(torchvision)
    providers["transformers, PIL"] = lambda: opened(pil)
    if peer := hf_processors_rs(torchvision.to_dict()):
        providers["hf-processors-rs"] = lambda: peer(files)
    buffer = torch.empty_like(exact)
    floors = {"write the float32 rows": lambda: buffer.fill_(1.0)}
    if backend.installed("simplejpeg"):
        import simplejpeg

        floors["decode with simplejpeg"] = lambda: map_on_threads(
            functools.partial(simplejpeg.decode_jpeg, colorspace="RGB"), files
        )
    compare_rows(benchmark, f"jpeg {NUM} files {height} x {width}, {case}", providers, expected, floors)


def pixels_of(processor, images):
    """Rows of uint8 pixels, each frame once, which models read after ``use_vision_ops``."""
    options = {"do_rescale": False, "do_normalize": False, "temporal_patch_size": 1}
    return processor(images, return_tensors="pt", **options)["pixel_values"]


@on_cpu
def test_rows_with_jpeg_files(benchmark):
    """The images of 16 rows of a dataset, read as in training, to the rows of patches in uint8."""
    from vlmkernels.data.dataset import SampleDataset

    files = jpeg_files(16, 1344, 1344)
    dataset = SampleDataset([{"prompt": "?", "image": {"bytes": file, "path": None}} for file in files], "dataset")
    processor = FastImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})

    def read_in_batches():
        return pixels_of(processor, [sample.images[0] for _, sample in dataset.__getitems__(range(16))])

    def read_one_by_one():
        with backend.use_backend("pillow"):
            return pixels_of(processor, [dataset[index][1].images[0] for index in range(16)])

    def by_pil():
        images = [ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB") for file in files]
        return pixels_of(Qwen2VLImageProcessor(size=processor.size), images)

    providers = {
        "vlmkernels": read_in_batches,
        "vlmkernels, one by one with PIL": read_one_by_one,
        "PIL and transformers": by_pil,
    }
    compare_rows(benchmark, "jpeg 16 rows of a dataset, 1344 x 1344", providers, {torch.uint8: by_pil()}, {})


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
    padded = [torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows]
    types = torch.stack(padded).to(harness.DEVICE)
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long().to(harness.DEVICE)
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
    harness.compare(benchmark, harness.Case(f"mrope_positions 64 x {length}, 4 images each", providers, check, floors))


def relative_error(actual, expected):
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


def test_merge_image_features(benchmark):
    """Forward and backward: four prompts of 1024 tokens, 64 of them text; a hidden size of 2048 in bf16."""
    image_token, width = 7, 2048
    ids = torch.full((4, 1024), image_token)
    ids[:, :64] = 1
    num_features = (ids == image_token).sum(1)
    rng = torch.Generator().manual_seed(0)
    embeddings, features = (
        torch.randn(*shape, width, generator=rng).to(harness.DEVICE, torch.bfloat16).requires_grad_()
        for shape in (ids.shape, (int(num_features.sum()),))
    )
    positions = placeholder_positions(ids, image_token, num_features).to(harness.DEVICE)  # once per batch
    on_device = ids.to(harness.DEVICE)

    def masked_scatter():
        """The code of transformers' models, with their check of the number of features."""
        mask = (on_device == image_token).unsqueeze(-1).expand_as(embeddings)
        assert embeddings[mask].numel() == features.numel()
        return embeddings.masked_scatter(mask, features)

    def with_gradients(merge):
        merged = merge()
        return merged.detach(), *torch.autograd.grad(merged, (embeddings, features), merged.detach())

    forwards = {
        "vlmkernels": lambda: merge_image_features(embeddings, features, positions),
        "vlmkernels, positions too": lambda: merge_image_features(
            embeddings, features, placeholder_positions(ids, image_token, num_features).to(harness.DEVICE)
        ),
        "transformers masked_scatter": masked_scatter,
    }
    providers = {name: lambda f=f: with_gradients(f) for name, f in forwards.items()}
    expected = providers["transformers masked_scatter"]()

    def check(name, result):
        assert all(torch.equal(a, e) for a, e in zip(result, expected, strict=True)), f"{name} is wrong"
        return "none"

    buffer = torch.empty_like(embeddings)
    floors = {"copy the embeddings twice": lambda: [buffer.data.copy_(embeddings.data) for _ in range(2)]}
    size = embeddings.numel() * embeddings.element_size()
    bytes = dict.fromkeys(providers, 4 * size + features.numel() * features.element_size()) | dict.fromkeys(floors, 4 * size)
    harness.compare(benchmark, harness.Case("merge_image_features 4 x 1024 x 2048", providers, check, floors, bytes=bytes))


# (leading axes), heads of query and key, features of a head
ROTARY = {
    "rotary vision 4096 x 16 x 80": (4096, 16, 16, 80),  # the tower of Qwen2.5-VL, one image of 896 x 896
    "rotary text 2048 x 16 + 2 x 128": (2048, 16, 2, 128),  # Qwen2.5-VL 3B
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary(benchmark, case):
    """Forward and backward for the queries and keys of a layer in bf16, laid out as in the attention modules."""
    num, query_heads, key_heads, width = ROTARY[case]
    rng = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=rng).to(harness.DEVICE)

    angles = noise(num, width // 2).repeat(1, 2)
    if "vision" in case:
        qkv = noise(num, 3, query_heads, width).bfloat16()
        query, key, _ = qkv.unbind(1)
        tables = angles.cos(), angles.sin()
        ours, theirs = fused_vision_rotary, apply_rotary_pos_emb_vision
    else:
        query, key = (noise(1, num, heads, width).bfloat16().transpose(1, 2) for heads in (query_heads, key_heads))
        tables = angles.cos().bfloat16().unsqueeze(0), angles.sin().bfloat16().unsqueeze(0)
        ours, theirs = fused_text_rotary, apply_rotary_pos_emb
    query.requires_grad_()
    key.requires_grad_()

    def with_gradients(rotate):
        outputs = rotate(query, key, *tables)
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, (query, key), [x.detach() for x in outputs])

    functions = {"vlmkernels": ours, "transformers": theirs, "torch.compile of it": torch.compile(theirs)}
    providers = {name: lambda f=f: with_gradients(f) for name, f in functions.items()}
    double = [x.detach().double() for x in (query, key)]
    exact = theirs(*double, *(table.double() for table in tables))

    def check(name, result):
        error = relative_error(result[:2], exact)
        assert error < 0.02, f"{name} is wrong by {error}"
        return f"{error:.0e}"

    buffers = [torch.empty_like(x) for x in (query.detach(), key.detach())]

    def copy():
        for _ in range(2):
            for buffer, x in zip(buffers, (query, key), strict=True):
                buffer.copy_(x.detach())

    bytes = 4 * sum(x.numel() * x.element_size() for x in buffers)
    harness.compare(benchmark, harness.Case(case, providers, check, {"copy both twice": copy}, bytes=bytes))


# lengths of the sequences, heads, head dimension, dtype
VARLEN = {
    "qwen3-vl, images of 4900, 2500 and 1600 patches": ((4900, 2500, 1600), 16, 72, torch.bfloat16),
    "qwen2.5-vl, 141 windows of 64 patches": ((64,) * 141, 16, 80, torch.bfloat16),
}
if not harness.GPU:
    VARLEN = {"images of 400, 256 and 144 patches": ((400, 256, 144), 4, 32, torch.float32)}


@pytest.mark.parametrize("case", VARLEN)
def test_varlen_attention(benchmark, case):
    """Forward and backward of the attention of a vision tower, compared with a call per sequence, as in transformers."""
    lengths, heads, width, dtype = VARLEN[case]
    rng, num, longest = torch.Generator().manual_seed(0), sum(lengths), max(lengths)
    *inputs, weight = (torch.randn(num, heads, width, generator=rng).to(harness.DEVICE, dtype) for _ in range(4))
    for x in inputs:
        x.requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(harness.DEVICE)

    def per_sequence(query, key, value):
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (query, key, value)), strict=True)
        return torch.cat([scaled_dot_product_attention(*part) for part in parts], 2)[0].transpose(0, 1)

    def with_gradients(attention, inputs, weight=weight):
        out = attention(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, weight)

    def exact_results():
        """In fp64, one head after another."""
        results = [torch.empty_like(x, dtype=torch.float64) for x in (*inputs, weight)]
        for head in range(heads):
            one = slice(head, head + 1)
            leaves = [x.detach()[:, one].double().requires_grad_() for x in inputs]
            with sdpa_kernel(SDPBackend.MATH):
                found = with_gradients(per_sequence, leaves, weight[:, one].double())
            for result, part in zip(results, found, strict=True):
                result[:, one] = part
        return results

    exact = exact_results()

    def ours(name):
        return functools.partial(varlen_attention, cu_seqlens=cu_seqlens, max_seqlen=longest, backend=name)

    names = harness.backends("varlen_attention", inputs[0])
    providers = {f"vlmkernels {name}": functools.partial(with_gradients, ours(name), inputs) for name in names}
    providers["a call of SDPA per sequence"] = lambda: with_gradients(per_sequence, inputs)

    def check(name, result):
        error = relative_error([x.double() for x in result], exact)
        assert error < 0.02, f"{name} is wrong by {error}"
        return f"{error:.0e}"

    flops = 12 * heads * width * sum(length * length for length in lengths)
    harness.compare(benchmark, harness.Case(f"varlen_attention {case}", providers, check, limit_s=10, flops=flops))
