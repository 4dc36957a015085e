"""pack_patches: every backend against the transformers processors or, for other inputs, the reference; bitwise."""

import io

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

from vlmkernels import backend as backends
from vlmkernels import pack_patches

pytestmark = pytest.mark.device

KERNELS = ["cpp", "triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(*shape, seed=0, device="cpu"):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).to(device)


def photos(patch_size):
    """(3, H, W) crops of a real photograph, of 4 x 6 and 2 x 2 patches."""
    datasets = pytest.importorskip("sklearn.datasets")
    photo = torch.from_numpy(datasets.load_sample_images().images[0].copy()).permute(2, 0, 1)
    return [photo[:, : 4 * patch_size, : 6 * patch_size], photo[:, -2 * patch_size :, -2 * patch_size :]]


@pytest.fixture
def on_device(device):
    """Images on the device that the backend supports: the CPU for "cpp"."""

    def move(backend, images):
        target = "cpu" if backend == "reference" or backends.device_type(backend) == "cpu" else device
        return [image.to(target) for image in images]

    return move


@pytest.fixture
def long_blocks(monkeypatch, device, backend):
    """One block per row: Triton's interpreter takes as long for a short block as for a long one."""
    if backend == "triton" and device == "cpu":
        monkeypatch.setattr("vlmkernels.ops.pack_patches.triton.BLOCK_F", 2048)


def check(actual, expected):
    assert actual.pixel_values.dtype == expected.pixel_values.dtype
    assert torch.equal(actual.pixel_values.cpu(), expected.pixel_values.cpu())
    assert torch.equal(actual.image_grid_thw, expected.image_grid_thw)
    assert torch.equal(actual.cu_seqlens.cpu(), expected.cu_seqlens.cpu())


@pytest.mark.parametrize("backend", KERNELS)
def test_every_backend_is_tested(backend, device):
    """A backend that this machine can run is not skipped below."""
    if device == "cuda" and backend == "cpp":
        assert "supports cpu tensors" in backends.why_not("pack_patches", backend, torch.zeros(1, device=device))
    else:
        assert backends.why_not("pack_patches", backend, torch.zeros(1, device=device)) is None


# ---- the processors of transformers: their fp32 rows, rounded ----


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch_size", [14, 16])  # Qwen2-VL and 2.5-VL; Qwen3-VL
def test_qwen_images(need, on_device, nan_filled, backend, dtype, patch_size):
    transformers = pytest.importorskip("transformers")
    images = [*photos(patch_size), noise(3, 2 * patch_size, 4 * patch_size)]
    need("pack_patches", backend, *on_device(backend, images))
    processor = transformers.Qwen2VLImageProcessor(patch_size=patch_size, do_resize=False)
    floating = dtype != torch.uint8
    expected = processor(images, do_rescale=floating, do_normalize=floating, return_tensors="pt")
    actual = pack_patches(
        on_device(backend, images),
        patch_size=patch_size,
        mean=processor.image_mean,
        std=processor.image_std,
        dtype=dtype,
        backend=backend,
    )
    assert torch.equal(actual.pixel_values.cpu(), expected["pixel_values"].to(dtype))
    assert torch.equal(actual.image_grid_thw, expected["image_grid_thw"])
    sizes = expected["image_grid_thw"].prod(-1).tolist()
    assert actual.cu_seqlens.tolist() == [0, *torch.tensor(sizes).cumsum(0).tolist()]


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("frames", [1, 4, 5])  # 1 and 5: the last frame is repeated
def test_qwen_videos(need, on_device, nan_filled, long_blocks, backend, frames):
    transformers = pytest.importorskip("transformers")
    videos = [noise(frames, 3, 56, 84), noise(frames + 1, 3, 28, 28)]
    need("pack_patches", backend, *on_device(backend, videos))
    processor = transformers.Qwen2VLVideoProcessor(do_resize=False, cap_pixels_per_frame=False)
    expected = processor(videos, return_tensors="pt")
    actual = pack_patches(on_device(backend, videos), patch_size=14, mean=MEAN, std=STD, backend=backend)
    assert torch.equal(actual.pixel_values.cpu(), expected["pixel_values_videos"])
    assert torch.equal(actual.image_grid_thw, expected["video_grid_thw"])
    grid_t, grid_h, grid_w = actual.image_grid_thw.unbind(-1)
    lengths = (grid_h * grid_w).repeat_interleave(grid_t)  # a frame group attends to itself
    assert torch.equal(actual.cu_seqlens.cpu().diff(), lengths.int())


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_siglip2_naflex(need, on_device, nan_filled, backend):
    transformers = pytest.importorskip("transformers")
    images = [*photos(16), noise(3, 48, 16)]
    need("pack_patches", backend, *on_device(backend, images))
    processor = transformers.Siglip2ImageProcessor(do_resize=False, max_num_patches=24)
    expected = processor(images, return_tensors="pt")
    actual = pack_patches(
        on_device(backend, images),
        patch_size=16,
        mean=processor.image_mean,
        std=processor.image_std,
        layout="siglip2_naflex",
        backend=backend,
    )
    assert torch.equal(actual.pixel_values.cpu(), expected["pixel_values"][expected["pixel_attention_mask"].bool()])
    assert torch.equal(actual.image_grid_thw[:, 1:], expected["spatial_shapes"])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_pixtral(need, on_device, nan_filled, backend):
    """The processor of Pixtral returns whole images. The rows are the windows of the tower's convolution over them."""
    transformers = pytest.importorskip("transformers")
    images = [noise(3, 48, 32, seed=1), noise(3, 32, 64, seed=2)]
    need("pack_patches", backend, *on_device(backend, images))
    processor = transformers.PixtralImageProcessor(do_resize=False)
    padded = processor(images, return_tensors="pt")["pixel_values"]
    actual = pack_patches(
        on_device(backend, images),
        patch_size=16,
        mean=processor.image_mean,
        std=processor.image_std,
        layout="pixtral",
        backend=backend,
    )
    whole = [p[None, :, : x.shape[1], : x.shape[2]] for p, x in zip(padded, images, strict=True)]
    windows = [torch.nn.functional.unfold(x, 16, stride=16)[0].T for x in whole]
    assert torch.equal(actual.pixel_values.cpu(), torch.cat(windows))
    assert actual.image_grid_thw.tolist() == [[1, 3, 2], [1, 2, 4]]


@pytest.mark.parametrize("mean_std", [(MEAN, STD), (None, None)], ids=["normalized", "rescaled only"])
@pytest.mark.parametrize("rescale", [1 / 255, 1 / 127.5, 1.0])
def test_every_pixel_value(mean_std, rescale):
    """All 256 values of each channel, for any constants."""
    transformers = pytest.importorskip("transformers")
    mean, std = mean_std
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    processor = transformers.Qwen2VLImageProcessor(
        patch_size=8, do_resize=False, rescale_factor=rescale, do_normalize=mean is not None, image_mean=mean, image_std=std
    )
    expected = processor([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(pack_patches([image], patch_size=8, mean=mean, std=std, rescale=rescale).pixel_values, expected)


# ---- inputs that a processor does not support ----


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("qwen2_vl", {"patch_size": 14, "temporal_patch_size": 1}),  # uint8 rows that store a still image once
        ("qwen2_vl", {"patch_size": 16, "merge_size": 1}),
        ("qwen2_vl", {"patch_size": 4, "merge_size": 3, "temporal_patch_size": 3}),
        ("qwen2_vl", {"patch_size": 3}),  # an odd number of values per channel
        ("qwen2_vl", {"patch_size": 1, "merge_size": 1}),
        ("siglip2_naflex", {"patch_size": 14}),
        ("siglip2_naflex", {"patch_size": 3}),
        ("pixtral", {"patch_size": 5}),
    ],
)
def test_sizes(need, on_device, nan_filled, backend, dtype, layout, sizes):
    multiple = sizes["patch_size"] * sizes.get("merge_size", 2 if layout == "qwen2_vl" else 1)
    images = [noise(h * multiple, w * multiple, 3, seed=h) for h, w in ((1, 1), (2, 3))]
    images = on_device(backend, [*images, noise(4, 3, multiple, 2 * multiple)])
    need("pack_patches", backend, *images)
    options = {"mean": MEAN, "std": STD, "dtype": dtype, "layout": layout, **sizes}
    check(pack_patches(images, backend=backend, **options), pack_patches(images, backend="reference", **options))


VIEWS = {
    "channels last": lambda x: x.permute(1, 2, 0).contiguous(),
    "channels last, as a view": lambda x: x.permute(1, 2, 0),
    "a crop": lambda x: noise(3, 70, 99, seed=5, device=x.device)[:, 7:63, 11:39],
    "every other pixel": lambda x: noise(3, 112, 112, seed=6, device=x.device)[:, ::2, ::2],
    "transposed": lambda x: x.transpose(1, 2),
    "one line repeated": lambda x: x[:, :1].expand(-1, 28, -1),
    "one channel repeated": lambda x: x[:1].expand(3, -1, -1),
    "odd storage offset": lambda x: noise(x.numel() + 1, device=x.device)[1:].view(x.shape),
    "RGB of RGBA": lambda x: noise(56, 28, 4, device=x.device)[..., :3],
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", ["qwen2_vl", "siglip2_naflex"])
def test_any_strides(need, on_device, nan_filled, long_blocks, backend, view, layout):
    (whole,) = on_device(backend, [noise(3, 56, 28)])
    need("pack_patches", backend, whole)
    image = VIEWS[view](whole)
    options = {"patch_size": 14, "mean": MEAN, "std": STD, "dtype": torch.bfloat16, "layout": layout}
    check(pack_patches([image], backend=backend, **options), pack_patches([image.clone()], backend="reference", **options))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "slots", "patch_size"),  # every pair of values
    [
        *((torch.float32, 1, 14), (torch.bfloat16, 2, 14), (torch.uint8, 1, 14)),
        *((torch.float32, 2, 16), (torch.bfloat16, 1, 16), (torch.uint8, 2, 16)),
    ],
    ids=str,
)
def test_alignment(need, on_device, nan_filled, long_blocks, backend, dtype, slots, patch_size):
    """Lines that start at every offset from a multiple of 4 bytes, alone and next to images with other strides."""
    (whole,) = on_device(backend, [noise(3, 3, 4 * patch_size, 4 * patch_size + 4)])
    need("pack_patches", backend, whole)
    crops = [whole[:, :, :, x : x + 4 * patch_size] for x in (0, 1, 2)]  # of videos
    odd_lines = whole.flatten()[: 3 * 3 * 2 * patch_size * (2 * patch_size + 1)].view(3, 3, 2 * patch_size, -1)
    others = [odd_lines[..., :-1], whole[0].permute(1, 2, 0).contiguous()[:, : 4 * patch_size], crops[2][0]]
    options = {"patch_size": patch_size, "mean": MEAN, "std": STD, "dtype": dtype, "temporal_patch_size": slots}
    batches = [*([crop] for crop in crops), [others[2], crops[0]], [crops[0], *others]]
    if backend == "triton" and not whole.is_cuda:
        del batches[1:4]  # its interpreter reads single bytes, slowly
    for images in batches:
        expected = pack_patches([image.clone() for image in images], backend="reference", **options)
        check(pack_patches(images, backend=backend, **options), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("patch_size", "merge_size"), [(2, 1), (14, 2)])
