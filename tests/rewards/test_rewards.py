"""The rewards of a run: names, import paths, options, calls and time-outs; errors of wrong rewards and wrong values."""

import asyncio
import functools
import math
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from vlmkernels.rewards import Rewards, compose
from vlmkernels.rewards.compose import resolve

torch.set_num_threads(1)


def half(completions, **kwargs):
    return [None if c == "skip" else 0.5 for c in completions]


def test_scores_of_every_kind():
    def ones(completions, **kwargs):
        return torch.ones(len(completions))

    def flags(completions, **kwargs):
        return [c == "a" for c in completions]

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
    assert resolve("test_rewards:Judges.half") is Judges.half
    with pytest.raises(TypeError, match="reward must be a function or the name of one, not a torch module, got Linear"):
        resolve(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"reward_funcs must have distinct names \(set log_as to rename one\), got cer, cer"):
        Rewards(["cer", {"name": "cer", "column": "text"}])
    with pytest.raises(ValueError, match="reward_funcs must have at least one function, got none"):
        Rewards([])


class Judges:
    half = staticmethod(half)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleu", r"reward must be one of exact_match, .* or an import path 'module:function', got 'bleu'$"),
        ("exact_mach", r"got 'exact_mach' \(did you mean exact_match\?\)"),
        ("IoU", r"got 'IoU' \(did you mean iou\?\)"),
        ("yes-no", r"got 'yes-no' \(did you mean yes_no\?\)"),
        ("accuracy_reward", r"got 'accuracy_reward' \(did you mean math_equal\?\)"),
        ("think_format_reward", r"got 'think_format_reward' \(did you mean think_answer_format\?\)"),
        ("my_rewards.politeness", r"got 'my_rewards.politeness' \(did you mean my_rewards:politeness\?\)"),
        (":politeness", "reward must be one of .* or an import path 'module:function', got ':politeness'$"),
        ("rewards/mine.py:f", r"name of a module on sys.path, not a file, got .* \(did you mean rewards.mine:f\?\)"),
        ("./mine.py:f", r"name of a module on sys.path, not a file, got .* \(did you mean mine:f\?\)"),
        ("nowhere:f", "reward must be importable, got 'nowhere:f': No module named 'nowhere'"),
        ("math:f", "reward must be importable, got 'math:f': .* no attribute 'f'"),
        ("math:sqrrt", r"got 'math:sqrrt': .* no attribute 'sqrrt' \(did you mean sqrt\?\)"),
        ("broken_module:f", "reward must be importable, got 'broken_module:f': ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_names(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"weight": 1}, "reward must have the key 'name', got {'weight': 1}"),
        (
            {"name": "iou", "fram": "resized"},
            r"options of the reward iou must be among column, unparsed, frame, .*, power, got fram \(did you mean frame\?\)",
        ),
        ({"name": "iou", "wieght": 2}, r"got wieght \(did you mean weight\?\)"),
        ({"name": "iou", "frame": "resize"}, r"frame must be one of .*, got 'resize' \(did you mean resized\?\)"),
        ({"name": "cosine_length", "max_length": 9, "correct": "numerc"}, r"got 'numerc' \(did you mean numeric\?\)"),
        ({"name": "iou", "frame": "pixels"}, "frame must be one of original, .*, 0-100, 0-1000, 0-1024, got 'pixels'"),
        ({"name": "iou", "power": 0}, "power must be a finite number > 0, got 0"),
        ({"name": "matched_iou", "matching": "best"}, "matching must be one of confidence, greedy, hungarian, got 'best'"),
        ({"name": "cer", "refuse_copies": False}, "options of the reward cer must be among column, unparsed, ignore_case, got"),
        ({"name": "soft_overlong", "cache": 1}, "options of the reward soft_overlong must include max_length, got cache"),
        ({"name": "chair"}, "options of the reward chair must include vocabulary, got none"),
        ({"name": "cosine_length", "max_length": 9, "correct": "bleu"}, "reward must be one of exact_match, .*, got 'bleu'"),
        ({"name": "cer", "weight": math.inf}, "weight must be finite for the reward cer, got inf"),
        ({"name": "cer", "timeout": 0}, "timeout must be a finite number > 0, got 0"),
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
    with pytest.raises(ValueError, match="reward_weights must have one number per reward function, 1, got"):
        Rewards(["cer"], [1.0, 2.0])
    with pytest.raises(ValueError, match="reward_weights must be None if a reward sets its own weight"):
        Rewards([{"name": "cer", "weight": 1}], [1.0])
    with pytest.raises(ValueError, match="weight must be finite for the reward cer, got nan"):
        Rewards(["cer"], [math.nan])
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
        ({"a": 1.0, "b": 0.0}, "list of 2 numbers, got {'a': 1.0, 'b': 0.0}: a dict has no order of completions"),
        ({0: 1.0, 1: 0.0}, "list of 2 numbers, got {0: 1.0, 1: 0.0}: a dict has no order"),
        ({0.5, 1.0}, "list of 2 numbers, got {.*}: a set has no order"),
        (frozenset((0, 1)), "a frozenset has no order"),
        ({0: 1.0, 1: 0.0}.keys(), "a dict_keys has no order"),
        ("10", "list of 2 numbers, got '10': a str has no order"),
        (torch.tensor(1.0), r"list of 2 numbers, got tensor\(1.\): iteration over a 0-d tensor"),
        (torch.ones(2, 2), r"finite numbers or None, got tensor\(\[1., 1.\]\) for completion 0"),
        (np.ones((2, 2)), r"finite numbers or None, got array\(\[1., 1.\]\) for completion 0"),
        (torch.tensor([0.5, math.nan]), "finite numbers or None, got nan for completion 1"),
    ],
    ids=str,
)
def test_wrong_values(value, message):
    def wrong(**kwargs):
        return value

    for on_error in ("raise",) if "finite" in message else ("raise", "skip"):
        with pytest.raises(ValueError, match=message):
            Rewards({"name": wrong, "on_error": on_error})(2)


