"""What follows a turn with tool calls, against TRL's own method and against whole conversations."""

import copy
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_families

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.demo.model import END_OF_TURN, build_processor
from vlmkernels.models.families import FAMILIES, TEXT, family_of
from vlmkernels.models.trajectories import chain, text_inputs
from vlmkernels.rollout.turns import ResultError, TurnEncoder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2

QWEN = next(family for family in FAMILIES if family.name == "qwen2_5_vl")
SPECIAL = (
    *("<|user|>", "<|assistant|>", "<|observation|>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>"),
)
_CONTENT = """\
{% macro content(message) %}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"""
_CALLS = """\
{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}"""
# The results of a turn share one message of the user, as in Qwen's templates.
HERMES = (
    _CONTENT
    + """\
{% for message in messages %}{% if message.role == 'tool' %}\
{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\\n' }}<tool_response>
{{ content(message) }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}{% else %}<|im_start|>{{ message.role }}
{{ content(message) }}CALLS<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""".replace("CALLS", _CALLS)
)
# The same, but only the last message of the assistant has its (empty) thoughts, as in Qwen3's.
FORGETS_THOUGHTS = HERMES.replace(
    _CALLS, "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + _CALLS
)
# A turn of the model has no end of its own: the header of the next message ends it, as in GLM's.
GLM = (
    _CONTENT
    + """\
{% for message in messages %}{% if message.role == 'tool' %}\
{% if loop.previtem.role != 'tool' %}<|observation|>{% endif %}{{ '\\n' }}<tool_response>
{{ content(message) }}
</tool_response>{% else %}<|{{ message.role }}|>
{{ content(message) }}\
{% for call in message.tool_calls or [] %}
<tool_call>{{ call.function.name }}{% for key, value in call.function.arguments.items() %}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value }}</arg_value>{% endfor %}
</tool_call>{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
)
# Results are part of the model's turn, which goes on after them, as in Gemma 4's.
GEMMA = (
    _CONTENT
    + """\
{% for message in messages %}{% if message.role != 'tool' %}\
{% if loop.first or loop.previtem.role != 'tool' %}<|turn>{{ message.role }}
{% endif %}\
{% for call in message.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}{}<tool_call|>{% endfor %}\
{{ content(message) }}{% if not message.tool_calls %}<turn|>
{% elif loop.last %}<|tool_response>{% endif %}{% else %}\
<|tool_response>response:{{ message.name }}{value:{{ content(message) }}}<tool_response|>{% endif %}{% endfor %}\
{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model
{% endif %}"""
)
TEMPLATES = {"hermes": HERMES, "forgets_thoughts": FORGETS_THOUGHTS, "glm": GLM, "gemma": GEMMA}
OF_TRL = ("qwen3_vl", "qwen3_5_think", "qwen3_5_nothink", "qwen3_vl_training")


def picture(seed, width=56, height=28):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def result(*content, name="zoom"):
    """The message of a tool. content: texts and images."""
    parts = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content]
    return {"role": "tool", "name": name, "content": parts}


@pytest.fixture(scope="module")
def processor():
    processor = build_processor(["zoom crop look arguments name response tool call"])
    processor.tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)}, replace_extra_special_tokens=False)
    return processor


def with_template(processor, template):
    processor = copy.copy(processor)
    processor.chat_template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return processor


def ids_of_trl(processor, messages):
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    if not hasattr(grpo_trainer.GRPOTrainer, "_get_tool_suffix_ids"):
        pytest.skip("this version of TRL has no tools")
    is_vlm = hasattr(processor, "tokenizer")
    tokenizer = processor.tokenizer if is_vlm else processor
    names = {"chat_template": None, "chat_template_kwargs": {}, "_is_vlm": is_vlm, "_tokenizer": tokenizer}
    trainer = SimpleNamespace(processing_class=processor, **names)
    return grpo_trainer.GRPOTrainer._get_tool_suffix_ids(trainer, messages)


def ids_of(observation):
    return observation.inputs.inputs["input_ids"][0].tolist()


MESSAGES = {
    "text": [result("crop 7")],
    "image": [result("crop ", picture(1), " of 7")],
    "several": [result(picture(1, 56, 56), "crop", picture(2)), result("it is 5", name="read"), result(picture(3, 112))],
}


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("template", [*TEMPLATES, *OF_TRL])
def test_tokens_are_those_of_trl(processor, template, messages):
    pytest.importorskip("trl")
    if template in OF_TRL:
        file = files("trl") / "chat_templates" / f"{template}.jinja"
        if not file.is_file():
            pytest.skip("this version of TRL has no such template")
        processor = with_template(processor, file.read_text())
    else:
        processor = with_template(processor, TEMPLATES[template])
    # TRL replaces templates that forget thoughts.
    processor_of_trl = with_template(processor, HERMES) if template == "forgets_thoughts" else processor
    encoder, tokenizer = TurnEncoder(processor, QWEN), processor.tokenizer
    assert encoder.images_unsupported is None
    observation = encoder(MESSAGES[messages], tokenizer.eos_token_id)
    assert ids_of(observation) == ids_of_trl(processor_of_trl, MESSAGES[messages])
    parts = [part for message in MESSAGES[messages] for part in message["content"]]
    assert observation.images == [part["image"] for part in parts if part["type"] == "image"]


def test_tokens_of_a_text_model_are_those_of_trl(processor):
    tokenizer = copy.copy(processor.tokenizer)
    tokenizer.chat_template = HERMES
    encoder = TurnEncoder(tokenizer, TEXT)
    messages = [{"role": "tool", "name": name, "content": f"{name} says 7"} for name in ("zoom", "read")]
    assert ids_of(encoder(messages, tokenizer.eos_token_id)) == ids_of_trl(tokenizer, messages)
    assert encoder.images_unsupported == "a text model has no images"
    with pytest.raises(NotImplementedError, match="results of tools must be text, got an image: a text model has no images"):
        encoder([result(picture(1))], None)


@pytest.mark.parametrize(
    ("template", "ends", "last", "first"),
    [
        ("hermes", [END_OF_TURN], END_OF_TURN, "\n<|im_start|>user"),
        ("hermes", [END_OF_TURN], "}", "<|im_end|>\n<|im_start|>user"),  # a stop string ended the turn
        ("hermes", [END_OF_TURN, "<|endoftext|>"], "<|endoftext|>", "<|im_end|>\n<|im_start|>user"),
        ("glm", ["<|observation|>", "<|user|>"], "<|observation|>", "\n<tool_response>"),
        ("glm", ["<|observation|>", "<|user|>"], "<|user|>", "<|observation|>\n<tool_response>"),
        ("gemma", ["<|tool_response>", "<turn|>"], "<|tool_response>", "response:zoom"),
        ("gemma", ["<|tool_response>", "<turn|>"], "<turn|>", "<|tool_response>response:zoom"),
        ("gemma", ["<|tool_response>", "<turn|>"], None, "<|tool_response>response:zoom"),
    ],
)
def test_the_token_that_ends_a_turn_occurs_once(processor, template, ends, last, first):
    processor, tokenizer = with_template(processor, TEMPLATES[template]), processor.tokenizer
    encoder = TurnEncoder(processor, QWEN, end_tokens=tokenizer.convert_tokens_to_ids(ends))
    last_token = None if last is None else tokenizer.convert_tokens_to_ids(last)
    for messages in ([result("crop")], [result(picture(1))]):
        observation = encoder(messages, last_token)
        assert tokenizer.decode(ids_of(observation)).startswith(first)
        assert tokenizer.decode(observation.prompt_ids).startswith(first)


def test_arguments_of_the_template_and_of_the_processor(processor):
    template = HERMES.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n{% if thinks %}<think>\n{% endif %}")
    size = {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}}
    processor = with_template(processor, template)
    usual, other = (
        ids_of(TurnEncoder(processor, QWEN, options, arguments)([result(picture(1, 56, 56))], None))
        for options, arguments in ((None, None), ({"thinks": True, "continue_final_message": False}, size))
    )
    image = processor.image_token_id
    assert (usual.count(image), other.count(image)) == (4, 1)
    assert processor.tokenizer.decode(other).endswith("<|im_start|>assistant\n<think>\n")
    assert "<think>" not in processor.tokenizer.decode(usual)


def test_the_last_tokens_of_a_prompt(processor):
    encoder = TurnEncoder(with_template(processor, HERMES), QWEN)
    sample = read_sample({"prompt": [{"role": "user", "content": "what is it? " * 100}]}, 0)
    text = processor.tokenizer.decode(encoder.last_tokens(sample))
    assert text.endswith("it? <|im_end|>\n<|im_start|>assistant\n")
    assert len(text) < 300


def test_vllm_gets_one_placeholder_per_image(processor):
    processor = with_template(processor, HERMES)
    observation = TurnEncoder(processor, QWEN)(MESSAGES["several"], None)
    text, image = processor.tokenizer.decode(observation.prompt_ids), "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        f"<|im_end|>\n<|im_start|>user\n<tool_response>\n{image}crop{image}\n</tool_response>\n<tool_response>\nit is 5\n"
        f"</tool_response>\n<tool_response>\n{image}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    counts = [4, 2, 4]  # tokens of 28 x 28 pixels
    expected = text
    for count in counts:
        expected = expected.replace(image, f"<|vision_start|>{'X' * count}<|vision_end|>", 1)
    assert processor.tokenizer.decode(ids_of(observation)) == expected.replace("X", "<|image_pad|>")


# A template for all families, with the end of their tokenizer's texts as the end of a turn.
GENERIC = (
    _CONTENT
    + """\
{% for message in messages %}[{{ message.role }}]{{ content(message) }}\
{% for call in message.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor %}</s>
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
)


def case_of(name):
    case = tiny_families.case(name)
    processor = copy.copy(case.processor)
    processor.chat_template = GENERIC.replace("IMAGE", case.image)
    return processor, family_of(case.model.config)


def plain(batch):
    """Its tokens without padding, and its other inputs."""
    mask = batch.inputs["attention_mask"][0].bool()
    axes = {name: batch.family.axis(name) for name in batch.inputs}
    inputs = {name: x[:, mask] if axes[name] == "token" else x for name, x in batch.inputs.items()}
    if "stack" in axes.values():
        images = inputs["pixel_attention_mask"].flatten(0, 1).flatten(1).any(1)
        inputs |= {name: x.flatten(0, 1)[images] for name, x in inputs.items() if axes[name] == "stack"}
    return inputs


@pytest.mark.parametrize("name", tiny_families.BUILDERS)
def test_turns_and_results_are_the_whole_conversation(name):
    """The prompt, a turn of the model and its results have the inputs of the conversation that is encoded as a whole."""
    processor, family = case_of(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    encoder = TurnEncoder(processor, family, {}, {})
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 3}}}
    turn = {"role": "assistant", "content": [{"type": "text", "text": "let me look"}], "tool_calls": [call]}
    shown = encoder.images_unsupported is None
    # minicpmv4_7 numbers the images of a text; llava_onevision cuts an image into tiles if it is the only one of a text.
    without = not hasattr(processor, "image_token") or name in ("minicpmv4_7", "llava_onevision")
    first = [] if without else [picture(1, 28, 28)]
    results = [result("crop"), result("7", *([picture(2), picture(3, 28, 56)] if shown else []))]
    prompt[0]["content"] += [{"type": "image", "image": image} for image in first]
    row = {"prompt": prompt}
    parts = [encode([read_sample(row, 0)], processor, family)]
    ids = tokenizer('let me look(zoom {"x": 3})</s>', add_special_tokens=False)["input_ids"]
    parts.append(text_inputs([ids], family, "cpu", 0))
    observation = encoder(results, ids[-1])
    parts.append(observation.inputs)
    whole = encode([read_sample({"prompt": [*prompt, turn, *results]}, 0)], processor, family)
    if name == "paligemma":  # its processor ends a prompt with a newline
        parts[0], whole = parts[0].without_last(1), whole.without_last(1)
    joined, expected = plain(chain(parts)), plain(whole)
    if name == "paligemma":  # the tokens of a prompt attend to each other, those of turns and results do not
        kinds, num_prompt = joined["token_type_ids"][0], len(parts[0].inputs["input_ids"][0])
        assert torch.equal(kinds, (torch.arange(len(kinds)) >= num_prompt).long())
        del expected["token_type_ids"]
    for key, value in expected.items():
        if key in joined or value.any():
            assert torch.equal(joined[key], value), key
    assert observation.inputs.num_images.tolist() == [2 if shown else 0]
    if shown:
        assert torch.equal(chain(parts).image_keys, whole.image_keys)