def test_many_images(need, on_device, nan_filled, long_blocks, backend, patch_size, merge_size):
    """A number of images that is not a power of two, and more images than one launch supports."""
    unit = merge_size * patch_size
    sizes = (3, 2) if patch_size == 2 else (1, 1)  # large patches take long in the interpreter of Triton
    images = [noise(3, unit * (1 + i % sizes[0]), unit * (1 + i % sizes[1]), seed=i) for i in range(70)]
    images = on_device(backend, [*images, noise(3, 3, unit, unit)])
    need("pack_patches", backend, *images)
    options = {"patch_size": patch_size, "merge_size": merge_size, "mean": MEAN, "std": STD, "dtype": torch.bfloat16}
    expected = pack_patches(images, backend="reference", **options)
    check(pack_patches(images, backend=backend, **options), expected)
    check(pack_patches(images[:33], backend=backend, **options), pack_patches(images[:33], backend="reference", **options))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])  # 1: no row is aligned
def test_into_out(need, on_device, long_blocks, backend, dtype, offset):
    """Only the first rows of a longer buffer are written."""
    images = on_device(backend, [noise(3, 28, 56), noise(3, 28, 28)])
    need("pack_patches", backend, *images)
    options = {"patch_size": 14, "mean": MEAN, "std": STD, "dtype": dtype, "backend": backend}
    storage = torch.full((14 * 1176 + 2,), 77, dtype=dtype, device=images[0].device)
    out = storage[offset : offset + 14 * 1176].view(14, 1176)
    actual = pack_patches(images, out=out, **options)
    check(actual, pack_patches(images, **options))
    assert actual.pixel_values.data_ptr() == out.data_ptr()
    assert actual.pixel_values.shape == (12, 1176)
    assert out[12:].eq(77).all()
    assert storage[:offset].eq(77).all()
    assert storage[offset + out.numel() :].eq(77).all()


