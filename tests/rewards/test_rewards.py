"""Rewards of a run: found, given options, called, timed, and what is said about wrong ones; and that known hacks do not pay."""

import asyncio
import functools
import json
import math
import threading
import time

import pytest
import torch
from PIL import Image
from support import tiny

from vlmkernels.rewards import NAMES, Rewards, Unparsed
from vlmkernels.rewards.alignment import ClipScore
from vlmkernels.rewards.builtin import build
from vlmkernels.rewards.compose import resolve
from vlmkernels.rewards.judge import RewardModel
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


def message(text):
    return [{"role": "assistant", "content": text}]


def answer(text):
    return f"<think>It looks so.</think><answer>{text}</answer>"


def is_unparsed(score):
    return isinstance(score, Unparsed)


# Built-in rewards


def test_exact_match_and_cer():
    exact_match, cer = build("exact_match"), build("cer")
    completions = ["12", " 12\n", "121", message("12"), answer("12"), "<think>hm</think> 12"]
    assert exact_match(completions, answer=["12"] * 6) == [1, 1, 0, 1, 1, 1]
    assert exact_match(["12"], answer=[12]) == [1]
    scores = cer(["12", "13", "1", "1234567", message("kitten")], answer=["12", "12", "12", "12", "sitting"])
    assert scores == pytest.approx([1, 0.5, 0.5, 0, 1 - 3 / 7])
    assert not any(map(is_unparsed, scores))


def test_an_answer_that_cannot_be_parsed_is_not_a_plain_zero():
    """It is worth what `unparsed` says, and marked; a sample without a reference is not scored."""
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
    """A box in any frame, against a reference in any other."""
    for name, text in (("iou", str(given)), ("matched_iou", json.dumps([{"bbox_2d": given}])), ("point_in_box", str(given))):
        assert build(name, frame=frame)([answer(text)], box=None, answer=[[40, 20, 80, 100]], **SIZES) == pytest.approx([1])
        back = build(name, reference_frame=frame, column="box")
        assert back([answer("[40, 20, 80, 100]")], box=[given], **SIZES) == pytest.approx([1])


def test_sizes_of_boxes():
    iou = build("iou", frame="resized")
    with pytest.raises(ValueError, match="resized sizes must be given to convert from the frame resized to original, got None"):
        iou(["[1, 1, 2, 2]"], answer=[[1, 1, 2, 2]])
    with pytest.raises(
        ValueError, match=r"references\[1\] must lie in the frame original of 400 x 200, got \[\[0.0, 0.0, 500.0, 10.0\]\]"
    ):
        build("iou")(["[1, 1, 2, 2]"] * 2, answer=[None, [0, 0, 500, 10]], image_sizes=[[(400, 200)]] * 2)
    with pytest.raises(ValueError, match=r"image_sizes and resized_sizes must be known to convert .* got None at index 1"):
        iou(["[1, 1, 2, 2]"] * 2, answer=[[1, 1, 2, 2]] * 2, image_sizes=[[(4, 4)]] * 2, resized_sizes=[[(4, 4)], None])
    assert build("iou")(["[1, 1, 2, 2]"] * 2, answer=[[1, 1, 2, 2]] * 2, image_sizes=[[(4, 4)], []]) == [
        1,
        1,
    ]  # size not needed
    second = build("iou", frame="0-1", image=1)
    assert second(["[0, 0, 1, 1]"], answer=[[0, 0, 20, 20]], image_sizes=[[(10, 10), (20, 20)]]) == [1]


def test_lengths_and_format():
    given = {"completion_ids": [[1] * 50, [1] * 100, [1, 2] * 10], "completions": ["1", "1", "2"], "answer": ["1", "1", "1"]}
    cosine = build("cosine_length", max_length=100, correct={"name": "numeric"})
    assert cosine(**given) == pytest.approx([0.75, -1, -1 + 0.5 * (1 - math.cos(math.pi / 5)) / 2])
    assert build("soft_overlong", max_length=100, cache=50)(**given) == [0, -1, 0]
    assert build("repetition", ngram=2)(**given) == pytest.approx([-1 + 1 / 49, -1 + 1 / 99, -1 + 2 / 19])
    assert build("format")([answer("a"), "a"], prompts=["q", "q"]) == [1, 0]
    chair = build("chair", vocabulary={"dog": ["puppy"], "cat": []}, column="objects")
    assert chair(["A puppy and a cat", "", "x"], objects=[["dog"], ["dog"], None]) == [0.5, 0, None]