def test_families_whose_images_cannot_follow():
    without = {name for name in tiny_families.BUILDERS if TurnEncoder(*case_of(name)).images_unsupported is not None}
    assert without == {"paligemma", "molmo2", "molmo2_videos", "text", "qwen3_next"} & tiny_families.BUILDERS.keys()


def test_linked_image_tokens():
    encoder = TurnEncoder(*case_of("paligemma"))
    with pytest.raises(NotImplementedError, match="must be text, got an image: all image tokens of paligemma attend to each"):
        encoder([result(picture(1))], None)
    assert ids_of(encoder([result("7")], None))[0] == tiny_families.token_id("</s>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("<tool_call>", "{% if false %}<tool_call>"), "cannot be rendered by the chat template"),
        ((_CALLS, ""), "chat_template must write the tool_calls of the assistant, got .* without them"),
        (("{{ content(message) }}\n</tool_response>", "\n</tool_response>"), "must write the text of a tool's message once"),
        (("{% for call", "{{ messages | length }}{% for call"), None),
        (("</tool_call>", "</tool_call>{{ messages | length }}"), "must write a call the same way with and without its result"),
    ],
)
def test_templates_that_cannot_be_used(processor, change, message):
    processor = with_template(processor, HERMES.replace(*change))
    if message is None:  # what precedes the call may differ
        assert ids_of(TurnEncoder(processor, QWEN)([result("7")], None))
        return
    with pytest.raises(ValueError, match=message):
        TurnEncoder(processor, QWEN)


