"""Rows to model inputs, and invalid rows."""

import base64
import copy
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny, tiny_families
from tokenizers import processors

from vlmkernels.data.images import open_image
from vlmkernels.data.samples import SampleError, encode, prompt_ids, read_sample, render, special_tokens
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)

QWEN_VL = family_of(tiny.vlm().config)


def as_bytes(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def ask(text="what?", images=0):
    parts = [{"type": "image"} for _ in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def text_of(row):
    return render(read_sample(row, 0), tiny.processor())


def test_images_in_every_form_give_the_same_pixels(tmp_path):
    image = tiny.image(3)
    image.save(tmp_path / "a.png")
    forms = [image, str(tmp_path / "a.png"), tmp_path / "a.png", as_bytes(image), {"bytes": as_bytes(image), "path": None}]
    forms.append({"bytes": None, "path": str(tmp_path / "a.png")})
    for form in forms:
        assert open_image(form).convert("RGB").tobytes() == image.tobytes()
    gray = read_sample({"prompt": ask(), "image": image.convert("L")}, 0).images[0]
    assert gray.mode == "RGB"


def test_images_fill_the_image_parts_of_the_prompt():
    image = tiny.image(0)
    block = "<|vision_start|><|image_pad|><|vision_end|>"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    plain = [{"role": "user", "content": "what?"}]
    assert text_of({"prompt": plain, "image": image}) == turn.format(block + "what?")  # inserted before the text
    assert text_of({"prompt": plain, "images": [image, image]}) == turn.format(2 * block + "what?")
    assert text_of({"prompt": plain, "image": None}) == turn.format("what?")
    last = [{"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]}]
    assert text_of({"prompt": last, "image": image}) == turn.format("what?" + block)  # stays in its place
    inside = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    assert text_of({"prompt": inside}) == turn.format(block + "?")
    assert text_of({"prompt": f"{block}what?", "image": image}) == f"{block}what?"
    system = [{"role": "system", "content": "be brief"}, *plain]
    assert block + "what?" in text_of({"prompt": system, "image": image})


def test_videos_in_every_form_give_the_same_frames(tmp_path):
    frames = [tiny.image(k, 56, 28) for k in range(3)]
    for k, frame in enumerate(frames):
        frame.save(tmp_path / f"{k}.png")
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])  # (3, 28, 56, 3)
    forms = [frames, [tmp_path / f"{k}.png" for k in range(3)], [{"bytes": as_bytes(frame), "path": None} for frame in frames]]
    forms += [
        list(pixels.numpy()),
        list(pixels.movedim(-1, 1)),
        pixels,
        pixels.numpy(),
        [frames[0], pixels[1], pixels[2].numpy()],
    ]
    for form in forms:
        sample = read_sample({"prompt": ask(), "videos": [form]}, 0)
        assert torch.equal(sample.videos[0], pixels.movedim(-1, 1))
        assert read_sample({"prompt": ask(), "videos": [form]}, 0, decode=False).videos[0].shape == (3, 3, 28, 56)
    assert (sample.fps, read_sample({"prompt": ask(), "videos": [frames], "fps": 4}, 0).fps) == (2.0, 4.0)


def test_videos_fill_the_video_parts_of_the_prompt():
    frames, picture = [tiny.image(0), tiny.image(1)], tiny.image(2)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": ask(), "image": picture, "videos": [frames]}
    assert text_of(row) == turn.format(image + video + "what?")
    parts = [{"type": "video"}, {"type": "text", "text": "or"}, {"type": "image"}, {"type": "video"}]
    row = {"prompt": [{"role": "user", "content": parts}], "image": picture, "videos": [frames, frames]}
    assert text_of(row) == turn.format(video + "or" + image + video)
    inside = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]}]
    assert text_of({"prompt": inside}) == turn.format(video + "?")


WITH_VIDEOS = [name for name in tiny_families.BUILDERS if tiny_families.case(name).video]


@pytest.mark.parametrize("name", WITH_VIDEOS)
def test_videos_of_every_family(name):
    """encode returns what the processor returns for the same pixels."""
    case, rows = tiny_families.case(name), []
    for index, sample in enumerate(case.samples):
        noise = np.random.default_rng(index)
        pixels = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (*sample.images, *sample.videos)]
        split = len(sample.images)
        text = case.image * split + case.video * len(sample.videos) + "why" * index + "?"
        rows.append({"prompt": text, "images": [Image.fromarray(x) for x in pixels[:split]], "videos": pixels[split:]})
    batch = encode([read_sample(row, i) for i, row in enumerate(rows)], case.processor, family_of(case.model.config))
    expected = case.inputs()
    assert batch.inputs.keys() == expected.keys() - set(batch.family.unused)
    assert all(torch.equal(x, expected[n]) for n, x in batch.inputs.items())
    assert batch.rows["video"].tolist() == [len(sample.videos) for sample in case.samples]


