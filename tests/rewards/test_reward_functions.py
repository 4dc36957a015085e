"""Scoring functions: values by hand, and errors of wrong references. Those of boxes are in test_boxes.py."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmkernels.rewards import answers, hallucination, length, text

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("parse", "written", "expected"),
    [
        (answers.find_answer, "<think>a</think><answer> b </answer>", "b"),
        (answers.find_answer, "<think>a</think> b", "b"),
        (answers.find_answer, "b", "b"),
        (answers.find_answer, "<answer>a</answer><answer>a</answer>", None),
        (answers.find_answer, "<answer>a", None),
        (answers.find_answer, "<answer><answer>a</answer>", None),
        (answers.find_answer, "<answer> </answer>", None),
        (answers.find_answer, "a</think>b</think>c", None),
        (answers.parse_number, "about -1,234.5 km", -1234.5),
        (answers.parse_number, "12%", 0.12),
        (answers.parse_number, "1e3", 1000.0),
        (answers.parse_number, "$.50", 0.5),
        (answers.parse_number, "5.", 5.0),
        (answers.parse_number, "3, that is 3.0", 3.0),
        (answers.parse_number, "3 or 4", None),
        (answers.parse_number, "1,2,3", None),
        (answers.parse_number, "v2", None),
        (answers.parse_number, "1e999", None),
        (answers.parse_number, "none", None),
        (answers.parse_count, "There are three.", 3.0),
        (answers.parse_count, "3 (three)", 3.0),
        (answers.parse_count, "two or three", None),
        (answers.parse_count, "one, 2", None),
        (answers.parse_choice, "b", "B"),
        (answers.parse_choice, "(C)", "C"),
        (answers.parse_choice, "B. A cat", "B"),
        (answers.parse_choice, "**B**", "B"),
        (answers.parse_choice, "The answer is D", "D"),
        (answers.parse_choice, "A dog", None),
        (answers.parse_choice, "A. cat B. dog", None),
        (answers.parse_choice, "", None),
        (answers.parse_yes_no, "Yes, it is.", "yes"),
        (answers.parse_yes_no, "no", "no"),
        (answers.parse_yes_no, "yes or no", None),
        (answers.parse_yes_no, "nothing", None),
    ],
)
def test_answers(parse, written, expected):
    assert parse(written) == expected


PIECES = st.sampled_from(
    ["<answer>", "</answer>", "<think>", "</think>", "[", "]", "(", "{", "}", ",", ":", '"bbox_2d"', "'label'", "1", "9" * 400,
     "(1,2)", "<ref>", "</ref>", "<box>", "<loc0001>", "<point x='1'", "/>",
     "-", ".", "1e999", "NaN", "%", "yes", "no", "three", "A", "B.", "```", "json", "\n", " ", "null", "\\d"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join)))
def test_whatever_a_model_writes_is_an_answer_or_none(text):
    answers.has_format(text, text)
    for name, parse in answers.PARSERS.items():
        value = parse(text)
        assert (
            value is None
            or name in ("text", "choice", "yes_no")
            or np.isfinite(value.boxes if name == "boxes" else value).all()
        )
    answer = answers.find_answer(text)
    assert answer is None or (answer and "<answer>" not in answer)


def test_text():
    assert text.exact_match(["a", " b ", None, "c", "C"], ["a", ["x", "b"], "c", None, "c"]) == [1, 1, None, None, 0]
    assert text.exact_match(["C", "12"], ["c", 12], ignore_case=True) == [1, 1]
    assert text.choice(["A", "B"], ["a", "A"]) == [1, 0]
    assert text.yes_no(["yes", "no", "yes"], ["Yes", True, False]) == [1, 0, 0]
    assert text.numeric([1.0, 1.04, -1.0, 0.0], [1, "1", -1.01, 0], abs_tol=0.02, rel_tol=0.01) == [1, 0, 1, 1]
    assert text.count([3, 4, 9, 0], [3, 3, 3, 0]) == [1, 0, 0, 1]
    assert text.count([3, 4, 9, 1], [3, 3, 3, 0], soft=True) == pytest.approx([1, 2 / 3, 0, 0])
    relaxed = text.relaxed_accuracy(
        ["105", "105.1", "25%", "0.0", "Yes", "2021", "-95"], ["100", 100, "0.25", 0, "yes", ["x"], -100]
    )
    assert relaxed == [1, 0, 1, 1, 1, 0, 1]


def test_edit_distances():
    assert text.cer(["sitting", "", "abcdefgh", None], ["kitten", "a", "a", "a"]) == pytest.approx([1 - 3 / 6, 0, 0, None])
    assert text.edit_ratio(["sitting", "", ""], ["kitten", "a", ""]) == pytest.approx([1 - 3 / 7, 0, 1])
    assert text.anls(["ABCD", "abxx", "abxxx", "x"], ["abcd", "abcd", "abcde", ["y", "x"]]) == pytest.approx([1, 0.5, 0, 1])
    assert text.cer(["A"], ["a"], ignore_case=True) == [1]


def test_math():
    predictions = ["1/2", "$x^2+1$", r"\boxed{4}", "x+1", "the answer is 5", "", None]
    references = [r"\frac{1}{2}", "1+x^2", "2+2", "x-1", "5", "3", "3"]
    assert text.math_equal(predictions, references) == [1, 1, 1, 0, 1, 0, None]


def test_length_and_repetition():
    scores = length.cosine_length([0, 50, 100, 0, 50, 5], [True, True, True, False, False, None], max_length=100)
    assert scores == pytest.approx([1, 0.75, -1, -1, -0.75, None])
    assert length.soft_overlong([0, 80, 90, 100, 120], max_length=100, cache=20) == [0, 0, -0.5, -1, -1]
    assert length.repetition([[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], []], ngram=2) == [0, -0.75, 0, 0]


def test_chair():
    vocabulary = {"dog": ["puppy"], "hot dog": [], "bus": [], "person": "man"}
    captions = ["A man eats two hot dogs.", "Puppies? A puppy and buses.", "A nice day.", "A dog, a dog, a bus"]
    objects = [["person", "hot dog"], ["dog"], ["dog"], ["puppy"]]
    assert hallucination.chair(captions, objects, vocabulary=vocabulary) == [1, 0.5, 0, 0.5]
    assert hallucination.chair(["a dog"], [None], vocabulary=vocabulary) == [None]
    assert hallucination.mentions(captions[:1], objects[:1], vocabulary)[0].mentioned == ["person", "hot dog"]
    with pytest.raises(TypeError, match=r"references\[0\] must be a list of names, got 'dog'"):
        hallucination.chair(["a dog"], ["dog"], vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("score", "prediction", "reference", "message"),
    [
        (text.exact_match, "a", {"a": 1}, "must be a string or number, got dict"),
        (text.exact_match, "a", [], r"must be a string or a list with at least one string, got \[\]"),
        (text.numeric, 1.0, "cat", "must be a number, got 'cat'"),
        (text.count, 1.0, math.nan, "must be a finite number, got nan"),
        (text.yes_no, "yes", "maybe", "must be yes or no, got 'maybe'"),
        (text.choice, "A", "cat", "must be an option letter, got 'cat'"),
    ],
)  # fmt: skip
def test_wrong_references_are_named(score, prediction, reference, message):
    with pytest.raises((ValueError, TypeError), match=rf"references\[1\] {message}"):
        score([None, prediction], [reference, reference])


def test_wrong_options():
    for call, message in (
        (lambda: text.numeric([1.0], [1], rel_tol=-1), "rel_tol must be >= 0, got -1"),
        (lambda: text.cer(["a"], []), "predictions must have one entry per reference, 0, got 1"),
        (lambda: length.soft_overlong([1], max_length=10, cache=11), r"cache must be in \(0, max_length = 10\], got 11"),
        (lambda: length.repetition([[1]], ngram=0), "ngram must be >= 1, got 0"),
        (lambda: hallucination.chair(["a"], [[]], vocabulary="dog"), r"vocabulary must be names of objects, .*, got 'dog'"),
        (lambda: hallucination.chair(["a"], [[]], vocabulary=[]), r"vocabulary must name at least one object, got \[\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_third_party_packages_are_imported_where_they_are_used():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'torchvision.ops', 'scipy', 'rapidfuzz', 'math_verify', 'transformers', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import vlmkernels.rewards as rewards\n"
        "assert not any(name.startswith('vlmkernels.train') for name in sys.modules)\n"
        "found = rewards.Rewards(['exact_match', 'think_answer_format'])(1, completions=['a'], answer=['a'])\n"
        "assert found.rewards.tolist() == [[1, 0]]\n"
        "try:\n"
        "    rewards.Rewards('cer')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "cer needs the package rapidfuzz: pip install 'vlmkernels[rewards]'\n"