def test_clip_score(clip):
    """By two calls of the model per completion; each image is encoded once, and a batch changes nothing."""
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


# Hacks


def test_hack_box_spam():
    """Boxes everywhere: one of them is right, and it does not pay."""
    truth, grid = [30, 30, 50, 50], [[x, y, x + 20, y + 20] for x in range(0, 90, 10) for y in range(0, 90, 10)]
    assert truth in grid
    honest, spam = json.dumps([truth]), json.dumps(grid)
    for name in ("matched_iou", "mean_ap", "weighted_match"):
        for options in ({}, {"matching": "confidence"}, {"matching": "greedy"}) if name == "matched_iou" else ({},):
            best, worst = build(name, **options)([honest, spam], answer=[[truth]] * 2)
            assert best == pytest.approx(1)
            # VLM-R1's weighted sum forgives spam: half of its completeness, and all of its position.
            assert worst < (0.86 if name == "weighted_match" else 0.02)
    unlimited = build("mean_ap", over_prediction_penalty=False)
    confident = json.dumps([{"bbox_2d": b, "score": 0.9 if b == truth else 0.1} for b in grid])
    assert unlimited([confident], answer=[[truth]]) == pytest.approx([1])  # what the penalty is for
    for name in ("iou", "giou", "point_in_box"):
        assert is_unparsed(build(name)([spam], answer=[truth])[0])


def test_hack_repeated_answer():
    """Several answers, the last or any of them right."""
    text = "<think>x</think><answer>4</answer><answer>5</answer>"
    for name in ("exact_match", "numeric", "count"):
        assert is_unparsed(build(name)([text], answer=["5"])[0])
        assert is_unparsed(build(name)(["<answer>4<answer>5</answer>"], answer=["5"])[0])
    assert build("format")([text], prompts=[""]) == [0]
    assert is_unparsed(build("numeric")(["1 2 3 4 5"], answer=[5])[0])
    assert is_unparsed(build("choice")(["A. B. C. D."], answer=["C"])[0])


def test_hack_always_yes():
    """Where most answers are "yes", saying so always is worth no more than guessing, if the reward is balanced."""
    truth = ["yes"] * 8 + ["no"] * 2
    always = build("yes_no")(["yes"] * 10, answer=truth)
    assert sum(always) / 10 == 0.8
    balanced = build("yes_no", balanced=True)
    assert sum(balanced(["yes"] * 10, answer=truth)) / 10 == pytest.approx(0.5)
    assert sum(balanced(["no"] * 10, answer=truth)) / 10 == pytest.approx(0.5)
    assert sum(balanced(truth, answer=truth)) / 10 == pytest.approx(1)
    assert is_unparsed(build("yes_no")(["yes and no"], answer=["yes"])[0])


def test_hack_answer_copied_from_the_prompt():
    """The prompt's example, its list of options, or its own template, given back."""
    prompt = "Where is the cat? Answer like <think>your thoughts</think><answer>[100, 100, 200, 200]</answer>."
    copied = "<think>your thoughts</think><answer>[100, 100, 200, 200]</answer>"
    truth = [90, 100, 200, 210]
    for prompts in ([prompt], [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]]):
        for name, reference in (("iou", truth), ("giou", truth), ("matched_iou", [truth])):
            assert is_unparsed(build(name)([copied], prompts, answer=[reference])[0])
            assert build(name)([answer("[90, 100, 200, 210]")], prompts, answer=[reference]) == pytest.approx([1])
        assert is_unparsed(build("cer")([copied], prompts, answer=["[100, 100, 200, 201]"])[0])
        assert build("format")([copied], prompts) == [0]
        assert build("format")([answer("[1, 2, 3, 4]")], prompts) == [1]
    assert is_unparsed(build("choice")(["A. cat B. dog"], ["Which? A. cat B. dog"], answer=["A"])[0])
    assert build("choice")([answer("A")], ["Answer like <answer>A</answer>"], answer=["A"]) == [1]  # by right