def test_encode_pads_left_and_keeps_each_image_once():
    rows = tiny.rows(3, "mixed")
    prompts = encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.processor(), QWEN_VL)
    assert prompts.num_images.tolist() == [0, 1, 2]
    assert prompts.inputs["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2], [1, 2, 4]]
    assert prompts.inputs["attention_mask"][0, 0] == 0
    assert prompts.inputs["attention_mask"][:, -1].all()
    texts = tiny.tokenizer().batch_decode(prompts.inputs["input_ids"])
    assert [text.count("<|image_pad|>") for text in texts] == [0, 1, 3]  # the last image has two tokens
    alone = encode([read_sample(rows[2], 2)], tiny.processor(), QWEN_VL)
    torch.testing.assert_close(prompts.select(torch.tensor([2])).inputs["pixel_values"], alone.inputs["pixel_values"])


def test_encode_text_model():
    rows = tiny.rows(2, "none")
    prompts = encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.tokenizer(), TEXT)
    assert tiny.tokenizer().decode(prompts.inputs["input_ids"][1]).endswith("what is 1?<|im_end|>\n<|im_start|>assistant\n")


# Chat templates of Qwen2-VL to Qwen3-VL ask whether a part has a key, not whether it has a value.
TEMPLATE_WITH_KEYS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}<|image_pad|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def test_keys_that_arrow_fills_in_never_reach_a_template():
    processor = tiny.processor()
    processor.chat_template = TEMPLATE_WITH_KEYS
    content = [{"type": "image", "image": as_bytes(tiny.image(0))}, {"type": "text", "text": "what?"}]
    row = {"prompt": [{"role": "user", "content": content}]}
    stored = datasets.Dataset.from_list([row])[0]
    assert stored["prompt"][0]["content"][1]["image"] is None
    assert render(read_sample(stored, 0), processor) == render(read_sample(row, 0), processor) == "user: <|image_pad|>what?"
    inputs = encode([read_sample(stored, 0)], processor, QWEN_VL)
    assert inputs.num_images.tolist() == [1]


@pytest.mark.parametrize("form", ["image", "image_url", "base64"])
def test_images_within_the_prompt(form):
    data = base64.b64encode(as_bytes(tiny.image(3))).decode()
    part = {
        "image": {"image": tiny.image(3)},
        "image_url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        "base64": {"type": "image", "base64": data},
    }[form]
    sample = read_sample({"prompt": [{"role": "user", "content": [part, "what?"]}]}, 0)
    assert sample.images[0].tobytes() == tiny.image(3).tobytes()
    assert sample.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]


# Special tokens

BOS, EOS = tiny_families.token_id("<s>"), tiny_families.token_id("</s>")
SPECIAL_TOKENS = [("<s>", BOS), ("</s>", EOS), ("<pad>", 0)]
ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def tokenizer_that_adds(single: str, template: str = ROLES):
    tokenizer = tiny_families.tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair="$A $B", special_tokens=SPECIAL_TOKENS
    )
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(rows, processor, family=TEXT) -> list[list[int]]:
    inputs = encode([read_sample(row, i) for i, row in enumerate(rows)], processor, family).inputs
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("writes_bos", [True, False], ids=["template with BOS", "template without BOS"])
@pytest.mark.parametrize(
    ("single", "first", "last"),
    [
        ("$A", [], []),
        ("<s> $A", [BOS], []),
        ("<s> $A </s>", [BOS], [EOS]),
        ("$A </s>", [], [EOS]),
        ("<s> <pad> $A </s> </s>", [BOS, 0], [EOS, EOS]),
    ],
)
def test_the_tokens_of_a_prompt_do_not_depend_on_its_batch(single, first, last, writes_bos):
    tokenizer = tokenizer_that_adds(single, ("<s>" if writes_bos else "") + ROLES)
    assert special_tokens(tokenizer) == (first, last)
    talk = {"prompt": [{"role": "user", "content": "hello!"}]}
    rows = [{"prompt": "hello"}, talk, {"prompt": "<s>hi there"}]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = [first + ids("hello"), [BOS] * writes_bos + ids("user: hello!"), ids("<s>hi there")]
    for order in ([0], [1], [2], [0, 1, 2], [2, 1, 0], [1, 0, 2, 1]):
        assert tokens_of([rows[place] for place in order], tokenizer) == [expected[place] for place in order]
    assert expected[1] == tokenizer.apply_chat_template(talk["prompt"], tokenize=True)["input_ids"]
    samples = [read_sample(row, i) for i, row in enumerate(rows)]
    assert [prompt_ids(sample, render(sample, tokenizer), tokenizer) for sample in samples] == expected


