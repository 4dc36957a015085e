"""Parsers of numbers, counts, options, yes or no, and formulas: the value that a careful reader sees, or none."""

import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from vlmkernels.rewards import Unparsed, answers, formula_equality, text
from vlmkernels.rewards.builtin import build

ROWS = [
    (answers.parse_number, "−5", -5.0),
    (answers.parse_number, "–5", -5.0),
    (answers.parse_number, "- 5", None),
    (answers.parse_number, "+5", 5.0),
    (answers.parse_number, "-$5", -5.0),
    (answers.parse_number, "minus five", -5.0),
    (answers.parse_number, "50 %", 0.5),
    (answers.parse_number, "50 percent", 0.5),
    (answers.parse_number, "50\\%", 0.5),
    (answers.parse_number, "1.234.567", None),
    (answers.parse_number, "3–5", None),
    (answers.parse_number, "3-5", None),
    (answers.parse_number, "3 - 5", None),
    (answers.parse_number, "1/2", 0.5),
    (answers.parse_number, "3 1/2", 3.5),
    (answers.parse_number, "3\\frac{1}{2}", 3.5),
    (answers.parse_number, "1,5", None),
    (answers.parse_number, "5,5", None),
    (answers.parse_number, "1,234.5", 1234.5),
    (answers.parse_number, "1.5 x 10^3", 1500.0),
    (answers.parse_number, "10³", 1000.0),
    (answers.parse_number, "2^5", None),
    (answers.parse_number, "5 cm", 5.0),
    (answers.parse_number, "5cm", 5.0),
    (answers.parse_number, "US$5", 5.0),
    (answers.parse_number, "5k", None),
    (answers.parse_number, "5 million", 5000000.0),
    (answers.parse_number, "3.14.15", None),
    (answers.parse_number, "3:45", None),
    (answers.parse_number, "2024-01-05", None),
    (answers.parse_number, "(5)", 5.0),
    (answers.parse_number, "５", 5.0),
    (answers.parse_number, "**5**", 5.0),
    (answers.parse_number, "So 2+3=5, thus \\boxed{5}", 5.0),
    (answers.parse_number, "\\boxed{1} and \\boxed{2}", None),
    (answers.parse_number, "at least 5", None),
    (answers.parse_number, "5 or more", None),
    (answers.parse_number, "sqrt(4)", None),
    (answers.parse_number, "3+4=7", 7.0),
    (answers.parse_number, "H2O has 3 atoms", 3.0),
    (answers.parse_number, "between five and 10", None),
    (answers.parse_number, "two thirds", None),
    (answers.parse_number, "two and a half", None),
    (answers.parse_number, "5万", None),
    (answers.parse_number, "有5只猫", 5.0),
    (answers.parse_count, "twenty-one", 21.0),
    (answers.parse_count, "thirty-two cats", 32.0),
    (answers.parse_count, "one hundred", 100.0),
    (answers.parse_count, "a hundred and two", 102.0),
    (answers.parse_count, "two dozen", 24.0),
    (answers.parse_count, "no one", 0.0),
    (answers.parse_count, "There are no cats.", 0.0),
    (answers.parse_count, "no idea", None),
    (answers.parse_count, "one or more", None),
    (answers.parse_count, "twenty-first", None),
    (answers.parse_count, "nineteen eighty", None),
    (answers.parse_count, "hundreds of people", None),
    (answers.parse_count, "2.5", None),
    (answers.parse_count, "-3", None),
    (answers.parse_count, "three", 3.0),
    (answers.parse_count, "the second one", None),
    (answers.parse_choice, "\\boxed{\\text{B}}", "B"),
    (answers.parse_choice, "answer is d", "D"),
    (answers.parse_choice, "Answer: (b)", "B"),
    (answers.parse_choice, "(B) cat", "B"),
    (answers.parse_choice, "B: cat", "B"),
    (answers.parse_choice, "Option b", "B"),
    (answers.parse_choice, "$B$", "B"),
    (answers.parse_choice, "`B`", "B"),
    (answers.parse_choice, "The correct answer is **C**.", "C"),
    (answers.parse_choice, "B and C", None),
    (answers.parse_choice, "Answer: A, B", None),
    (answers.parse_choice, "The answer is (a) and (b)", None),
    (answers.parse_choice, "Vitamin C.", None),
    (answers.parse_choice, "Plan A.", None),
    (answers.parse_choice, "B. Vitamin C.", "B"),
    (answers.parse_choice, "I think it is a cat", None),
    (answers.parse_choice, "The answer is A dog", None),
    (answers.parse_choice, "The answer is not B", None),
    (answers.parse_choice, "Option B is wrong", None),
    (answers.parse_choice, "R&B", None),
    (answers.parse_choice, "答案是B", "B"),
    (answers.parse_yes_no, "**Yes**", "yes"),
    (answers.parse_yes_no, "Answer: No", "no"),
    (answers.parse_yes_no, "\\boxed{Yes}", "yes"),
    (answers.parse_yes_no, "no doubt", None),
    (answers.parse_yes_no, "No. 5", None),
    (answers.parse_yes_no, "There is no cat.", "no"),
    (answers.parse_yes_no, "It has no wheels", None),
    (answers.parse_yes_no, "Yes, there is no cat", "yes"),
    (answers.parse_yes_no, "Yes. No.", None),
    (answers.parse_yes_no, "not yes", None),
]


