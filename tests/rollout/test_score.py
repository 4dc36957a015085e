"""How completions are decoded for rewards, and what is known of the ends of their prompts."""

import pytest
from support import tiny

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.families import family_of
from vlmkernels.rewards import Rewards
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.generate import Generate
from vlmkernels.rollout.score import decode_completions, opens_think, score_rollout

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