@pytest.mark.parametrize("think", ["", "  ", "...", "\n-\n"])
def test_hack_empty_think(think):
    assert build("format")([f"<think>{think}</think><answer>a</answer>"]) == [0]
    assert build("format")([f"<think>why</think><answer>{think}</answer>"]) == [0]


def test_hack_boxes_in_the_resized_frame():
    """A box that is right in the frame the model sees is not right in the dataset's; the configuration says which it gives."""
    sizes = {"image_sizes": [[(1000, 1000)]], "resized_sizes": [[(500, 500)]]}
    truth, seen = [[600, 600, 800, 800]], ["[300, 300, 400, 400]"]
    assert build("iou")(seen, answer=truth, **sizes) == [0]
    assert build("iou", frame="resized")(seen, answer=truth, **sizes) == [1]
    larger = {"image_sizes": [[(500, 500)]], "resized_sizes": [[(1000, 1000)]]}
    outside = build("iou")(["[600, 600, 800, 800]"], answer=[[300, 300, 400, 400]], **larger)
    assert is_unparsed(outside[0])  # which the logs count


# Composition


def half(completions, **kwargs):
    return [None if c == "skip" else 0.5 for c in completions]


def test_scores_of_every_kind():
    ones = lambda completions, **kwargs: torch.ones(len(completions))  # noqa: E731
    ones.__name__ = "ones"
    flags = lambda completions, **kwargs: [c == "a" for c in completions]  # noqa: E731
    flags.__name__ = "flags"

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    rewards = Rewards([half, ones, later, {"name": flags, "weight": 3}])
    assert rewards.names == ["half", "ones", "later", "flags"]
    assert rewards.weights.tolist() == [1, 1, 1, 3]
    scores = rewards(2, completions=["a", "skip"]).rewards
    assert scores.dtype == torch.float32
    assert scores[0].tolist() == [0.5, 1, 2, 1]
    assert math.isnan(scores[1, 0])
    assert scores[1, 1:].tolist() == [1, 2, 0]


def scaled(completions, length, factor=1.0, **kwargs):
    return [factor * n for n in length]


def test_found_by_name_and_by_import_path():
    assert resolve("cer").score.__name__ == "cer"
    assert resolve("math:sqrt") is math.sqrt
    assert resolve(half) is half
    assert Rewards(functools.partial(half, extra=1)).names == ["half"]
    assert Rewards({"name": "test_rewards:scaled", "factor": 2})(2, completions="ab", length=[1, 2]).rewards.tolist() == [
        [2],
        [4],
    ]
    with pytest.raises(ValueError, match=r"reward must be one of exact_match, .* or an import path .*, got 'bleu'"):
        resolve("bleu")
    with pytest.raises(ValueError, match="reward must be importable, got 'nowhere:f': No module named 'nowhere'"):
        resolve("nowhere:f")
    with pytest.raises(ValueError, match=r"reward must be importable, got 'math:f': .* no attribute 'f'"):
        resolve("math:f")
    with pytest.raises(TypeError, match="reward must be a function or its name, got Linear"):
        resolve(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"reward_funcs must have distinct names \(log_as gives one another\), got cer, cer"):
        Rewards(["cer", {"name": "cer", "column": "text"}])
    with pytest.raises(ValueError, match="reward_funcs must name at least one function, got none"):
        Rewards([])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"weight": 1}, "rewards must have a name each, got {'weight': 1}"),
        (
            {"name": "iou", "fram": "resized"},
            "options of the reward iou must be among column, unparsed, frame, .*, power, got fram",
        ),
        ({"name": "iou", "frame": "pixels"}, "frame must be one of original, resized, 0-1, 0-1000, got 'pixels'"),
        ({"name": "iou", "power": 0}, "power must be finite and > 0, got 0"),
        ({"name": "matched_iou", "matching": "best"}, "matching must be one of confidence, greedy, hungarian, got 'best'"),
        ({"name": "cer", "refuse_copies": False}, "options of the reward cer must be among column, unparsed, ignore_case, got"),
        ({"name": "soft_overlong", "cache": 1}, "reward soft_overlong must be given max_length, got cache"),
        ({"name": "chair"}, "reward chair must be given vocabulary, got no options"),
        ({"name": "cosine_length", "max_length": 9, "correct": "bleu"}, "reward must be one of exact_match, .*, got 'bleu'"),
        ({"name": "cer", "weight": math.inf}, "weight must be finite for the reward cer, got inf"),
        ({"name": "cer", "timeout": 0}, "timeout must be finite and > 0, got 0"),
        ({"name": "cer", "on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
        (
            {"name": "test_rewards:scaled", "factr": 2},
            "options of the reward test_rewards:scaled must be among length, factor, got factr",
        ),
    ],
    ids=str,
)
def test_wrong_configurations(reward, message):
    with pytest.raises(ValueError, match=message):
        Rewards([reward])


