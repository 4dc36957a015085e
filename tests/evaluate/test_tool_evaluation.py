"""Evaluation with tools: trajectories in files of predictions, their metrics, rewards and pages, and the command line."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tool_models import Microscope, picture, tool_model, zoom

from vlmkernels.cli import main
from vlmkernels.evaluate.evaluation import Evaluation, EvaluationRows, Scoring, reward_parts
from vlmkernels.evaluate.page import write_page
from vlmkernels.evaluate.predictions import Completion, Predictions
from vlmkernels.evaluate.sampling import Decoding, ToolUse, predict
from vlmkernels.record.html import thumbnail
from vlmkernels.record.turns import CallRow, TurnRow
from vlmkernels.rewards import Rewards
from vlmkernels.rewards.compose import environment_reward
from vlmkernels.rollout.agent import Agent
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.options import ToolOptions

torch.set_num_threads(1)
GREEDY = Decoding(max_completion_length=300, batch_size=3)


def rows() -> list[dict]:
    return [{**row, "answer": f"saw {k}"} for k, row in enumerate(tool_model().rows)]


def messages_and_calls(completions, environments) -> list[float]:
    """A reward of the whole trajectory."""
    return [100.0 * len(messages) + environment.calls for messages, environment in zip(completions, environments, strict=True)]


@pytest.fixture
def sample_to():
    """Return a function that samples predictions of the tool model to a file."""
    agents = []

    def sample(path: Path, decoding=GREEDY, rewards=None, tools=(zoom,), environment=None, data=None, **options) -> Predictions:
        agents.append(Agent(Tools(list(tools), environment), ToolOptions(**options)))
        case = tool_model()
        return predict(case.model, case.processor, data or rows(), decoding, path, tools=ToolUse(agents[-1], rewards))

    yield sample
    for agent in agents:
        agent.close()


class Dice:
    """An environment whose ``reset`` and tool draw random numbers."""

    def reset(self, **row) -> str:
        return f" {random.random()}"

    def zoom(self, index: int) -> str:
        """Roll.

        Args:
            index: which.
        """
        return f"{random.random()}"


@pytest.mark.parametrize("decoding", [GREEDY, Decoding(2, 1.0, 300, seed=3)], ids=["greedy", "sampled"])
def test_random_tools_do_not_depend_on_the_batch_size(tmp_path, sample_to, decoding):
    sizes = 1, 3
    found = [
        sample_to(tmp_path / f"{size}.jsonl", replace(decoding, batch_size=size), tools=(), environment=Dice) for size in sizes
    ]
    assert found[0].by_sample == found[1].by_sample
    texts = {turn.text for (completion, *_) in found[0].by_sample.values() for turn in completion.turns if turn.role == "tool"}
    assert len(texts) > 1
    other = sample_to(tmp_path / "other.jsonl", replace(decoding, seed=9), tools=(), environment=Dice)
    assert other.by_sample != found[0].by_sample


def usual_turns(row: int, num_calls: int = 2) -> list[TurnRow]:
    """The greedy trajectory of a row of the tool model."""
    turns = []
    for index in range(row, row + num_calls):
        pictures = [picture(100 + index), picture(200 + index)] if index == 3 else [picture(100 + index)]
        thinks = "hm" if row % 2 else ""
        turns.append(TurnRow("assistant", thinks, calls=[CallRow("zoom", json.dumps({"index": index}))]))
        turns.append(TurnRow("tool", f"crop {index}", name="zoom", images=[thumbnail(image) for image in pictures]))
    return [*turns, TurnRow("assistant", f"saw {row}")]


def test_predictions_hold_trajectories(tmp_path, sample_to, monkeypatch):
    path = tmp_path / "p.jsonl"
    predictions = sample_to(path)
    tokenizer = tool_model().processor.tokenizer
    for index in range(4):
        (completion,) = predictions.by_sample[index, "image"]
        assert (completion.text, completion.truncated, completion.counts) == (f"saw {index}", False, (3, 2, 0))
        assert completion.turns == usual_turns(index)
        # The length counts turns of the model, which end with <|im_end|>; the ids also have the results.
        turns = tokenizer.decode(completion.ids).split("<|im_start|>assistant\n")
        of_model = [turn[: turn.index("<|im_end|>") + len("<|im_end|>")] for turn in turns]
        assert completion.length == sum(len(tokenizer(turn)["input_ids"]) for turn in of_model) < len(completion.ids)
    assert Predictions.read(path).by_sample == predictions.by_sample
    settings, *lines = map(json.loads, path.read_text().splitlines())
    assert (
        settings["settings"] | {"tools": ["zoom"], "max_tool_calling_iterations": None, "rewards": []} == settings["settings"]
    )
    assert [len(line["tool_images"]) for line in lines] == [2, 2, 3, 3]

    monkeypatch.setattr("vlmkernels.evaluate.sampling.Predictor.__call__", None)  # nothing is sampled again
    assert sample_to(path).by_sample == predictions.by_sample
    with pytest.raises(ValueError, match="made with other settings: max_tool_calling_iterations None, now 1"):
        sample_to(path, max_tool_calling_iterations=1)
    with pytest.raises(ValueError, match=r"made with other settings: tools .'zoom'., now .*; schemas "):
        sample_to(path, tools=(zoom, picture_size))
    other = [{**row, "answer": "corrected"} for row in rows()]  # which the stored rewards and environments have not seen
    with pytest.raises(ValueError, match="made with other settings: dataset "):
        sample_to(path, data=other)
    case = tool_model()
    with pytest.raises(ValueError, match=r"made with other settings: .*tools .'zoom'., now None"):
        predict(case.model, case.processor, rows(), GREEDY, path)


def picture_size(index: int) -> str:
    """Return the size of a picture.

    Args:
        index: which picture.
    """
    return f"{picture(index).size}"


def test_batch_size_changes_nothing(tmp_path, sample_to):
    sampled = {"num_generations": 3, "temperature": 1.0, "max_completion_length": 300}
    found = [sample_to(tmp_path / f"{size}.jsonl", Decoding(batch_size=size, **sampled)).by_sample for size in (1, 12)]
    assert found[0] == found[1]
    assert len({completion.counts for group in found[0].values() for completion in group}) > 1


def test_the_limit_of_calls(tmp_path, sample_to):
    predictions = sample_to(tmp_path / "p.jsonl", max_tool_calling_iterations=1)
    for index in range(4):
        (completion,) = predictions.by_sample[index, "image"]
        *turns, last = completion.turns
        assert turns == usual_turns(index)[:2]
        assert last.calls == [CallRow("zoom", json.dumps({"index": index + 1}))]  # which is not run
        assert completion.counts == (2, 1, 0)


def test_rewards_of_trajectories(tmp_path, sample_to):
    """They are called while the environments exist, and stored. Further rewards see the text of the last turn."""
    path, names = tmp_path / "p.jsonl", ["exact_match", "messages_and_calls", "Microscope"]
    rewards = Rewards(["exact_match", messages_and_calls, environment_reward("Microscope")])
    predictions = sample_to(path, rewards=rewards, tools=(), environment=Microscope)
    expected = {"exact_match": 1.0, "messages_and_calls": 502.0, "Microscope": 2.0}
    assert [completion.rewards for (completion,) in predictions.by_sample.values()] == [expected] * 4
    read = Predictions.read(path)
    found = reward_parts(rewards, EvaluationRows(rows(), Scoring()), [read])
    assert {name: values.tolist() for name, values in found.items()} == {name: [[expected[name]]] * 4 for name in names}
    seen = []

    def length(completions) -> list[float]:
        seen.extend(completions)
        return [float(len(messages)) for messages in completions]

    found = reward_parts(Rewards([length]), EvaluationRows(rows(), Scoring()), [read])
    assert list(found) == [*names, "length"]
    assert seen == [[{"role": "assistant", "content": f"saw {index}"}] for index in range(4)]

    def of_environments(environments) -> list[float]:
        return [0.0] * len(environments)

    message = "reward of_environments needs environments, which exist only while .*p.jsonl has no values of this reward"
    with pytest.raises(ValueError, match=message):
        reward_parts(Rewards(["exact_match", of_environments]), EvaluationRows(rows(), Scoring()), [read])


def test_metrics_and_page_of_trajectories(tmp_path):
    """Three trajectories of two samples, and completions without tools."""
    predictions = Predictions(tmp_path / "p.jsonl").resume({})
    failed = [
        TurnRow("assistant", "", calls=[CallRow("zoom", "{}")]),
        TurnRow("tool", "{'error': 'no'}", name="zoom", error=True),
    ]
    whole = [Completion("saw 0", turns=usual_turns(0), tool_calls=2, tool_failures=0)]
    broken = [Completion("saw 1", turns=[*failed, *usual_turns(1)], tool_calls=3, tool_failures=1)]
    predictions.append("image", {0: [*whole, *broken], 1: [*whole, *whole], 2: [*broken, *broken], 3: [*broken, *whole]})
    evaluation = Evaluation([predictions], rows(), Scoring(replicates=10))
    values = {result.metric: result.estimate.value for result in evaluation.results}
    assert (values["mean_turns"], values["mean_tool_calls"], values["mean_tool_failures"]) == (3.5, 2.5, 0.5)
    write_page(tmp_path / "page.html", "title", "", evaluation)
    cards = (tmp_path / "page.html").read_text().split('<div class="card ')[1:]
    for card, counts, num_shots in zip(cards, ((1, 1), (2, 0), (0, 2), (1, 1)), ((4, 3), (4, 2), (4, 2), (4, 3)), strict=True):
        assert card.count('<dd class="">3 turns · 2 calls · 0 failures</dd>') == counts[0]
        assert card.count('<dd class="">4 turns · 3 calls · 1 failure</dd>') == counts[1]
        assert card.count('class="turn error"') == counts[1]
        assert (card.count("background-image: var("), card.count("url(")) == num_shots  # equal images are in the page once
    plain = Predictions(tmp_path / "plain.jsonl").resume({})
    plain.append("image", {index: [Completion("saw 0")] for index in range(4)})
    results = Evaluation([plain], rows(), Scoring(replicates=10)).results
    assert not {"mean_turns", "mean_tool_calls", "mean_tool_failures"} & {result.metric for result in results}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": [{"role": "assistant"}]}, "line 1: turns must be those of a trajectory, got TypeError"),
        (
            {"turns": [{"role": "tool", "text": "", "images": [1]}]},
            "line 1: turns must be those of a trajectory, got IndexError",
        ),
        ({"turns": "two"}, "line 1: turns must be those of a trajectory, got AttributeError"),
    ],
)
def test_bad_trajectories(tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    line = {"index": 0, "completions": [{"text": "a", **change}], "tool_images": [thumbnail(picture(0))]}
    path.write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        Predictions.read(path)
    path.write_text(json.dumps({**line, "tool_images": [["https://x.org/a.png", 1, 1, False]]}))
    with pytest.raises(ValueError, match="line 1: the source of an image must be a data URI"):
        Predictions.read(path)


def test_images_cannot_be_hidden_from_tools(tmp_path):
    case = tool_model()
    with pytest.raises(ValueError, match="views must be only 'image' with tools, which can return the image, got image, grey"):
        predict(case.model, case.processor, rows(), GREEDY, tmp_path / "p", views=("image", "grey"), tools=ToolUse(None))


def test_the_command_line(tmp_path, capsys):
    case = tool_model()
    case.model.save_pretrained(tmp_path / "model")
    case.processor.save_pretrained(tmp_path / "model")
    lines = []
    for index, row in enumerate(rows()):
        row["images"][0].save(tmp_path / f"{index}.png")
        lines.append(json.dumps({**row, "images": [f"{index}.png"]}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    output = tmp_path / "eval.json"
    flags = ["--dataset", str(tmp_path / "data.jsonl"), "--output", str(output), "--max_completion_length", "300"]
    model = ["--model", str(tmp_path / "model"), "--environment", "support.tool_models:Microscope"]
    assert main(["eval", *flags, *model, "--reward", f"{__name__}:messages_and_calls", "--tool_timeout", "60"]) == 0
    result = json.loads(output.read_text())
    assert result["rewards"] == {"exact_match": 1.0, "messages_and_calls": 502.0, "Microscope": 2.0}
    assert result["tools"] | {"tools": ["zoom"], "rewards": [*result["tools"]["rewards"][:2], "Microscope"]} == result["tools"]
    assert result["metrics"]["exact"]["mean_turns"]["value"] == 3.0
    assert re.search(r"^exact +mean_tool_calls +2.000 ", capsys.readouterr().out, flags=re.MULTILINE)
    assert (tmp_path / "eval.html").read_text().count("<b>zoom</b> {&quot;index&quot;: 3}") == 2  # of rows 2 and 3

    (saved,) = result["predictions"]
    assert main(["eval", *flags, "--predictions", saved, "--reward", "cer"]) == 0
    scored = json.loads(output.read_text())["rewards"]
    assert scored == {"exact_match": 1.0, "messages_and_calls": 502.0, "Microscope": 2.0, "cer": 1.0}