def test_result_does_not_depend_on_threads():
    images, threads, results = [noise(3, 280, 280, seed=i) for i in range(3)], torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(pack_patches(images, patch_size=14, mean=MEAN, std=STD, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    check(*results)


# ---- PIL images and arrays ----


def pil_images():
    pixels = noise(28, 56, 4).numpy()
    rgb = Image.fromarray(pixels[..., :3])
    yield "RGB", rgb
    yield "RGBA", Image.fromarray(pixels)
    yield "gray", Image.fromarray(pixels[..., 0])
    yield "gray and alpha", Image.fromarray(pixels).convert("LA")
    yield "palette", rgb.quantize(16)
    transparent = rgb.quantize(16)
    transparent.info["transparency"] = 3
    yield "palette with transparency", transparent
    yield "CMYK", rgb.convert("CMYK")
    yield "bilevel", rgb.convert("1")


PIL_IMAGES = dict(pil_images())
TRANSPARENT = ("RGBA", "gray and alpha", "palette with transparency")


@pytest.mark.parametrize("mode", PIL_IMAGES)
def test_pil_images_become_rgb_as_in_transformers(mode):
    transformers = pytest.importorskip("transformers")
    image = PIL_IMAGES[mode]
    if mode in TRANSPARENT and Version(transformers.__version__) < Version("5.21"):
        pytest.skip(f"transformers {transformers.__version__} drops transparency")
    expected = transformers.Qwen2VLImageProcessor(do_resize=False)([image], return_tensors="pt")
    assert torch.equal(pack_patches([image], patch_size=14, mean=MEAN, std=STD).pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("deep", [lambda gray: gray.astype(np.uint16) * 257, lambda gray: gray.astype(np.float32) / 255])
def test_pil_images_with_more_than_8_bits_are_scaled(deep):
    gray = noise(28, 56).numpy()
    options = {"patch_size": 14, "mean": MEAN, "std": STD}
    check(pack_patches([Image.fromarray(deep(gray))], **options), pack_patches([Image.fromarray(gray)], **options))


def test_arrays():
    tensor = noise(28, 56, 3)
    array = tensor.numpy().copy()
    read_only = array.copy()
    read_only.flags.writeable = False
    flipped = np.ascontiguousarray(array[::-1])[::-1]
    options = {"patch_size": 14, "mean": MEAN, "std": STD}
    expected = pack_patches([tensor] * 4, **options)
    check(pack_patches([array, read_only, flipped, array.transpose(2, 0, 1)], **options), expected)


def test_a_shape_of_both_orders_is_channels_first():
    image = noise(3, 2, 3)
    options = {"patch_size": 1, "merge_size": 1, "mean": MEAN, "std": STD}
    assert pack_patches([image], **options).image_grid_thw.tolist() == [[1, 2, 3]]


# ---- errors ----


def truncated():
    """A JPEG file that ends in the middle."""
    file = io.BytesIO()
    Image.fromarray(noise(64, 56, 3).numpy()).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


def image_errors():
    good = noise(3, 28, 28)
    yield "empty list", [], ValueError, "images must hold at least one image, got 0"
    yield (
        "one tensor of images",
        torch.stack([good, good]),
        ValueError,
        r"images must be a list of images, or one .* got \(2, 3, 28",
    )
    yield "not an image", [good, 7], TypeError, r"images\[1\] must be a tensor, an array, a PIL image, bytes or a path, got int"
    rule = r"images\[1\] must be \(H, W, 3\) or \(3, H, W\), or frames .* of that, got "
    yield "one channel", [good, noise(28, 28, 1)], ValueError, rule + r"\(28, 28, 1\)"
    yield "gray", [good, noise(28, 28)], ValueError, rule + r"\(28, 28\)"
    yield "RGBA", [good, noise(4, 28, 28)], ValueError, rule + r"\(4, 28, 28\)"
    yield "zero-sized", [good, noise(0, 28, 3)], ValueError, r"images\[1\] must have pixels, got \(0, 28, 3\)"
    yield "no frames", [good, noise(0, 3, 28, 28)], ValueError, r"images\[1\] must have pixels, got \(0, 3, 28, 28\)"
    rule = r"images\[1\] must have dtype uint8, got "
    yield "float", [good, good.float()], TypeError, rule + r"float32, \(3, 28, 28\)"
    yield "16 bits", [good, np.zeros((28, 28, 3), np.uint16)], TypeError, rule + r"uint16, \(28, 28, 3\)"
    deep = Image.fromarray(np.full((28, 56), 300.0, np.float32))
    yield "floats of PIL", [good, deep], ValueError, r"images\[1\]: image must have pixels in \[0, 1\] or .* got 300.0 to 300.0"
    rule = r"images\[1\] must be a whole image, got 64 x 56 that does not decode: .*truncated"
    yield "truncated", [good, truncated()], ValueError, rule
    rule = r"images\[1\] must have sides that are multiples of 28, got 28 x 42"
    yield "sides", [good, noise(28, 42, 3)], ValueError, rule
    rule = r"images\[1\] must be on the device of images\[0\], cpu, got meta"
    yield "devices", [good, good.to("meta")], ValueError, rule


def option_errors():
    yield "patch_size", {"patch_size": 0}, ValueError, "patch_size must be an integer > 0, got 0"
    yield "merge_size", {"merge_size": 1.5}, ValueError, "merge_size must be an integer > 0, got 1.5"
    layout = {"layout": "pixtral", "temporal_patch_size": 2}
    yield "fixed size", layout, ValueError, "temporal_patch_size must be 1 in layout pixtral, got 2"
    yield "layout", {"layout": "vit"}, ValueError, "layout must be one of qwen2_vl, siglip2_naflex, pixtral, got 'vit'"
    yield "no mean", {"mean": None}, ValueError, r"mean and std must both be given or both be None, got None and \(0.26"
    yield "mean", {"mean": (0.5,)}, ValueError, r"mean must have a number for each of 3 channels, got \(0.5,\)"
    yield "one mean", {"mean": 0.5}, TypeError, "mean must have a number for each of 3 channels, got 0.5"
    yield "resize", {"resize": (28, 56)}, TypeError, r"resize must be a function of height and width, got \(28, 56\)"
    rule = r"resize must return \(height, width\), two integers > 0, got "
    yield "one side", {"resize": lambda height, width: height}, ValueError, rule + "28 for images\\[0\\], 28 x 28"
    yield "half pixels", {"resize": lambda height, width: (height / 2, width)}, ValueError, rule + r"\(14.0, 28\)"
    yield "no side", {"resize": lambda height, width: (0, width)}, ValueError, rule + r"\(0, 28\)"
    yield "std", {"std": (0.5, 0, 1)}, ValueError, r"std must not be 0, got \(0.5, 0.0, 1.0\)"
    yield "rescale", {"rescale": 0.0}, ValueError, "rescale must be a finite number > 0, got 0.0"
    yield "dtype", {"dtype": torch.float64}, TypeError, "dtype must be one of torch.float32, .* got torch.float64"
    yield "name of a dtype", {"dtype": "bfloat16"}, TypeError, "dtype must be one of torch.float32, .* got 'bfloat16'"
    yield "backend", {"backend": "tpu"}, ValueError, "backend must be one of auto, .* got 'tpu'"
    out = torch.empty(8, 1176)
    rule = r"out must be \(at least 4, 1176\), got "
    yield "out rows", {"out": out[:3]}, ValueError, rule + r"\(3, 1176\)"
    yield "out features", {"out": out[:, :588]}, ValueError, rule + r"\(8, 588\)"
    yield "out axes", {"out": out[None]}, ValueError, rule + r"\(1, 8, 1176\)"
    yield "out strides", {"out": out[::2]}, ValueError, r"out must be contiguous, got strides \(2352, 1\)"
    yield "out dtype", {"out": out.half()}, TypeError, "out must have dtype float32, got float16"
    yield "out device", {"out": out.to("meta")}, ValueError, "out must be on the device of images, cpu, got meta"


IMAGE_ERRORS = {name: case for name, *case in image_errors()}
OPTION_ERRORS = {name: case for name, *case in option_errors()}


@pytest.mark.parametrize("case", IMAGE_ERRORS)
def test_errors_name_the_image_its_size_and_the_rule(case):
    images, error, message = IMAGE_ERRORS[case]
    with pytest.raises(error, match=message):
        pack_patches(images, patch_size=14, mean=MEAN, std=STD)


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_errors_name_argument_rule_and_value(case):
    options, error, message = OPTION_ERRORS[case]
    with pytest.raises(error, match=message):
        pack_patches([noise(3, 28, 28)], **{"patch_size": 14, "mean": MEAN, "std": STD, **options})