@pytest.mark.parametrize("name", ["qwen2_vl", "pixtral", "idefics3"])
def test_the_inputs_of_a_prompt_do_not_depend_on_its_batch(name):
    """Plain prompts and conversations with images, with a tokenizer that adds BOS and EOS."""
    case = tiny_families.case(name)
    processor, family = copy.deepcopy(case.processor), family_of(case.model.config)
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=SPECIAL_TOKENS
    )
    processor.chat_template = (
        f"<s>{{% for part in messages[0].content %}}{{% if part.type == 'image' %}}{case.image}{{% else %}}{{{{ part.text }}}}"
        "{% endif %}{% endfor %}"
    )
    rows = [
        {"prompt": f"{case.image}why?", "image": tiny.image(0)},
        {"prompt": ask("what is it?"), "images": [tiny.image(1, 56, 28), tiny.image(2)]},
        {"prompt": "no image"},
    ]
    together = encode([read_sample(row, i) for i, row in enumerate(rows)], processor, family)
    for index, row in enumerate(rows):
        alone, chosen = encode([read_sample(row, index)], processor, family), together.select(torch.tensor([index])).trim()
        assert torch.equal(alone.inputs["input_ids"], chosen.inputs["input_ids"])
        assert alone.inputs["input_ids"][0].tolist().count(BOS) == 1
        assert EOS not in alone.inputs["input_ids"]
        assert torch.equal(alone.image_keys, chosen.image_keys)
        if "pixel_values" in alone.inputs:
            torch.testing.assert_close(alone.inputs["pixel_values"].sum(), chosen.inputs["pixel_values"].sum())


def test_a_processor_adds_bos_where_the_template_does_not():
    """As in transformers: LLaVA's template has no BOS, which its tokenizer adds."""
    case = tiny_families.case("llava")
    processor = copy.deepcopy(case.processor)
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="$A $B", special_tokens=SPECIAL_TOKENS
    )
    processor.chat_template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    row = {"prompt": ask("what is it?")}
    expected = processor.apply_chat_template(row["prompt"], tokenize=True, return_dict=True)["input_ids"]
    assert tokens_of([row], processor, family_of(case.model.config)) == expected
    assert expected[0][0] == BOS


# Chat templates


def test_a_prompt_that_ends_with_the_assistant_is_continued():
    talk = [*ask(), {"role": "assistant", "content": "It is "}]
    start = "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nIt is "
    sample = read_sample({"prompt": talk}, 0)
    assert sample.continues
    for processor in (tiny.processor(), tiny.tokenizer()):
        assert render(sample, processor) == start
        answered = f"{start}<|im_end|>\n<|im_start|>assistant\n"
        assert render(sample, processor, add_generation_prompt=True) == answered
        assert render(sample, processor, continue_final_message=True) == start
    assert render(read_sample({"prompt": [*ask(), {"role": "assistant", "content": ""}]}, 0), tiny.tokenizer()) == start[:-6]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "zoom", "arguments": {}}}]}
    with pytest.raises(SampleError, match="sample 3: prompt cannot be rendered by the chat template: continue_final_message"):
        render(read_sample({"prompt": [*ask(), called]}, 3), tiny.processor())