def test_a_template_for_strings(processor):
    """Results with images are refused; others are written as a string, not as a list of parts."""
    template = HERMES.replace("<tool_response>\n{{ content(message) }}", "<tool_response>\n{{ message.content }}")
    encoder = TurnEncoder(with_template(processor, template), QWEN)
    text = processor.tokenizer.decode(ids_of(encoder([result("crop ", "7")], None)))
    assert "<tool_response>\ncrop 7\n</tool_response>" in text
    with pytest.raises(NotImplementedError, match="writes the content of a tool's message as a string"):
        encoder([result(picture(1))], None)


@pytest.mark.parametrize("image", ["", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>" * 2])
def test_a_template_that_writes_images_of_tools_in_another_way(processor, image):
    inner = (
        "{% for part in message.content %}{% if part.type == 'image' %}OTHER{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    template = HERMES.replace("<tool_response>\n{{ content(message) }}", f"<tool_response>\n{inner.replace('OTHER', image)}")
    encoder = TurnEncoder(with_template(processor, template), QWEN)
    assert ids_of(encoder([result("7")], None))
    with pytest.raises(NotImplementedError, match="image"):
        encoder([result(picture(1))], None)


@pytest.mark.parametrize("content", [["<|image_pad|>"], [picture(1, 2, 500)]])
def test_results_that_cannot_be_encoded(processor, content):
    encoder = TurnEncoder(with_template(processor, HERMES), QWEN)
    with pytest.raises(ResultError, match="results of tools: "):
        encoder([result(*content)], None)


def test_names_that_the_model_made_up(processor):
    encoder = TurnEncoder(with_template(processor, HERMES), QWEN)
    expected = ids_of(encoder([result("no such tool")], None))
    for name in ('a"b', "<|image_pad|>", "tool_call", "", "x" * 1000, "im_end"):
        assert ids_of(encoder([result("no such tool", name=name)], None)) == expected
