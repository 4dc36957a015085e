"""Known hacks of rewards: answers that a model could write to get an undeserved reward earn nothing."""

import json

import pytest
import torch

from vlmkernels.rewards import Unparsed
from vlmkernels.rewards.builtin import build

torch.set_num_threads(1)


def answer(text):
    return f"<think>It looks so.</think><answer>{text}</answer>"


def is_unparsed(score):
    return isinstance(score, Unparsed)


def test_hack_box_spam():
    """Many boxes, one of which is right, earn almost nothing."""
    truth, grid = [30, 30, 50, 50], [[x, y, x + 20, y + 20] for x in range(0, 90, 10) for y in range(0, 90, 10)]
    assert truth in grid
    honest, spam = json.dumps([truth]), json.dumps(grid)
    for name in ("matched_iou", "mean_ap", "weighted_match"):
        for options in ({}, {"matching": "confidence"}, {"matching": "greedy"}) if name == "matched_iou" else ({},):
            best, worst = build(name, **options)([honest, spam], answer=[[truth]] * 2)
            assert best == pytest.approx(1)
            # In VLM-R1's weighted sum, extra boxes lower only half of the completeness, and not the position.
            assert worst < (0.86 if name == "weighted_match" else 0.02)
    unlimited = build("mean_ap", over_prediction_penalty=False)
    confident = json.dumps([{"bbox_2d": b, "score": 0.9 if b == truth else 0.1} for b in grid])
    assert unlimited([confident], answer=[[truth]]) == pytest.approx([1])  # without the penalty, extra boxes are free
    for name in ("iou", "giou", "point_in_box"):
        assert is_unparsed(build(name)([spam], answer=[truth])[0])


def test_hack_repeated_answer():
    """Several answers, of which the last or any other is right."""
    text = "<think>x</think><answer>4</answer><answer>5</answer>"
    for name in ("exact_match", "numeric", "count"):
        assert is_unparsed(build(name)([text], answer=["5"])[0])
        assert is_unparsed(build(name)(["<answer>4<answer>5</answer>"], answer=["5"])[0])
    assert build("think_answer_format")([text], prompts=[""]) == [0]
    assert is_unparsed(build("numeric")(["1 2 3 4 5"], answer=[5])[0])
    assert is_unparsed(build("choice")(["A. B. C. D."], answer=["C"])[0])


def test_hack_always_yes():
    """With a balanced reward, always saying "yes" is worth no more than guessing, even if most answers are "yes"."""
    truth = ["yes"] * 8 + ["no"] * 2
    always = build("yes_no")(["yes"] * 10, answer=truth)
    assert sum(always) / 10 == 0.8
    balanced = build("yes_no", balanced=True)
    assert sum(balanced(["yes"] * 10, answer=truth)) / 10 == pytest.approx(0.5)
    assert sum(balanced(["no"] * 10, answer=truth)) / 10 == pytest.approx(0.5)
    assert sum(balanced(truth, answer=truth)) / 10 == pytest.approx(1)
    assert is_unparsed(build("yes_no")(["yes and no"], answer=["yes"])[0])


def test_hack_answer_copied_from_the_prompt():
    """Copies of the prompt's example, of its list of options, and of its template."""
    prompt = "Where is the cat? Answer like <think>your thoughts</think><answer>[100, 100, 200, 200]</answer>."
    copied = "<think>your thoughts</think><answer>[100, 100, 200, 200]</answer>"
    truth = [90, 100, 200, 210]
    for prompts in ([prompt], [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]]):
        for name, reference in (("iou", truth), ("giou", truth), ("matched_iou", [truth])):
            assert is_unparsed(build(name)([copied], prompts, answer=[reference])[0])
            assert build(name)([answer("[90, 100, 200, 210]")], prompts, answer=[reference]) == pytest.approx([1])
        assert is_unparsed(build("cer")([copied], prompts, answer=["[100, 100, 200, 201]"])[0])
        assert build("think_answer_format")([copied], prompts) == [0]
        assert build("think_answer_format")([answer("[1, 2, 3, 4]")], prompts) == [1]
    assert is_unparsed(build("choice")(["A. cat B. dog"], ["Which? A. cat B. dog"], answer=["A"])[0])
    assert build("choice")([answer("A")], ["Answer like <answer>A</answer>"], answer=["A"]) == [
        1
    ]  # the right answer may occur in the prompt


@pytest.mark.parametrize("think", ["", "  ", "...", "\n-\n"])
def test_hack_empty_think(think):
    assert build("think_answer_format")([f"<think>{think}</think><answer>a</answer>"]) == [0]
    assert build("think_answer_format")([f"<think>why</think><answer>{think}</answer>"]) == [0]


def test_hack_boxes_in_the_resized_frame():
    """A box that is right in the resized frame is wrong in the original frame; the option `frame` decides."""
    sizes = {"image_sizes": [[(1000, 1000)]], "resized_sizes": [[(500, 500)]]}
    truth, seen = [[600, 600, 800, 800]], ["[300, 300, 400, 400]"]
    assert build("iou")(seen, answer=truth, **sizes) == [0]
    assert build("iou", frame="resized")(seen, answer=truth, **sizes) == [1]
    larger = {"image_sizes": [[(500, 500)]], "resized_sizes": [[(1000, 1000)]]}
    outside = build("iou")(["[600, 600, 800, 800]"], answer=[[300, 300, 400, 400]], **larger)
    assert is_unparsed(outside[0])  # and is counted in the logs