def test_errors_of_templates_and_processors_name_the_sample():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SampleError, match="sample 4: prompt cannot be rendered by the chat template: roles must alternate"):
        render(read_sample({"prompt": ask()}, 4), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(SampleError, match=r"sample 4: prompt cannot be rendered .*chat_template is not set"):
        render(read_sample({"prompt": ask()}, 4), tokenizer)
    rows = [*tiny.rows(2), {"prompt": ask(), "image": Image.new("RGB", (3000, 14))}]
    with pytest.raises(
        SampleError, match="sample 2: cannot be encoded: absolute aspect ratio must be smaller than 200"
    ) as error:
        encode([read_sample(row, i) for i, row in enumerate(rows)], tiny.processor(), QWEN_VL)
    assert error.value.index == 2
    with pytest.raises(SampleError, match="sample 1: prompt must have at least one token, got none for 'ÄÖ'"):
        encode([read_sample({"prompt": text}, i) for i, text in enumerate(("a", "ÄÖ"))], tiny.tokenizer(), TEXT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 7}, "sample 1: prompt must be a string or a list of messages, got 7"),
        ({"prompt": ask(), "image": "nowhere.png"}, r"sample 1: image cannot be read: .*nowhere.png"),
        ({"prompt": ask(), "image": b"not an image"}, "sample 1: image cannot be read: cannot identify image file"),
        ({"prompt": ask(), "image": Image.new("RGB", (0, 4))}, "sample 1: image .* must not be empty, got 0 x 4 pixels"),
        ({"prompt": ask(), "images": [tiny.image(0), 3]}, r"sample 1: images\[1\] .* must be a PIL image, .* got int"),
        (
            {"prompt": ask(images=2), "image": tiny.image(0)},
            "sample 1: image must hold one image per image part of the prompt, 2, got 1",
        ),
        (
            {"prompt": ask(images=1), "images": []},
            "sample 1: images must hold one image per image part of the prompt, 1, got 0",
        ),
        (
            {"prompt": "<|image_pad|><|image_pad|>what?", "image": tiny.image(0)},
            r"sample 1: prompt must hold one <\|image_pad\|> per image, 1, got 2 in '<\|image_pad\|>",
        ),
        (
            {"prompt": ask("is <|image_pad|> a token?"), "image": tiny.image(0)},
            r"sample 1: prompt must hold one <\|image_pad\|> per image, 1, got 2",
        ),
        ({"prompt": ask(), "videos": [[]]}, r"sample 1: videos\[0\] must hold at least one frame, got 0"),
        (
            {"prompt": ask(), "videos": [tiny.image(0), tiny.image(1)]},
            r"sample 1: videos\[0\] must be a list of frames, an array or a tensor, got Image",
        ),
        (
            {"prompt": ask(), "videos": [[tiny.image(0), tiny.image(1, 56, 28)]]},
            r"sample 1: videos\[0\]\[1\] must have the size of the first frame, 28 x 28, got 28 x 56",
        ),
        (
            {"prompt": ask(), "videos": [[tiny.image(0), "nowhere.png"]]},
            r"sample 1: videos\[0\]\[1\] cannot be read: .*nowhere.png",
        ),
        (
            {"prompt": ask(), "videos": [np.zeros((28, 28, 3), np.uint8)]},
            r"sample 1: videos\[0\] must be frames .* \(28, 28, 3\)",
        ),
        (
            {"prompt": ask(), "videos": [[np.zeros((28, 28, 3))]]},
            r"sample 1: videos\[0\]\[0\] must have dtype uint8, got float64",
        ),
        ({"prompt": ask(), "videos": [torch.zeros(2, 4, 28, 28).byte()]}, r"sample 1: videos\[0\] must be \(H, W, 3\) or"),
        (
            {"prompt": "<|video_pad|><|video_pad|>", "videos": [[tiny.image(0)]]},
            r"sample 1: prompt must hold one <\|video_pad\|> per video, 1, got 2",
        ),
        ({"prompt": ask(), "videos": [[tiny.image(0)]], "fps": 0}, "sample 1: fps must be a finite number > 0, got 0"),
        ({"answer": "1"}, "train_dataset: sample 1 must have 'prompt', got answer"),
        ("what?", "train_dataset: sample 1 must be a dict of columns, got str"),
        ({"prompt": ""}, "train_dataset: sample 1: prompt must not be empty, got ''"),
        ({"prompt": []}, r"train_dataset: sample 1: prompt must have at least one message, got \[\]"),
        ({"prompt": [{"role": "user", "content": None}]}, r"sample 1: prompt\[0\].content must be a string .*, got None"),
        ({"prompt": ask("what \ud83d")}, r"sample 1: prompt must be valid Unicode, got the lone surrogate '\\ud83d' in"),
        (
            {"prompt": ask(), "image": Image.new("RGB", (3000, 14))},
            "sample 1: image must have a size that the processor accepts, got 3000 x 14 pixels .absolute aspect ratio",
        ),
        (
            {"prompt": ask(), "images": [tiny.image(0), Image.new("L", (1, 1000))]},
            r"sample 1: images\[1\] must have a size that the processor accepts, got 1 x 1000 pixels",
        ),
        (
            {"prompt": ask(), "videos": [[Image.new("RGB", (3000, 14))] * 2]},
            r"sample 1: videos\[0\] must have a size that the processor accepts, got 2 frames of 3000 x 14 pixels",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:60],
)
def test_bad_rows_are_named_before_training(tmp_path, row, message):
    rows = [{"prompt": ask(), "image": tiny.image(0)}, row]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    with pytest.raises((ValueError, TypeError), match=message):
        GRPOTrainer(tiny.vlm(), lambda **_: [0.0, 0.0], args, rows, processing_class=tiny.processor())


def test_an_image_with_missing_pixels_is_named_when_it_is_read():
    whole = as_bytes(tiny.image(1, 280, 280))
    row = {"prompt": ask(), "image": whole[: len(whole) // 2]}
    with pytest.raises(ValueError, match="sample 4: image cannot be read: image file is truncated"):
        read_sample(row, 4)