def test_two_places_for_weights():
    with pytest.raises(ValueError, match="reward_weights must hold one number per reward function, 1, got"):
        Rewards(["cer"], [1.0, 2.0])
    with pytest.raises(ValueError, match="reward_weights must be absent where rewards have a weight of their own"):
        Rewards([{"name": "cer", "weight": 1}], [1.0])
    assert Rewards([{"name": "cer"}], [2.0]).weights.tolist() == [2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "reward wrong must return one number per completion, 2, got 1"),
        (3.0, "reward wrong must return a list of 2 numbers, got 3.0"),
        ([1.0, "high"], "reward wrong must return finite numbers or None, got 'high' for completion 1"),
        ([math.nan, 1.0], "reward wrong must return finite numbers or None, got nan for completion 0"),
        ([1.0, math.inf], "reward wrong must return finite numbers or None, got inf for completion 1"),
        ([[1.0], 1.0], r"reward wrong must return finite numbers or None, got \[1.0\] for completion 0"),
        (None, "reward wrong must return a list of 2 numbers, got None"),
    ],
    ids=str,
)
def test_wrong_values(value, message):
    def wrong(**kwargs):
        return value

    with pytest.raises(ValueError, match=message):
        Rewards(wrong)(2)


def picky(completions, **kwargs):
    if "bad" in completions:
        raise KeyError("bad one")
    return [1.0] * len(completions)


async def picky_later(completions, **kwargs):
    return picky(completions)


@pytest.mark.parametrize("function", [picky, picky_later])
def test_a_reward_that_raises_names_the_sample_or_is_skipped(function, caplog):
    given = {"completions": ["a", "b", "bad"], "trainer_state": None}
    with pytest.raises(
        RuntimeError, match=f"reward {function.__name__} failed for completion 2 of sample 9: KeyError: 'bad one'"
    ):
        Rewards(function)(3, [8, 8, 9], **given)
    result = Rewards({"name": function, "on_error": "skip"})(3, **given)
    assert result.rewards[:2, 0].tolist() == [1, 1]
    assert result.rewards[2, 0].isnan()
    assert result.failed[:, 0].tolist() == [False, False, True]
    assert (
        f"reward {function.__name__} failed for 1 of 3 completions, which it does not score; the first error: KeyError"
        in caplog.text
    )

    def whole(completions, **kwargs):
        if len(completions) > 1:
            raise OSError("too many")
        return [1.0]

    with pytest.raises(RuntimeError, match="reward whole failed for the batch, of no single completion: too many"):
        Rewards({"name": whole, "on_error": "skip"})(3, **given)

    def needs(**kwargs):
        raise ImportError("no such package")

    for timeout in ({}, {"timeout": 1}):
        with pytest.raises(ImportError, match="no such package"):  # no fault of a sample's
            Rewards({"name": needs, "on_error": "skip", **timeout})(3, **given)


def slow(completions, **kwargs):
    assert len(completions) == 1
    time.sleep(0.6 if completions[0] == "slow" else 0)
    return [1.0]


async def slow_later(completions, **kwargs):
    await asyncio.sleep(0.6 if completions[0] == "slow" else 0)
    return [1.0]


@pytest.mark.parametrize("function", [slow, slow_later])
def test_time_out_of_a_sample(function):
    given = {"completions": ["a", "slow", "b"]}
    entry = {"name": function, "timeout": 0.1}
    result = Rewards({**entry, "on_error": "skip"})(3, **given)
    assert result.failed[:, 0].tolist() == [False, True, False]
    assert result.rewards[:, 0].nan_to_num(9).tolist() == [1, 9, 1]
    assert 0.1 <= result.seconds.item() < 0.6
    with pytest.raises(
        RuntimeError, match=f"reward {function.__name__} failed for completion 1: TimeoutError: no result within 0.1 s"
    ):
        Rewards(entry)(3, **given)


