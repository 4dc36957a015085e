"""Conversations with tools, as an engine drives them: with the worker processes, the parser and the encoder of a run."""

import random
from collections import Counter

import pytest
from PIL import Image
from support import tiny

from vlmkernels.data.images import DEFAULT_LIMITS
from vlmkernels.data.samples import SampleError, read_sample
from vlmkernels.models.families import FAMILIES
from vlmkernels.rollout.episodes import Episode, Episodes, episode_metrics
from vlmkernels.rollout.turns import TurnEncoder
from vlmkernels.tools.calls import CallParser
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.pool import UNKNOWN, ToolPool

FAMILY = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
# Qwen's format of calls and results; the vocabulary of ``tiny`` has no other letters.
TEMPLATE = """\
{% macro content(message) %}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}\
{% endif %}{% endmacro %}{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ content(message) }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ content(message) }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def zoom(index: int) -> list:
    """Zoom.

    Args:
        index: which part.
    """
    return [{"type": "text", "text": f"crop {index}"}, {"type": "image", "image": tiny.image(index)}]


def read(index: int) -> str:
    """Read.

    Args:
        index: what.
    """
    if index < 0:
        raise ValueError("index must be positive")
    if index == 100:
        return "<|image_pad|>"
    if index == 101:
        return Image.new("RGB", (3000, 5))
    return f"text {index}"


class Maze:
    """An environment that counts its steps, and whose observation depends on the column ``kind``."""

    def reset(self, kind, **row):
        self.steps, self.row = 0, sorted(row)
        return {
            "none": None,
            "text": " go!",
            "image": [{"type": "text", "text": "see "}, {"type": "image", "image": tiny.image(5)}],
            "random": random.choice(["left", "right"]),
        }[kind]

    def step(self, index: int) -> str:
        """Step.

        Args:
            index: where to.
        """
        self.steps += index
        return f"at {self.steps}"

    def get_reward(self):
        return self.steps / 2


class Field:
    """An environment without a reward."""

    def reset(self, **row):
        return None

    def dig(self) -> str:
        """Dig."""
        return "earth"


@pytest.fixture(scope="module")
def processor():
    processor = tiny.processor()
    letters = [chr(code) for code in range(33, 127)]
    processor.tokenizer.add_tokens([letter for letter in letters if letter not in processor.tokenizer.get_vocab()])
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    return processor


@pytest.fixture
def start(processor):
    """Starts conversations: start(rows, num_generations, tools, ...)."""
    pools = []

    def begin(rows, num_generations=1, tools=None, **options):
        tools = Tools([zoom, read]) if tools is None else tools
        pools.append(ToolPool(tools, timeout=20, max_images=4, limits=DEFAULT_LIMITS, max_workers=2))
        samples = [read_sample(row, 10 + index) for index, row in enumerate(rows)]
        encoder, parser = TurnEncoder(processor, FAMILY), CallParser(processor.tokenizer)
        return Episodes(samples, num_generations, tools, pools[-1], encoder, parser, **options)

    yield begin
    for pool in pools:
        pool.close()


def row(text="what?", **columns):
    return {"prompt": [{"role": "user", "content": text}], **columns}


def call(name, **arguments):
    values = ", ".join(f'"{key}": {value}' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{values}}}}}\n</tool_call>'


@pytest.fixture
def ids(processor):
    """Tokens of a turn."""
    return lambda text, end="<|im_end|>": processor.tokenizer(text + end, add_special_tokens=False)["input_ids"]


def called(*calls):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]


def tool(name, content):
    return {"role": "tool", "name": name, "content": content}


def wait_for_all(episodes, waiting):
    """The observations of the waiting trajectories."""
    found = {}
    while set(found) != set(waiting):
        arrived = episodes.ready(wait=True)
        assert arrived
        assert not {k for k, _ in arrived} & set(found)
        found |= dict(arrived)
    assert episodes.ready(wait=False) == []
    return found


def text_of_ids(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_turns_of_several_trajectories(start, ids, processor):
    episodes = start([row(image=tiny.image(1)), row("why?")], 2)
    assert episodes.group.tolist() == episodes.rows == [0, 0, 1, 1]
    assert [sample.index for sample in episodes.samples] == [10, 11]
    assert [[s["function"]["name"] for s in sample.tools] for sample in episodes.samples] == [["zoom", "read"]] * 2
    assert episodes.end_turn(2, ids("let me see" + call("zoom", index=3)), True)
    assert not episodes.end_turn(0, ids("five"), True)
    assert episodes.end_turn(3, ids(call("read", index=1) + call("zoom", index=2)), True)
    found = wait_for_all(episodes, [2, 3])
    assert text_of_ids(processor, found[2].prompt_ids) == (
        "\n<|im_start|>user\n<tool_response>\ncrop 3<|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [o.images[0].tobytes() for o in found.values()] == [tiny.image(x).tobytes() for x in (3, 2)]
    assert found[3].inputs.num_images.tolist() == [1]
    assert not episodes.end_turn(3, ids("it is 2"), True)
    assert episodes.end_turn(2, ids(call("read", index=-1)), True)
    wait_for_all(episodes, [2])
    assert not episodes.end_turn(2, ids("cut" + call("read", index=1), ""), False)  # at the budget
    assert not episodes.end_turn(1, ids(""), True)

    first, empty, second, third = episodes.results()
    assert first.messages == [{"role": "assistant", "content": "five"}]
    assert (first.num_turns, first.tool_calls.total(), first.seconds, first.images) == (1, 0, 0, [])
    assert empty.messages == [{"role": "assistant", "content": ""}]
    image = second.messages[1]["content"][1].pop("image")
    assert image is second.images[0]
    assert second.messages == [
        {"role": "assistant", "content": "let me see", "tool_calls": called(("zoom", {"index": 3}))},
        tool("zoom", [{"type": "text", "text": "crop 3"}, {"type": "image"}]),
        {"role": "assistant", "content": "", "tool_calls": called(("read", {"index": -1}))},
        tool("read", "{'error': 'index must be positive'}"),
        {"role": "assistant", "content": "cut", "tool_calls": called(("read", {"index": 1}))},
    ]
    assert (second.num_turns, second.tool_calls, second.failures) == (3, {"zoom": 1, "read": 1}, {"zoom": 0, "read": 1})
    assert second.seconds > 0
    assert [message["role"] for message in third.messages] == ["assistant", "tool", "tool", "assistant"]
    assert [message.get("name") for message in third.messages] == [None, "read", "zoom", None]
    assert third.tool_calls == {"read": 1, "zoom": 1}
    assert third.environment is None
    assert third.rewards == {}


def test_the_end_of_a_turn_that_a_stop_string_ended(start, ids, processor):
    episodes = start([row()])
    assert episodes.end_turn(0, ids(call("read", index=1), ""), True)
    assert text_of_ids(processor, wait_for_all(episodes, [0])[0].prompt_ids).startswith("<|im_end|>\n<|im_start|>user")


def test_calls_that_fail(start, ids):
    episodes = start([row()])
    broken = '<tool_call>\n{"name": "read", "arguments"\n</tool_call>'
    assert episodes.end_turn(0, ids(call("fly", index=1) + broken + call("read", index='"x"')), True)
    observation = wait_for_all(episodes, [0])[0]
    assert observation.images == []
    (episode,) = episodes.results()
    results = episode.messages[1:]
    assert [message["role"] for message in results] == ["tool"] * 3
    assert all(message["content"].startswith("{'error': ") for message in results)
    assert episode.tool_calls.total() == episode.failures.total() == 3
    assert [message["name"] for message in results] == ["fly", UNKNOWN, "read"]
    assert episode.tool_calls == {"read": 1, UNKNOWN: 2}


def test_the_number_of_turns_with_calls(start, ids):
    episodes = start([row()], max_iterations=1)
    assert episodes.end_turn(0, ids(call("read", index=1)), True)
    wait_for_all(episodes, [0])
    assert not episodes.end_turn(0, ids(call("read", index=2)), True)
    (episode,) = episodes.results()
    assert [message["role"] for message in episode.messages] == ["assistant", "tool", "assistant"]
    assert episode.messages[-1]["tool_calls"] == called(("read", {"index": 2}))
    assert episode.tool_calls == {"read": 1}


def test_results_that_do_not_fit(start, ids):
    episodes = start([row()])
    for index in (1, 2):
        assert episodes.end_turn(0, ids(call("zoom", index=index)), True)
        wait_for_all(episodes, [0])
    episodes.refuse(0)
    (episode,) = episodes.results()
    assert [message["role"] for message in episode.messages] == ["assistant", "tool", "assistant"]
    assert [image.tobytes() for image in episode.images] == [tiny.image(1).tobytes()]
    assert episode.refused
    assert episode.tool_calls == {"zoom": 2}


def test_results_that_cannot_be_encoded(start, ids, processor):
    """The model gets an error instead, and the other results of the turn."""
    episodes = start([row()])
    assert episodes.end_turn(0, ids(call("read", index=100) + call("zoom", index=7) + call("read", index=101)), True)
    observation = wait_for_all(episodes, [0])[0]
    text = text_of_ids(processor, observation.prompt_ids)
    (episode,) = episodes.results()
    placeholder, shown, narrow = (message["content"] for message in episode.messages[1:])
    assert placeholder == "{'error': 'the result cannot be encoded'}"
    assert shown[0] == {"type": "text", "text": "crop 7"}
    assert "aspect ratio" in narrow
    assert text.count("<|image_pad|>") == len(observation.images) == len(episode.images) == 1
    assert (episode.tool_calls, episode.failures) == ({"read": 2, "zoom": 1}, {"read": 2, "zoom": 0})


def test_environments(start, ids):
    tools = Tools([read], {"maze": Maze, "field": Field})
    rows = [row(environment="maze", kind="text"), row(environment="field"), row(environment="maze", kind="none")]
    episodes = start(rows, 2, tools)
    assert episodes.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert [[s["function"]["name"] for s in sample.tools] for sample in episodes.samples] == [
        ["read", "step"],
        ["read", "dig"],
        ["read", "step"],
    ]
    assert [sample.prompt[0]["content"] for sample in episodes.samples] == [
        [{"type": "text", "text": text}] for text in ("what? go!", "what?", "what?")
    ]
    assert [sample.row["prompt"][0]["content"] for sample in episodes.samples] == ["what? go!", "what?", "what?"]
    for k in range(6):
        name, arguments = ("dig", {}) if k in (2, 3) else ("step", {"index": k + 1})
        assert episodes.end_turn(k, ids(call(name, **arguments)), True)
    wait_for_all(episodes, range(6))
    for k in range(6):
        assert not episodes.end_turn(k, ids("ok"), True)
    results = episodes.results()
    assert [episode.rewards for episode in results] == [{"Maze": 0.5}, {"Maze": 1.0}, {}, {}, {"Maze": 2.5}, {"Maze": 3.0}]
    assert [type(episode.environment) for episode in results] == [Maze, Maze, Field, Field, Maze, Maze]
    assert [results[k].environment.steps for k in (0, 1, 4, 5)] == [1, 2, 5, 6]
    assert results[0].environment.row == ["prompt"]
    assert results[0].messages[1] == tool("step", "at 1")


def test_an_observation_with_an_image(start):
    images = [tiny.image(1), tiny.image(2)]
    episodes = start([row("what?", kind="image", images=images)], 3, Tools(None, Maze))
    (sample,) = episodes.samples
    assert episodes.group.tolist() == [0, 0, 0]
    expected = [{"type": "image"}] * 2 + [
        {"type": "text", "text": "what?"},
        {"type": "text", "text": "see "},
        {"type": "image"},
    ]
    assert sample.prompt[0]["content"] == expected
    assert [image.tobytes() for image in sample.images] == [tiny.image(k).tobytes() for k in (1, 2, 5)]
    content = sample.row["prompt"][0]["content"]  # as TRL gives it to reward functions
    assert [part["type"] for part in content] == ["text", "text", "image"]
    assert content[2]["image"] is sample.images[2]
    assert episodes.samples[0].row["images"] == images


def test_trajectories_with_equal_observations_share_their_prompt(start):
    """Without a seed, each environment draws its observation, in any order; with one, a group has one task."""
    drawn = []
    for seed, count in ((None, 16), (3, 2), (3, 2), (4, 2), (5, 2), (6, 2)):
        episodes = start([row("a", kind="random"), row("b", kind="random")], count, Tools(None, Maze), seed=seed)
        assert episodes.rows == [0] * count + [1] * count
        assert episodes.group.tolist() == sorted(episodes.group.tolist())
        texts = [sample.prompt[0]["content"][0]["text"] for sample in episodes.samples]
        assert len(set(texts)) == len(texts) == (4 if seed is None else 2)
        assert [texts[k][0] for k in episodes.group] == ["a"] * count + ["b"] * count
        drawn.append(texts)
        episodes.results()
    assert drawn[1] == drawn[2]
    assert len({tuple(texts) for texts in drawn[1:]}) > 1  # other seeds, other tasks


def test_a_pool_serves_one_batch_after_another(start, ids):
    tools = Tools(None, Maze)
    episodes = start([row(kind="none")], 2, tools)
    assert episodes.end_turn(1, ids(call("step", index=4)), True)
    wait_for_all(episodes, [1])
    assert [episode.environment.steps for episode in episodes.results()] == [0, 4]
    again = Episodes(
        [read_sample(row(kind="none"), 0)], 2, tools, episodes._pool, episodes._encoder, episodes._parser, max_iterations=None
    )
    assert [episode.environment.steps for episode in again.results()] == [0, 0]


def test_rows_that_cannot_be_used(start):
    with pytest.raises(SampleError, match="sample 10: prompt must be a conversation, as the model has tools, got the string"):
        start([{"prompt": "what?"}])
    with pytest.raises(SampleError, match="sample 10: the column environment must be one of maze"):
        start([row(environment="no", kind="none")], 1, Tools(None, {"maze": Maze}))


def test_metrics():
    tools = Tools([read], {"maze": Maze, "field": Field})

    def episode(calls, failures, turns, seconds, refused=False):
        return Episode([], [], Counter(calls), Counter(failures), turns, seconds, refused, None, {})

    episodes = [
        episode({"read": 3, UNKNOWN: 1}, {"read": 1, UNKNOWN: 1}, 4, 2.0),
        episode({}, {}, 1, 0.0),
        episode({"step": 1}, {}, 2, 1.0, True),
        episode({"read": 1}, {}, 3, 0.0),
    ]
    assert episode_metrics(episodes, tools) == {
        "tools/call_frequency": 6 / 4,
        "tools/failure_frequency": 2 / 6,
        "tools/turns/mean": 2.5,
        "tools/turns/max": 4.0,
        "tools/seconds": 0.75,
        "tools/refused": 0.25,
        "tools/lost_environments": 0.0,
        "tools/read/calls": 1.0,
        "tools/read/failures": 0.25,
        "tools/step/calls": 0.25,
        "tools/step/failures": 0.0,
        "tools/dig/calls": 0.0,
        "tools/dig/failures": 0.0,
        "tools/unknown/calls": 0.25,
        "tools/unknown/failures": 1.0,
    }
    assert episode_metrics(episodes[1:2], tools)["tools/failure_frequency"] == 0.0
