"""Built-in rewards by name: values by hand, coordinate frames, and models that score."""

import json
import math

import pytest
import torch
from PIL import Image
from support import tiny

from vlmkernels.rewards import NAMES, Rewards, Unparsed
from vlmkernels.rewards.alignment import ClipScore
from vlmkernels.rewards.builtin import build
from vlmkernels.rewards.judge import RewardModel

torch.set_num_threads(1)


def message(text):
    return [{"role": "assistant", "content": text}]


def answer(text):
    return f"<think>It looks so.</think><answer>{text}</answer>"


def is_unparsed(score):
    return isinstance(score, Unparsed)


def test_exact_match_and_cer():
    exact_match, cer = build("exact_match"), build("cer")
    completions = ["12", " 12\n", "121", message("12"), answer("12"), "<think>hm</think> 12"]
    assert exact_match(completions, answer=["12"] * 6) == [1, 1, 0, 1, 1, 1]
    assert exact_match(["12"], answer=[12]) == [1]
    scores = cer(["12", "13", "1", "1234567", message("kitten")], answer=["12", "12", "12", "12", "sitting"])
    assert scores == pytest.approx([1, 0.5, 0.5, 0, 1 - 3 / 7])
    assert not any(map(is_unparsed, scores))


def test_an_answer_that_cannot_be_parsed_is_not_a_plain_zero():
    """It gets the reward `unparsed` and is marked as unparsed. A sample without a reference is not scored."""
    completions = ["3", "3 or 4", "none here", "3"]
    scores = build("numeric")(completions, answer=[3, 3, 3, None])
    assert scores == [1, 0, 0, None]
    assert [is_unparsed(score) for score in scores] == [False, True, True, False]
    scores = build("numeric", unparsed=None, column="number")(completions, number=[3, 3, 3, None])
    assert [score is None or math.isnan(score) for score in scores] == [False, True, True, True]
    result = Rewards([{"name": "numeric", "unparsed": None}, {"name": "numeric", "log_as": "again", "unparsed": -1}])(
        4, completions=completions, answer=[3, 4, 5, None]
    )
    assert result.rewards[:, 1].nan_to_num(9).tolist() == [1, -1, -1, 9]
    assert result.rewards[:, 0].isnan().tolist() == [False, True, True, True]
    assert result.unparsed.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    metrics = result.metrics(["numeric", "again"])
    assert metrics["rewards/numeric/unparsed"] == metrics["rewards/again/unparsed"] == 0.5
    assert metrics["rewards/again/failed"] == 0
    assert metrics["rewards/again/time"] > 0


SIZES = {"image_sizes": [[(400, 200)]], "resized_sizes": [[(800, 100)]]}


@pytest.mark.parametrize(
    ("frame", "given"),
    [
        ("original", [40, 20, 80, 100]),
        ("resized", [80, 10, 160, 50]),
        ("0-1", [0.1, 0.1, 0.2, 0.5]),
        ("0-1000", [100, 100, 200, 500]),
    ],
)
def test_frames_of_boxes(frame, given):
    """A box in each frame is compared with a reference in each other frame."""
    for name, text in (("iou", str(given)), ("matched_iou", json.dumps([{"bbox_2d": given}])), ("point_in_box", str(given))):
        assert build(name, frame=frame)([answer(text)], box=None, answer=[[40, 20, 80, 100]], **SIZES) == pytest.approx([1])
        back = build(name, reference_frame=frame, column="box")
        assert back([answer("[40, 20, 80, 100]")], box=[given], **SIZES) == pytest.approx([1])


def test_sizes_of_boxes():
    iou = build("iou", frame="resized")
    with pytest.raises(
        ValueError, match="resized sizes must be given to convert from the resized frame to the original frame, got None"
    ):
        iou(["[1, 1, 2, 2]"], answer=[[1, 1, 2, 2]])
    with pytest.raises(
        ValueError, match=r"references\[1\] must lie inside the original frame of 400 x 200, got \[\[0.0, 0.0, 500.0, 10.0\]\]"
    ):
        build("iou")(["[1, 1, 2, 2]"] * 2, answer=[None, [0, 0, 500, 10]], image_sizes=[[(400, 200)]] * 2)
    with pytest.raises(ValueError, match=r"image_sizes and resized_sizes must be known to convert .* got None at index 1"):
        iou(["[1, 1, 2, 2]"] * 2, answer=[[1, 1, 2, 2]] * 2, image_sizes=[[(4, 4)]] * 2, resized_sizes=[[(4, 4)], None])
    assert build("iou")(["[1, 1, 2, 2]"] * 2, answer=[[1, 1, 2, 2]] * 2, image_sizes=[[(4, 4)], []]) == [
        1,
        1,
    ]  # the size is not needed
    second = build("iou", frame="0-1", image=1)
    assert second(["[0, 0, 1, 1]"], answer=[[0, 0, 20, 20]], image_sizes=[[(10, 10), (20, 20)]]) == [1]


def test_lengths_and_format():
    given = {"completion_ids": [[1] * 50, [1] * 100, [1, 2] * 10], "completions": ["1", "1", "2"], "answer": ["1", "1", "1"]}
    cosine = build("cosine_length", max_length=100, correct={"name": "numeric"})
    assert cosine(**given) == pytest.approx([0.75, -1, -1 + 0.5 * (1 - math.cos(math.pi / 5)) / 2])
    assert build("soft_overlong", max_length=100, cache=50)(**given) == [0, -1, 0]
    assert build("repetition", ngram=2)(**given) == pytest.approx([-1 + 1 / 49, -1 + 1 / 99, -1 + 2 / 19])
    assert build("think_answer_format")([answer("a"), "a"], prompts=["q", "q"]) == [1, 0]
    chair = build("chair", vocabulary={"dog": ["puppy"], "cat": []}, column="objects")
    assert chair(["A puppy and a cat", "", "x"], objects=[["dog"], ["dog"], None]) == [0.5, 0, None]