@pytest.mark.parametrize(("parse", "written", "expected"), ROWS)
def test_parsers(parse, written, expected):
    assert parse(written) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("1728", "1331 and 1728", 0),
        ("1331, 1728", "1331 and 1728", 1),
        ("-2", "a=1 \\text{ or } a=-2", 0),
        ("1, -2", "1 \\text{ or } -2", 1),
        ("2", "2\\sqrt{3} \\text{ meters}", 0),
        ("2\\sqrt{3}", "2\\sqrt{3} \\text{ meters}", 1),
        ("\\frac{\\pi}{2} \\text{ rad}", "\\frac{\\pi}{2}", 1),
        ("3", "3xy", 0),
        ("3 apples", "3xy", 0),
        ("2yx", "2xy", 1),
        ("x^2+2xy+y^2", "(x+y)^2", 1),
        ("ab+ac", "a(b+c)", 1),
        ("\\boxed{3yx}", "3xy", 1),
        ("5 cm", "5", 1),
        ("5 cm", "5 m", 0),
        ("5 centimeters", "5 cm", 1),
        ("5 dollars", "$5", 1),
        ("€5", "$5", 0),
        ("**5**", "5", 1),
        ("−5", "-5", 1),
        ("−5", "5", 0),
        ("50 %", "1/2", 1),
        ("1,234", "1234", 1),
        ("x=5", "5", 1),
        ("y=5", "x=5", 0),
        ("\\boxed{\\dfrac{1}{2}}", "0.5", 1),
        ("[1,2)", "(1,2)", 0),
        ("{2,1}", "\\{1,2\\}", 1),
        ("90°", "90", 1),
        ("East", "\\text{east}", 1),
        ("sqrt(3)", "\\sqrt{3}", 1),
        ("5m", "5", 0),
        ("3 1/2", "3.5", 1),
        ("0.00000001", "0.00000002", 0),
        ("10000000", "10000001", 0),
    ],
)
def test_math_equal_compares_the_whole(prediction, reference, expected):
    assert text.math_equal([prediction], [reference]) == [expected]


@pytest.mark.parametrize(
    "bomb", ["9^{9^{9}}", "9**9**9", "10000000!", "((9!)!)!", "10^{1000000000}", "9" * 5000, "(" * 500 + "1" + ")" * 500]
)
def test_formulas_without_end_are_unparsed(bomb):
    (score,) = build("math_equal")([bomb], answer=["9"])
    assert isinstance(score, Unparsed)


def test_a_process_that_ends_is_started_again(monkeypatch):
    monkeypatch.setattr(formula_equality, "LIMIT_S", 1)
    scores = []
    work = [r"\binom{9000000}{4500000}", "2x"]
    thread = threading.Thread(target=lambda: scores.extend(text.math_equal(work, ["5", "x+x"])))
    thread.start()
    thread.join(60)
    assert scores == [0, 1]
    assert isinstance(scores[0], Unparsed)


@pytest.mark.parametrize("three", [3, 3.0, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3), torch.tensor(3.0),
                                   Decimal(3), Fraction(3), "3"])  # fmt: skip
def test_references_are_numbers_of_any_type(three):
    assert text.exact_match(["3"], [three]) == [1]
    assert text.numeric([3.0], [three]) == text.count([3], [three]) == [1]
    assert text.relaxed_accuracy(["3"], [three]) == text.anls(["3"], [three]) == text.math_equal(["3"], [three]) == [1]


def test_wrong_references():
    assert text.exact_match(["0.1", "3.0"], [np.float32(0.1), 3.0]) == [1, 1]
    assert text.yes_no(["yes"], [np.bool_(True)]) == [1]
    for function in (text.exact_match, text.anls):
        with pytest.raises(ValueError, match=r"references\[0\] must be a string or a finite number, got nan"):
            function(["a"], [float("nan")])
        with pytest.raises(TypeError, match=r"references\[0\] must be a string or number, got bytes"):
            function(["a"], [b"a"])
