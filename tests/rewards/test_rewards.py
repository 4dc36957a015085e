"""The rewards of a run: names, import paths, options, calls and time-outs; errors of wrong rewards and wrong values."""

import asyncio
import functools
import math
import threading
import time

import pytest
import torch

from vlmkernels.rewards import Rewards
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
    with pytest.raises(ValueError, match=r"reward must be one of exact_match, .* or an import path .*, got 'bleu'"):
        resolve("bleu")
    with pytest.raises(ValueError, match="reward must be importable, got 'nowhere:f': No module named 'nowhere'"):
        resolve("nowhere:f")
    with pytest.raises(ValueError, match=r"reward must be importable, got 'math:f': .* no attribute 'f'"):
        resolve("math:f")
    with pytest.raises(TypeError, match="reward must be a function or the name of one, not a torch module, got Linear"):
        resolve(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"reward_funcs must have distinct names \(set log_as to rename one\), got cer, cer"):
        Rewards(["cer", {"name": "cer", "column": "text"}])
    with pytest.raises(ValueError, match="reward_funcs must have at least one function, got none"):
        Rewards([])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"weight": 1}, "reward must have the key 'name', got {'weight': 1}"),
        (
            {"name": "iou", "fram": "resized"},
            "options of the reward iou must be among column, unparsed, frame, .*, power, got fram",
        ),
        ({"name": "iou", "frame": "pixels"}, "frame must be one of original, resized, 0-1, 0-1000, got 'pixels'"),
        ({"name": "iou", "power": 0}, "power must be finite and > 0, got 0"),
        ({"name": "matched_iou", "matching": "best"}, "matching must be one of confidence, greedy, hungarian, got 'best'"),
        ({"name": "cer", "refuse_copies": False}, "options of the reward cer must be among column, unparsed, ignore_case, got"),
        ({"name": "soft_overlong", "cache": 1}, "options of the reward soft_overlong must include max_length, got cache"),
        ({"name": "chair"}, "options of the reward chair must include vocabulary, got none"),
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
    with pytest.raises(ValueError, match="reward_weights must have one number per reward function, 1, got"):
        Rewards(["cer"], [1.0, 2.0])
    with pytest.raises(ValueError, match="reward_weights must be None if a reward sets its own weight"):
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