def test_coroutines_run_beside_one_another_and_inside_a_loop():
    barrier = threading.Barrier(2, timeout=5)

    async def first(**kwargs):
        await asyncio.to_thread(barrier.wait)
        return [1.0]

    def second(**kwargs):
        barrier.wait()
        return [2.0]

    async def notebook():
        return Rewards([first, second])(1)

    assert asyncio.run(notebook()).rewards.tolist() == [[1, 2]]


def test_every_name_is_built_or_says_what_it_needs():
    for name in NAMES:
        try:
            assert callable(build(name))
        except ValueError as error:
            assert f"reward {name} must be given" in str(error)  # noqa: PT017


# In the trainer


def test_missing_column_is_named_before_a_step_is_taken(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(4, "none")]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    for reward, column in (("cer", "answer"), ({"name": "iou", "column": "box"}, "box"), (scaled, "length")):
        name = reward["name"] if isinstance(reward, dict) else getattr(reward, "__name__", reward)
        with pytest.raises(
            ValueError, match=f"train_dataset must have a column '{column}', which reward {name} needs, got prompt"
        ):
            GRPOTrainer(tiny.text_model(), [reward], args, rows, processing_class=tiny.tokenizer())


def test_a_reference_of_the_wrong_kind_is_named_before_a_step_is_taken(tmp_path):
    rows = [{**row, "answer": answer} for row, answer in zip(tiny.rows(3, "none"), (1, None, "cat"), strict=True)]
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    for reward in ("numeric", {"name": "cosine_length", "max_length": 9, "correct": "numeric"}):
        name = reward if isinstance(reward, str) else reward["name"]
        message = rf"train_dataset: sample 2: answer must be a number, got 'cat' \(reward {name}\)"
        with pytest.raises(ValueError, match=message):
            GRPOTrainer(tiny.text_model(), [reward], args, rows, processing_class=tiny.tokenizer())


def test_functions_get_prompts_images_sizes_columns_and_state(tmp_path):
    seen = {}

    def spy(
        prompts, completions, completion_ids, images, image_sizes, resized_sizes, answer, trainer_state, **kwargs
    ):  # fmt: skip
        seen.update(locals(), step=trainer_state.global_step)
        return [0.0] * len(prompts)

    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=2,
        per_device_train_batch_size=6,
        max_completion_length=3,
        max_steps=1,
        shuffle_dataset=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    data = [{**row, "level": i} for i, row in enumerate(tiny.rows(3, "mixed"))]
    trainer = GRPOTrainer(tiny.vlm(), [spy, {"name": "numeric", "weight": 2}], args, data, processing_class=tiny.processor())
    trainer.train()
    assert seen["prompts"] == [data[i]["prompt"] for i in (0, 0, 1, 1, 2, 2)]
    assert seen["answer"] == ["0", "0", "1", "1", "2", "2"]
    assert seen["kwargs"] == {"level": [0, 0, 1, 1, 2, 2]}
    assert [len(images) for images in seen["images"]] == [0, 0, 1, 1, 2, 2]
    assert seen["images"][5][1].tobytes() == data[2]["images"][1].tobytes()
    assert seen["image_sizes"] == [[image.size for image in images] for images in seen["images"]]
    processor = tiny.processor().image_processor
    for images, sizes in zip(seen["images"], seen["resized_sizes"], strict=True):
        grids = processor(images=images, return_tensors="pt")["image_grid_thw"].tolist() if images else []
        assert sizes == [(width * 14, height * 14) for _, height, width in grids]
    assert seen["step"] == 0
    for ids, completion in zip(seen["completion_ids"], seen["completions"], strict=True):
        assert 1 <= len(ids) <= 3
        assert tiny.tokenizer().decode(ids, skip_special_tokens=True) == completion[0]["content"]
    log = trainer.state.log_history[0]
    assert 0 < log["rewards/numeric/unparsed"] <= 1
    assert log["rewards/spy/failed"] == 0
    assert log["rewards/spy/time"] > 0