@pytest.mark.parametrize(
    "returned",
    [
        lambda: (0.5, 1),
        lambda: (value for value in (0.5, 1.0)),
        lambda: map(float, ("0.5", "1")),
        lambda: {"a": 0.5, "b": 1.0}.values(),
        lambda: np.array([0.5, 1.0]),
        lambda: np.array([[0.5], [1.0]], dtype=np.float16),
        lambda: [np.float32(0.5), np.bool_(True)],
        lambda: [np.array(0.5), np.array([1])],
        lambda: torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True),
        lambda: torch.tensor([[0.5], [1.0]]),
        lambda: [torch.tensor(0.5, requires_grad=True), torch.tensor([True])],
        lambda: [Decimal("0.5"), Fraction(1, 1)],
        lambda: [0.5, True],
    ],
)
def test_values_with_a_clear_meaning(returned):
    def given(**kwargs):
        return returned()

    async def later(**kwargs):
        return returned()

    assert Rewards([given, later])(2).rewards.tolist() == [[0.5, 0.5], [1, 1]]


BAD = (
    *(math.nan, math.inf, -math.inf, 1e39, 10**400, Decimal("nan"), Decimal("snan"), 1j),
    *("high", "0.5", b"1", [1.0], {"score": 1.0}, {1.0}, ..., np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])),
    *(torch.tensor(math.nan), np.float32("inf"), torch.empty(1, device="meta"), KeyError("bad")),
)


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{type(value).__name__} {value}"[:30])
@pytest.mark.parametrize("timeout", [None, 5])
def test_a_wrong_value_of_one_completion_is_skipped(value, timeout, caplog):
    """With ``on_error: skip`` it is not scored and counts as failed; otherwise the error names completion and sample."""

    def some(index, **kwargs):
        return [value if k == 1 else float(k) for k in index]

    entry = {"name": some, "on_error": "skip", "timeout": timeout}
    scores = Rewards(entry)(3, [7, 7, 8], index=[0, 1, 2])
    assert scores.rewards[:, 0].nan_to_num(9).tolist() == [0, 9, 2]
    assert scores.failed[:, 0].tolist() == [False, True, False]
    assert not scores.unparsed.any()
    assert "reward some failed for 1 of 3 completions, which are not scored; first error: " in caplog.text
    with pytest.raises((ValueError, RuntimeError), match=r"reward some .* completion 1 of sample 7"):
        Rewards({**entry, "on_error": "raise"})(3, [7, 7, 8], index=[0, 1, 2])


def test_an_iterator_that_raises_is_attributed():
    def one_by_one(completions, **kwargs):
        for completion in completions:
            yield 1 / len(completion)

    with pytest.raises(RuntimeError, match="reward one_by_one failed for completion 1: ZeroDivisionError"):
        Rewards(one_by_one)(3, completions=["a", "", "b"])
    scores = Rewards({"name": one_by_one, "on_error": "skip"})(3, completions=["a", "", "bb"])
    assert scores.rewards[:, 0].nan_to_num(9).tolist() == [1, 9, 0.5]


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
        f"reward {function.__name__} failed for 1 of 3 completions, which are not scored; first error: KeyError" in caplog.text
    )

    def whole(completions, **kwargs):
        if len(completions) > 1:
            raise OSError("too many")
        return [1.0]

    with pytest.raises(RuntimeError, match="reward whole failed for the batch but not for any single completion: too many"):
        Rewards({"name": whole, "on_error": "skip"})(3, **given)

    def needs(**kwargs):
        raise ImportError("no such package")

    for timeout in ({}, {"timeout": 1}):
        with pytest.raises(ImportError, match="no such package"):  # not the fault of a completion
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


def test_a_coroutine_that_blocks_its_loop_times_out(monkeypatch):
    """The loop is abandoned, and the next call has another."""
    monkeypatch.setattr(compose, "GRACE_S", 0.1)
    release = threading.Event()

    async def blocking(completions, **kwargs):
        if completions[0] == "block":
            release.wait(20)
        return [1.0]

    rewards = Rewards({"name": blocking, "timeout": 0.1, "on_error": "skip"})
    start = time.monotonic()
    scores = rewards(2, completions=["block", "a"])
    assert time.monotonic() - start < 10
    assert scores.failed.all()
    assert rewards(1, completions=["a"]).rewards.tolist() == [[1]]
    release.set()


def test_a_tower_of_powers_with_a_timeout():
    """A built-in reward with a timeout runs in a process, and gives the same scores there as here."""
    given = {"completions": ["9^{9^{9}}", "1/2", "(", "3"], "prompts": ["q"] * 4, "answer": ["9", "0.5", "1", None]}
    start = time.monotonic()
    apart = Rewards([{"name": "math_equal", "timeout": 5, "on_error": "skip"}])(4, images=[object()] * 4, **given)
    assert time.monotonic() - start < 60
    here = Rewards("math_equal")(3, **{name: values[1:] for name, values in given.items()})
    assert apart.rewards[0].nan_to_num(0).tolist() == [0]
    for name in ("rewards", "unparsed", "failed"):
        torch.testing.assert_close(getattr(apart, name)[1:], getattr(here, name), equal_nan=True)
