"""How completions are decoded for rewards, and what is known of the ends of their prompts."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import tiny

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.families import family_of
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.rewards.answers import text_of
from vlmkernels.rewards.compose import environment_reward
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.episodes import Episode
from vlmkernels.rollout.generate import Generate
from vlmkernels.rollout.score import decode_completions, opens_think, score, score_rollout

# Special tokens of the supported families' tokenizers.
TAGS = (
    *("<think>", "</think>", "<answer>", "</answer>", "<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|quad_end|>"),
    *("<|begin_of_box|>", "<|end_of_box|>", "<box>", "</box>", "<ref>", "<quad>", "<loc0012>", "<reasoning>", "</Answer>"),
)
HIDDEN = (
    *("<s>", "</s>", "<pad>", "<unk>", "<bos>", "<eos>", "<mask>", "[gMASK]", "<sop>", "<eop>", "<unused0>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|user|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|fim_prefix|>",
    ),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>", "<|end_of_text|>", "<|observation|>"),
    *("<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<video>"),
    *("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<|begin_of_image|>", "<|end_of_video|>", "[IMG_BREAK]"),
)
OWN = [tiny.SPECIAL[name] for name in ("end", "start", "pad", "vision_start", "vision_end", "image", "video")]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*TAGS, *HIDDEN]})
    return tokenizer


@pytest.mark.parametrize("tag", TAGS)
def test_tags_stay_even_if_they_are_special_tokens(tokenizer, tag):
    ids = tokenizer(f"a {tag} b{tag}", add_special_tokens=False)["input_ids"]
    assert decode_completions(tokenizer, [ids]) == [f"a {tag} b{tag}"]
    assert tag not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("token", [*OWN, *HIDDEN])
def test_other_special_tokens_are_removed(tokenizer, token):
    ids = tokenizer(f"a{token} b{token}", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(token) in ids
    assert decode_completions(tokenizer, [ids, []]) == ["a b", ""]


TEMPLATES = {
    "": False,
    "<think>\n": True,
    "<think>\n\n": True,
    "<think>": True,
    "<think>\n\n</think>\n\n": False,  # thinking is disabled
}


def inputs_of(prompts, tokenizer):
    samples = [read_sample({"prompt": prompt}, index) for index, prompt in enumerate(prompts)]
    return samples, encode(samples, tokenizer, family_of(tiny.text_model().config))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("end", TEMPLATES)
def test_a_template_that_opens_think(end, special):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<", ">", "/"], special_tokens=special)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n" + end)
    conversations = [[{"role": "user", "content": text}] for text in ("why?", "write <think>why</think>. <think>")]
    samples, prompts = inputs_of(conversations, tokenizer)
    assert opens_think(samples, prompts, tokenizer) == [TEMPLATES[end]] * 2
    samples, prompts = inputs_of(["why? <think>", "why?", "<think>why?"], tokenizer)
    assert opens_think(samples, prompts, tokenizer) == [True, False, False]


def test_rewards_get_tags_and_the_end_of_the_prompt():
    tokenizer, model = tiny.tokenizer(), tiny.text_model()
    tags = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    model.resize_token_embeddings(len(tokenizer))
    samples, prompts = inputs_of([[{"role": "user", "content": "why?"}]] * 2, tokenizer)
    close = tokenizer.convert_tokens_to_ids("</think>")
    allowed = {close, tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id}
    banned = [token for token in range(len(tokenizer)) if token not in allowed]
    rollout = Generate(model, tokenizer, Sampling(6, suppress_tokens=banned))(model, prompts, 4, 1.0)
    seen = {}

    def spy(completions, think_opened, completion_ids, **kwargs):
        seen.update(texts=[c[0]["content"] for c in completions], opened=think_opened, ids=completion_ids)
        return [0.0] * len(completions)

    scored = score_rollout(Rewards(spy), samples, rollout, tokenizer)
    assert seen["opened"] == [True] * 8
    assert any("</think>" in text for text in seen["texts"])
    assert seen["texts"] == [tokenizer.decode([t for t in ids if t != tokenizer.eos_token_id]) for ids in seen["ids"]]
    assert [completion[0]["content"] for completion in scored.completions] == seen["texts"]


def tool_call(index):
    return [{"type": "function", "function": {"name": "zoom", "arguments": {"index": index}}}]


def trajectory(*turns, rewards=None, environment=None):
    """A trajectory whose turns but the last call a tool that returns an image."""
    messages, images = [], [tiny.image(index) for index in range(len(turns) - 1)]
    for index, image in enumerate(images):
        parts = [{"type": "text", "text": f"crop {index}"}, {"type": "image", "image": image}]
        messages.append({"role": "assistant", "content": turns[index], "tool_calls": tool_call(index)})
        messages.append({"role": "tool", "name": "zoom", "content": parts})
    messages.append({"role": "assistant", "content": turns[-1]})
    calls = Counter(zoom=len(images))
    return Episode(messages, images, calls, Counter(), len(turns), 0.0, False, environment, rewards or {})


def scored(reward_funcs, episodes, answers=None, **options):
    rows = [{"prompt": [{"role": "user", "content": "what?"}], "answer": a} for a in answers or ["5"] * len(episodes)]
    samples = [read_sample(row, 10 + index) for index, row in enumerate(rows)]
    count = len(samples)
    return score(Rewards(reward_funcs, **options), samples, [""] * count, [[1]] * count, [[]] * count, episodes=episodes)


def test_rewards_get_the_messages_and_images_of_a_trajectory():
    maze = SimpleNamespace(steps=3)
    episodes = [trajectory("look", "5", environment=maze), trajectory("7")]
    seen = {}

    def spy(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [1.0] * len(completions)

    result = scored(spy, episodes)
    assert seen["completions"] == [episode.messages for episode in episodes] == result.completions
    assert seen["tool_images"] == [episode.images for episode in episodes]
    assert seen["sampled_ids"] == seen["completion_ids"] == [[1], [1]]
    assert seen["environments"] == [maze, None]
    assert seen["environment_rewards"] == [{}, {}]
    assert seen["images"] == [[], []]
    assert result.episodes == episodes


def test_without_tools_rewards_get_no_arguments_of_tools():
    def spy(completions, **kwargs):
        assert kwargs.keys().isdisjoint({"sampled_ids", "tool_images", "environments", "environment_rewards"})
        return [1.0] * len(completions)

    result = score(Rewards(spy), [read_sample({"prompt": "what?"}, 0)], ["5"], [[1]], [[]])
    assert result.episodes is None
    assert result.scores.turns is None


def test_rewards_judge_the_last_turn():
    """An answer in an earlier turn, or in the result of a tool, earns nothing."""
    episodes = [trajectory("let me look", "5"), trajectory("5", "let me look"), trajectory("5"), trajectory("7", "7")]
    result = scored(["exact_match"], episodes, ["5", "5", "5", "crop 0"])
    assert result.scores.rewards.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_text_of_a_trajectory():
    turns = trajectory("first", "last").messages
    assert text_of(turns) == "last"
    assert text_of(turns[:2]) == "first"
    prompt = [{"role": "user", "content": "why?"}, *turns]  # all of a prompt is read, also with calls in it
    assert text_of(prompt) == "why?firstcrop 0last"
    thought = {"role": "assistant", "content": "<answer>5</answer>", "reasoning_content": "hm"}
    assert text_of([thought]) == "<think>hm</think><answer>5</answer>"


def test_reasoning_of_a_message_counts_for_the_format():
    episodes = [trajectory("look", "<answer>5</answer>"), trajectory("<answer>5</answer>")]
    episodes[0].messages[-1]["reasoning_content"] = "it is five"
    assert scored(["think_answer_format"], episodes).scores.rewards.flatten().tolist() == [1.0, 0.0]


def test_rewards_of_environments():
    """One per class; a trajectory with another environment is not scored."""
    episodes = [trajectory("a", rewards={"Maze": 0.5}), trajectory("b", rewards={"Field": 2}), trajectory("c")]
    rewards = Rewards([environment_reward("Maze"), environment_reward("Field")])
    rewards.check_columns([], "train_dataset")
    assert rewards.names == ["Maze", "Field"]
    scores = scored([environment_reward("Maze"), environment_reward("Field")], episodes).scores
    assert str(scores.rewards.tolist()) == "[[0.5, nan], [nan, 2.0], [nan, nan]]"
    with pytest.raises(
        ValueError, match="reward Maze must return finite numbers or None, got inf for completion 0 of sample 10"
    ):
        scored(environment_reward("Maze"), [trajectory("a", rewards={"Maze": math.inf})])


def test_rewards_of_turns():
    """They are summed for the logs, and returned by turn, weighted, for the advantages."""
    episodes = [trajectory("a", "b", "c"), trajectory("d"), trajectory("e", "f")]

    def process(completions):
        return [[1.0, None, 3.0], None, [0.5, 0.25]]

    def brevity(completions):
        return [[1.0, 1.0, 1.0], [2.0], 5.0]

    def outcome(completions):
        return [10.0, 20.0, 30.0]

    scores = scored([process, brevity, outcome], episodes, weights=[2.0, 10.0, 1.0]).scores
    assert str(scores.rewards.tolist()) == "[[4.0, 3.0, 10.0], [nan, 2.0, 20.0], [0.75, 5.0, 30.0]]"
    assert str(scores.outcomes.tolist()) == "[[nan, nan, 10.0], [nan, nan, 20.0], [nan, 5.0, 30.0]]"
    assert scores.scored_turns.tolist() == [[True, True, False], [False, True, False], [True, False, False]]
    assert str(scores.turns.tolist()) == "[[12.0, 10.0, 16.0], [20.0, nan, nan], [1.0, 0.5, nan]]"

    chosen = scores.select(torch.tensor([2, 0]))
    assert str(chosen.turns.tolist()) == "[[1.0, 0.5, nan], [12.0, 10.0, 16.0]]"
    assert chosen.scored_turns.tolist() == [[True, False, False], [True, True, False]]
    without = Scores(*(x[:1] for x in scores[:3]), scores.seconds)
    assert torch.equal(without.outcomes, without.rewards)
    joined = Scores.cat([without, chosen._replace(turns=chosen.turns[:, :2])])
    assert str(joined.turns.tolist()) == "[[nan, nan], [1.0, 0.5], [12.0, 10.0]]"
    assert joined.scored_turns.tolist() == [[False] * 3, [True, False, False], [True, True, False]]
    assert Scores.cat([without, without]).turns is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "reward process must return one number per turn, 2, got 1 for completion 1 of sample 11"),
        ([1.0, 2.0, 3.0], "reward process must return one number per turn, 2, got 3 for completion 1 of sample 11"),
        ([1.0, "x"], "reward process must return finite numbers or None, got 'x' for turn 1 of completion 1 of sample 11"),
        ([math.nan, 1.0], "reward process must return finite numbers or None, got nan for turn 0 of completion 1 of sample 11"),
    ],
)
def test_wrong_rewards_of_turns(value, message):
    def process(completions):
        return [[1.0], value][-len(completions) :]

    episodes = [trajectory("a"), trajectory("b", "c")]
    with pytest.raises(ValueError, match=message):
        scored(process, episodes)
    scores = scored({"name": process, "on_error": "skip"}, episodes).scores
    assert str(scores.rewards.tolist()) == "[[1.0], [nan]]"
    assert scores.failed.tolist() == [[False], [True]]
    assert str(scores.turns.tolist()) == "[[1.0, nan], [nan, nan]]"


def test_functions_cannot_score_turns_without_tools():
    samples = [read_sample({"prompt": "what?"}, 0)]
    with pytest.raises(ValueError, match="must return finite numbers or None"):
        score(Rewards(lambda completions: [[1.0]]), samples, ["5"], [[1]], [[]])


def test_a_rollout_with_tools():
    """The samples are those of the conversations, not those of the dataset."""
    tokenizer = tiny.tokenizer()
    samples, prompts = inputs_of([[{"role": "user", "content": text}] for text in ("why?", "what?")], tokenizer)
    episodes = [trajectory("a", "b"), trajectory("c"), trajectory("d")]
    ids = torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]])
    rollout = Rollout(prompts, torch.tensor([0, 1, 1]), ids, ids > 0, torch.zeros(3, dtype=torch.bool))
    conversations = SimpleNamespace(samples=samples, results=lambda: episodes)
    seen = {}

    def spy(completions, completion_ids, prompts, think_opened):
        seen.update(ids=completion_ids, prompts=[p[0]["content"] for p in prompts], opened=think_opened)
        return [0.0] * len(completions)

    result = score_rollout(Rewards(spy), samples[:1], rollout, tokenizer, conversations)
    assert seen == {"ids": [[5, 6, 7], [8, 9], [4]], "prompts": ["why?", "what?", "what?"], "opened": [None] * 3}
    assert result.completions == [episode.messages for episode in episodes]
    assert result.samples == [samples[0], samples[1], samples[1]]


def test_trajectories_without_their_environment_are_not_scored():
    """Reward functions do not see them, also if they score turns."""
    seen = []

    def calls(environments):
        seen.append(environments)
        return [environment.calls for environment in environments]

    def turns(completions):
        return [[1.0, 2.0] for _ in completions]

    first, second = SimpleNamespace(calls=3), SimpleNamespace(calls=5)
    episodes = [
        trajectory("look", "5", environment=first),
        trajectory("look", "6"),
        trajectory("look", "7", environment=second),
    ]
    episodes[1] = replace(episodes[1], lost="a call timed out")
    scores = scored([calls, turns], episodes).scores
    assert seen == [[first, second]]
    nan = math.nan
    torch.testing.assert_close(scores.rewards, torch.tensor([[3.0, 3], [nan, nan], [5, 3]]), equal_nan=True)
    torch.testing.assert_close(scores.turns, torch.tensor([[1.0, 2], [nan, nan], [1, 2]]), equal_nan=True)
    torch.testing.assert_close(scores.outcomes, torch.tensor([[3.0, nan], [nan, nan], [5, nan]]), equal_nan=True)


def test_lengths_and_repetitions_are_those_of_the_sampled_tokens():
    """Results of tools, such as the equal tokens of an image, are neither long nor repetitive answers."""
    episodes = [trajectory("look", "5")]
    sample = read_sample({"prompt": [{"role": "user", "content": "what?"}], "answer": "5"}, 0)
    rewards = Rewards(["repetition", {"name": "cosine_length", "correct": "exact_match", "max_length": 100}])
    ids, sampled = [[1, 2, *[9] * 80, 3, 4]], [[1, 2, 3, 4]]
    given = rewards, [sample], [""]
    actual = score(*given, ids, [[]], episodes=episodes, sampled_ids=sampled).scores.rewards
    expected = score(*given, sampled, [[]], episodes=episodes).scores.rewards
    torch.testing.assert_close(actual, expected)
    assert actual[0, 0] == 0
    assert score(*given, ids, [[]], episodes=episodes).scores.rewards[0, 0] < -0.8