FORMATS = [
    # completion, and whether it has the format if the prompt ends with <think>: unknown, yes, no
    ("<think>why</think><answer>1</answer>", 1, 0, 1),
    ("why</think><answer>1</answer>", 1, 1, 0),
    ("\nwhy\n</think>\n\n<answer>1</answer>\n", 1, 1, 0),
    ("<think>\nwhy</think><answer>1</answer>", 1, 0, 1),
    ("why<think>why</think><answer>1</answer>", 0, 0, 0),
    ("<think>why</think>why</think><answer>1</answer>", 0, 0, 0),
    ("why<answer>1</answer>", 0, 0, 0),
    ("why</think>1", 0, 0, 0),
    ("why</think><answer>1</answer> and more", 0, 0, 0),
    ("why</think><answer>1</answer><answer>1</answer>", 0, 0, 0),
    ("</think><answer>1</answer>", 0, 0, 0),
    ("<answer>1</answer>", 0, 0, 0),
    ("my own thoughts</think><answer>1</answer>", 0, 0, 0),  # copied from the prompt
    ("", 0, 0, 0),
]


@pytest.mark.parametrize(("completion", "unknown", "opened", "closed"), FORMATS)
@pytest.mark.parametrize("conversation", [False, True])
def test_format_where_the_template_opens_think(completion, unknown, opened, closed, conversation):
    prompt = "Answer like <think>my own thoughts</think><answer>2</answer>."
    if conversation:
        completion, prompt = [{"role": "assistant", "content": completion}], [{"role": "user", "content": prompt}]
    reward = build("think_answer_format")
    assert reward([completion] * 3, [prompt] * 3, [None, True, False]) == [unknown, opened, closed]
    assert reward([completion], [prompt]) == [unknown]


@pytest.mark.parametrize(
    ("completion", "unknown", "opened"),
    [
        ("why</think><answer>1</answer>", 1, 1),
        ("why</think>1", 1, 1),
        ("<answer>1</answer>", 1, 1),
        ("1", 1, None),  # a thought that was cut off
        ("<think>1", None, None),
        ("<answer>1</answer></think>2", None, None),
        ("<think>is it <answer>1</answer>?</think> 2", None, None),
    ],
)
def test_answers_where_the_template_opens_think(completion, unknown, opened):
    rewards = build("exact_match")([completion] * 2, think_opened=[None, True], answer=["1"] * 2)
    for reward, expected in zip(rewards, (unknown, opened), strict=True):
        assert is_unparsed(reward) if expected is None else reward == expected


def test_clip_score(clip):
    """A batch gives the scores of single calls of the model, and each image is encoded once."""
    model, processor = clip
    reward = ClipScore(model=model, processor=processor, device="cpu", batch_size=2)
    images = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    completions, given = ["a", answer("bad"), "c", "d", ""], [[images[0]], [images[0]], [images[1]], [], [images[1]]]
    calls, features = [], model.get_image_features
    model.get_image_features = lambda **inputs: (calls.append(len(inputs["pixel_values"])), features(**inputs))[1]
    scores = reward(completions, given)
    model.get_image_features = features
    assert calls == [2]
    assert scores[3:] == [None, 0]
    assert is_unparsed(scores[4])
    with torch.no_grad():
        for score, text, own in zip(scores, ("a", "bad", "c"), given, strict=False):
            inputs = processor(
                text=["A photo depicts " + text],
                images=own,
                return_tensors="pt",
                padding="max_length",
                max_length=16,
                truncation=True,
            )
            output = model(**inputs)
            assert score == pytest.approx(2.5 * max(0, (output.image_embeds * output.text_embeds).sum().item()), abs=1e-5)
    assert max(scores[:3]) > 0


@pytest.fixture(params=["clip", "siglip"])
def clip(request):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
           "bos_token_id": None, "max_position_embeddings": 16}  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pictures = {**small, "image_size": 16, "patch_size": 8}
    config, kind = (CLIPConfig, CLIPModel) if request.param == "clip" else (SiglipConfig, SiglipModel)
    extra = {"projection_dim": 8} if request.param == "clip" else {}
    words = {**small, **ids, **({"projection_size": 16} if request.param == "siglip" else {})}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer)
    return kind(config(text_config=words, vision_config=pictures, **extra)).eval(), processor


def test_reward_model():
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = Qwen2Config(**tiny.TEXT, vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForSequenceClassification(config)
    reward = RewardModel(model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    completions = [message("a"), message("a longer one"), message("b")]
    scores = reward([prompt] * 3, completions)
    for score, completion in zip(scores, completions, strict=True):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "what"}, *completion], tokenize=False)
        with torch.no_grad():
            assert score == pytest.approx(model(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-5)
    assert len(set(scores)) == 3
    assert reward(["what"], ["a"]) != scores[:1]
    config.num_labels = 2
    with pytest.raises(ValueError, match="model must have one label, got 2"):
        RewardModel(model=Qwen2ForSequenceClassification(config), tokenizer=tokenizer)


def test_every_name_is_built_or_says_what_it_needs():
    for name in NAMES:
        try:
            assert callable(build(name))
        except ValueError as error:
            assert f"options of the reward {name} must include" in str(error)  # noqa: PT017
