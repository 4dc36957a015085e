"""Reading tool calls from a turn: formats of chat templates, malformed calls, conversion of arguments, limits."""

import json
import os
import pickle

import pytest
import trl.chat_template_utils as trl_templates

from vlmkernels.demo.model import build_tokenizer
from vlmkernels.tools.calls import CallParser, MalformedCall, ToolCall
from vlmkernels.tools.formats import MAX_CALLS, MAX_DEPTH
from vlmkernels.tools.functions import Tools

# Special tokens of the families whose formats are tested, besides those of Qwen.
SPECIAL = (
    *("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<|tool_response>", "<|turn>", "<turn|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("</s>", "<|tool_call_start|>", "<|tool_call_end|>", "<|user|>", "<|observation|>"),
)
HERMES = '<tool_call>{"name": ..., "arguments": ...}</tool_call>'  # what the parser searches in a template
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"x": 1, "text": "a"}}\n</tool_call>'


def zoom(x: int, text: str, box: list[float] = (), flag: bool = False, where: dict[str, int] | None = None) -> str:
    """Zoom in.

    Args:
        x: an integer.
        text: a text.
        box: numbers.
        flag: a flag.
        where: an object.
    """


def ping() -> str:
    """Ping."""


SCHEMAS = Tools([zoom, ping]).schemas()


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def new_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)}, replace_extra_special_tokens=False)
    return tokenizer


def parse(tokenizer, text, tool_format="hermes", schemas=SCHEMAS, prefix=None):
    """The turn that a text is."""
    before = None if prefix is None else tokenizer(prefix)["input_ids"]
    return CallParser(tokenizer, tool_format=tool_format)(tokenizer(text)["input_ids"], schemas, before)


ARGUMENTS = {"x": 3, "text": '"7" <b>\n  {new}, ü', "box": [1, 2.5], "flag": True, "where": {"a": 1}}
CALLS = [("zoom", ARGUMENTS), ("ping", {}), ("zoom", {"x": -1, "text": "8"})]


def message_of(calls, content):
    functions = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": functions}


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("qwen2_5", "hermes"),
        ("qwen3", "hermes"),
        ("qwen3_vl", "hermes"),
        ("qwen3_5_think", "xml"),
        ("qwen3_5_nothink", "xml"),
        ("nemotron_3_nano", "xml"),
        ("glm4moe", "glm"),
        ("gemma4_v5", "gemma"),
        ("lfm2_2_5_vl", "pythonic"),
        ("llama3_1", "llama"),
        ("llama3_2", "llama"),
    ],
)
def test_calls_that_a_chat_template_has_written(template, tool_format):
    """The parser finds the calls, and the message is that of TRL, with its response template and without one."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = getattr(trl_templates, f"{template}_chat_template")
    # Llama's templates write one call and no text.
    calls, content = (CALLS[:1], "") if tool_format == "llama" else (CALLS, "I look.")
    conversation = [{"role": "user", "content": "hi"}, message_of(calls, content)]
    prompt = tokenizer.apply_chat_template(conversation[:1], tools=SCHEMAS, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(conversation, tools=SCHEMAS, tokenize=False)
    start = len(os.path.commonprefix([prompt, text]))  # noqa: RUF071 - of characters, not of folders
    prefix, ids = tokenizer(text[:start])["input_ids"], tokenizer(text[start:])["input_ids"]

    parser = CallParser(tokenizer)
    turn = parser(ids, SCHEMAS, prefix)
    assert turn.calls == [ToolCall(name, arguments) for name, arguments in calls]
    assert turn.reasoning is None
    assert turn.message() == message_of(calls, content)
    assert CallParser(new_tokenizer(), tokenizer.chat_template)(ids, SCHEMAS, prefix) == turn
    assert CallParser(new_tokenizer(), tool_format=tool_format)(ids, SCHEMAS, prefix) == turn

    if tool_format != "pythonic":  # TRL does not read the escapes that this template writes
        trl_templates.add_response_schema(tokenizer)
        assert turn.message() == trl_templates.parse_response(tokenizer, ids, prefix=prefix, tools=SCHEMAS)
        assert CallParser(tokenizer)(ids, SCHEMAS, prefix) == turn


@pytest.mark.parametrize("text", ["I see 3.<|im_end|>", "<think>\nHm.\n</think>\n\nI see 3.<|im_end|>", "<|im_end|>\n"])
def test_turns_without_calls_are_those_of_trl(text):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = trl_templates.qwen3_vl_chat_template
    ids = tokenizer(text)["input_ids"]
    turn = CallParser(tokenizer)(ids, SCHEMAS, [])
    trl_templates.add_response_schema(tokenizer)
    assert turn.message() == trl_templates.parse_response(tokenizer, ids, prefix=[], tools=SCHEMAS)
    assert turn.calls == []
    assert "tool_calls" not in turn.message()
    assert ("reasoning_content" in turn.message()) == ("<think>" in text)


MISTRAL = [
    '[TOOL_CALLS][{"name": "zoom", "arguments": {"x": 1, "text": "a"}}, {"name": "ping", "arguments": {}}]</s>',
    '[TOOL_CALLS] [{"name": "zoom", "arguments": {"x": 1, "text": "a"}, "id": "0123"}, {"name": "ping"}]</s>',
    '[TOOL_CALLS]zoom[ARGS]{"x": 1, "text": "a"}[TOOL_CALLS]ping[CALL_ID]a1[ARGS]{}</s>',
    '[TOOL_CALLS]zoom{"x": 1, "text": "a"}[TOOL_CALLS]ping {}</s>',
]


@pytest.mark.parametrize("text", MISTRAL)
def test_calls_of_mistral(tokenizer, text):
    turn = parse(tokenizer, f"Look. {text}", "mistral")
    assert turn.calls == [ToolCall("zoom", {"x": 1, "text": "a"}), ToolCall("ping", {})]
    assert turn.content == "Look."


def test_the_format_is_that_of_the_chat_template(tokenizer):
    def names(*template):
        parser = CallParser(tokenizer, *template)
        return [call.name for call in parser(tokenizer(CALL)["input_ids"], SCHEMAS).calls]

    assert names(HERMES) == ["zoom"]
    assert names({"default": "none", "tool_use": HERMES}) == ["zoom"]
    assert names({"default": HERMES}) == ["zoom"]
    # The markers of XML come first, as Qwen3.5's template also has <tool_call> and "arguments".
    (malformed,) = CallParser(tokenizer, HERMES + "<function=a><parameter=b>")(tokenizer(CALL)["input_ids"], SCHEMAS).calls
    assert "start with the name of a tool" in malformed
    for template in (None, "plain", {"default": "plain"}):
        with pytest.raises(
            ValueError, match="the chat template must write tool calls in a known format, but it has the texts of"
        ):
            CallParser(tokenizer, template)
    for template in ("cohere2", "deepseekv3", "gptoss", "gemma3", "llava_next", "muse_glimmer", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="the chat template must write tool calls in a known format"):
            CallParser(tokenizer, getattr(trl_templates, f"{template}_chat_template"))
    with pytest.raises(ValueError, match=r"tool_format must be one of xml, .*, llama, got 'hermess' \(did you mean hermes\?\)"):
        CallParser(tokenizer, tool_format="hermess")


def hermes(arguments, name="zoom"):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


NESTED = '<tool_call>{"name": "zoom", "arguments": {"where": ' + "[" * 100_000 + "]" * 100_000 + "}}</tool_call>"
DEEP = hermes(json.dumps({"x": 1, "text": "", "where": {"a": 1}}).replace('{"a": 1}', "[" * 50 + "]" * 50))


# The starts of the reasons why a text has no name and arguments.
UNREADABLE = ("must be valid", "must end", "must be a JSON object", "valid JSON", "must not be nested", "zoom: the arguments")


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        # not a call
        ("<tool_call></tool_call>", "", "must be valid JSON: Expecting value"),
        ("<tool_call>zoom</tool_call>", "", "must be valid JSON: Expecting value"),
        ('<tool_call>{"name": "zoom", "arguments": {"x": 1', "", "must be valid JSON: Expecting ',' delimiter"),
        ('<tool_call>{"name": "zoom", "arguments": {"text": "ab', "", "must be valid JSON: Unterminated string"),
        ('<tool_call>{"name": "zoom", "arguments": {}}}</tool_call>', "zoom", "must end after its arguments (tool 'zoom')"),
        ('<tool_call>{"name": "ping"} {"name": "ping"}</tool_call>', "ping", "must end after its arguments (tool 'ping')"),
        ('<tool_call>[{"name": "ping"}]</tool_call>', "", 'must be a JSON object with "name" and "arguments"'),
        ('<tool_call>{"arguments": {"x": 1}}</tool_call>', "", 'must be a JSON object with "name" and "arguments"'),
        ('<tool_call>{"name": ["zoom"]}</tool_call>', "", 'must be a JSON object with "name" and "arguments"'),
        ('<tool_call>{"name": "ping", "name": "zoom"}</tool_call>', "", "must be valid JSON: 'name' is given twice"),
        (hermes('{"x": 1, "text": "", "x": 2}'), "", "must be valid JSON: 'x' is given twice"),
        (hermes('{"x": NaN, "text": ""}'), "", "must be valid JSON: NaN is not a number in JSON"),
        (hermes('{"x": -Infinity, "text": ""}'), "", "must be valid JSON: -Infinity is not a number in JSON"),
        (hermes('{"x": %s, "text": ""}' % ("9" * 10_000)), "", "valid JSON: an integer of 10000 digits is too large"),
        (NESTED, "", f"must not be nested more than {MAX_DEPTH} levels deep"),
        # not a tool or not its arguments
        (hermes("{}", "zoo"), "zoo", "there is no tool 'zoo' (did you mean zoom?), the tools are zoom, ping"),
        (hermes("{}", "z" * 10_000), "z" * 80, f"there is no tool '{'z' * 40}', the tools are zoom, ping"),
        (hermes('"{}"'), "zoom", "zoom: the arguments must be an object, got str"),
        (hermes("[1, 2]"), "zoom", "zoom: the arguments must be an object, got list"),
        (hermes('{"x": 1}'), "zoom", "zoom needs the argument 'text'"),
        (hermes("null"), "zoom", "zoom needs the argument 'x'"),
        (hermes('{"x": 1, "text": "", "y": 2}'), "zoom", "zoom has no argument 'y', its arguments are x, text, box, flag,"),
        (hermes('{"y": 2}', "ping"), "ping", "ping has no argument 'y', its arguments are none"),
        (hermes('{"x": 1e999, "text": ""}'), "zoom", "zoom: argument 'x' must be an integer, got inf"),
        (hermes('{"x": "9%s", "text": ""}' % ("9" * 9_999)), "zoom", "argument 'x' must be an integer, got '%s" % ("9" * 30)),
        (hermes('{"x": 1e30, "text": ""}'), "zoom", "zoom: argument 'x' must be an integer of at most 64 bits, got 1e+30"),
        (hermes('{"x": 1, "text": "\\ud800"}'), "zoom", r"zoom: argument 'text' must be valid Unicode, got '\ud800'"),
        (hermes('{"x": 1, "text": "", "box": [1, "a"]}'), "zoom", "'box' must be a list (each item a number), got a list"),
        (DEEP, "zoom", "zoom: argument 'where' must be an object (each value an integer) or null, got a list"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else value,
)  # fmt: skip
def test_malformed_calls(tokenizer, text, name, reason):
    turn = parse(tokenizer, f"Look. {text}<|im_end|>")
    (call,) = turn.calls
    assert isinstance(call, MalformedCall)
    assert reason in call
    assert call.name == name
    assert len(call) < 160
    # The model's text is not lost: a call without a name and arguments stays in the text, others in the message.
    assert turn.content == ("Look." if turn.written else f"Look. {text}")
    assert ("tool_calls" in turn.message()) == bool(turn.written) == (not reason.startswith(UNREADABLE))


def test_the_next_call_is_read_after_a_malformed_one(tokenizer):
    for text in ("<tool_call>" + CALL, "<tool_call>{</tool_call>" + CALL, "<tool_call>\n" + CALL + "</tool_call>"):
        turn = parse(tokenizer, "a" + text + "b")
        malformed, call = turn.calls
        assert isinstance(malformed, MalformedCall)
        assert call == ToolCall("zoom", {"x": 1, "text": "a"})
        assert turn.content == "a" + text.replace(CALL, "") + "b"
        assert turn.message()["tool_calls"] == message_of([("zoom", {"x": 1, "text": "a"})], "")["tool_calls"]


def test_no_code_is_executed(tokenizer, tmp_path):
    path = tmp_path / "created"
    created = f"open('{path}', 'w')"
    for value in (created, f"__import__('os').mkdir('{path}')", f"[{created}]", f"f'{{{created}}}'", f"(lambda: {created})()"):
        for tool_format, text in (
            ("pythonic", f"<|tool_call_start|>[ping({value})]<|tool_call_end|>"),
            ("pythonic", f"<|tool_call_start|>[zoom(x={value}, text='')]<|tool_call_end|>"),
            ("gemma", f"<|tool_call>call:zoom{{x:{value}}}<tool_call|>"),
            ("xml", f"<tool_call><function=zoom><parameter=x>{value}</parameter></function></tool_call>"),
            ("xml", f"<tool_call><function=zoom><parameter=box>{value}</parameter></function></tool_call>"),
        ):
            (call,) = parse(tokenizer, text, tool_format).calls
            assert isinstance(call, MalformedCall)
    assert not path.exists()


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("xml", "<tool_call>\n<function=tool>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>tool\n<arg_key>x</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"),
    ],
)
@pytest.mark.parametrize(("hint", "value"), [(int, "3"), (str, "3"), (str, "[1]"), (str | None, "null"), (list[int], "[1, 2]")])
def test_the_schema_tells_the_types_of_arguments_in_tags(tokenizer, tool_format, text, hint, value):
    def tool(x):
        """A tool.

        Args:
            x: a value.
        """

    tool.__annotations__ = {"x": hint}
    (call,) = parse(tokenizer, text.format(value), tool_format, Tools([tool]).schemas()).calls
    expected = {int: 3, str: value, str | None: None}.get(hint, [1, 2])
    assert call == ToolCall("tool", {"x": expected})


@pytest.mark.parametrize(
    ("prefix", "text", "reasoning", "content", "names"),
    [
        (None, f"<think>a{CALL}</think>b{CALL}", f"a{CALL}", "b", ["zoom"]),
        ("", f"<think>\n\n</think>\n\nb{CALL}", None, "b", ["zoom"]),
        ("assistant\n<think>\n", f"a{CALL}</think>b{CALL}", f"a{CALL}", "b", ["zoom"]),
        ("assistant\n<think>\n", f"a{CALL}", f"a{CALL}", "", []),  # cut off before its reasoning ended
        ("assistant\n<think>\n\n</think>\n\n", f"b{CALL}", None, "b", ["zoom"]),
        ("<think>a</think>", f"b{CALL}", None, "b", ["zoom"]),
        ("assistant\n", f"b</think>{CALL}", None, "b</think>", ["zoom"]),
        (None, f"a{CALL}</think>b", f"a{CALL}", "b", []),  # without the prompt, the end tells that it began there
        (None, f"<think>a</think>b{CALL}<think>c{CALL}</think>d", f"a\nc{CALL}", "bd", ["zoom"]),
        (None, f"b<think>{CALL}", CALL, "b", []),
        (None, f"b{CALL}c", None, "bc", ["zoom"]),
    ],
)
def test_calls_in_the_reasoning_are_no_calls(tokenizer, prefix, text, reasoning, content, names):
    turn = parse(tokenizer, text + "<|im_end|>", prefix=prefix)
    assert (turn.reasoning, turn.content) == (reasoning, content)
    assert [call.name for call in turn.calls] == names
    assert turn.message().get("reasoning_content") == reasoning


def test_the_reasoning_of_gemma(tokenizer):
    inner = "<|tool_call>call:ping{}<tool_call|>"
    turn = parse(tokenizer, f"<|channel>thought\nhm {inner}<channel|>Look.{inner}<turn|>", "gemma", prefix="<|turn>model\n")
    assert (turn.reasoning, turn.content, turn.calls) == (f"hm {inner}", "Look.", [ToolCall("ping", {})])
    turn = parse(tokenizer, f"hm {inner}<channel|>{inner}", "gemma", prefix="<|turn>model\n<|channel>thought\n")
    assert (turn.reasoning, turn.content, turn.calls) == (f"hm {inner}", "", [ToolCall("ping", {})])


@pytest.mark.parametrize("count", [MAX_CALLS, 1000])
@pytest.mark.parametrize(
    ("tool_format", "first", "each", "last"),
    [
        ("hermes", "", '<tool_call>{"name": "ping"}</tool_call>', ""),
        ("mistral", "[TOOL_CALLS][", '{"name": "ping"},', '{"name": "ping"}]'),
        ("pythonic", "<|tool_call_start|>[", "ping(),", "]<|tool_call_end|>"),
        ("response_template", "", '<tool_call>{"name": "ping"}</tool_call>', ""),
    ],
)
def test_the_number_of_calls_is_limited(count, tool_format, first, each, last):
    tokenizer = new_tokenizer()
    if tool_format == "response_template":
        tokenizer.response_template = trl_templates.qwen3_template
    text = first + each * (count - ("ping" in last)) + last + "ok"
    parser = CallParser(tokenizer, tool_format=None if tool_format == "response_template" else tool_format)
    turn = parser(tokenizer(text)["input_ids"], SCHEMAS, [])
    assert turn.calls[:MAX_CALLS] == turn.written == [ToolCall("ping", {})] * MAX_CALLS
    if count > MAX_CALLS:
        assert turn.calls[MAX_CALLS:] == [f"a turn must have at most {MAX_CALLS} tool calls, the others were ignored"]
    else:
        assert len(turn.calls) == MAX_CALLS
        assert turn.content == "ok"


def test_bytes_that_are_no_text(tokenizer):
    texts = '<tool_call>{"name": "zoom", "arguments": {"x": 1, "text": "', '"}}'
    start, end = (tokenizer(text)["input_ids"] for text in texts)
    broken = tokenizer("ü")["input_ids"][:1]
    turn = CallParser(tokenizer, HERMES)([*start, *broken, *end, *broken], SCHEMAS)
    assert "must end after its arguments" in turn.calls[0]
    turn = CallParser(tokenizer, HERMES)([*broken, *start, *broken, *end], SCHEMAS)
    assert turn.calls == [ToolCall("zoom", {"x": 1, "text": "\ufffd"})]
    assert turn.content == "\ufffd"


def test_control_tokens_are_not_part_of_the_text(tokenizer):
    """Neither of the content nor of arguments; tokens of the format are read also where they are special tokens."""
    turn = parse(tokenizer, f"<|im_start|>a<|image_pad|>b{CALL.replace('1', '<|image_pad|>1')}<|im_end|><|endoftext|>")
    assert (turn.content, turn.calls) == ("ab", [ToolCall("zoom", {"x": 1, "text": "a"})])
    turn = parse(tokenizer, 'a<tool_call|> b<|"|><|tool_call>call:zoom<|tool_call>call:ping{}<tool_call|>', "gemma")
    assert turn.content == "a b" + "call:zoom"
    assert turn.calls[1] == ToolCall("ping", {})
    special = new_tokenizer()
    special.add_special_tokens(
        {"extra_special_tokens": ["<tool_call>", "</tool_call>", "<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    turn = parse(special, f"<think>hm</think>a{CALL}<|im_end|>")
    assert (turn.reasoning, turn.content, turn.calls) == ("hm", "a", [ToolCall("zoom", {"x": 1, "text": "a"})])


def test_a_response_template_is_used_first():
    tokenizer = new_tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>",
        "fields": {
            "thinking": {"open": "(", "close": ")"},
            "tool_calls": {
                "open_pattern": r"@(?P<name>\w+)",
                "close_pattern": r"!\s*|$",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
        },
    }
    ids = tokenizer('(so)<|image_pad|>a @zoom {"x": "3", "text": "b"}! @zoo {}!<|im_end|>')["input_ids"]
    for parser in (CallParser(tokenizer), CallParser(tokenizer, HERMES)):
        turn = parser(ids, SCHEMAS)
        assert (turn.reasoning, turn.content) == ("so", "a")
        assert turn.calls[0] == ToolCall("zoom", {"x": 3, "text": "b"})
        assert turn.calls[1].startswith("there is no tool 'zoo'")
        assert [call.name for call in turn.written] == ["zoom", "zoo"]
    prefix = tokenizer("<|im_start|>user @ping {}!<|im_start|>(")["input_ids"]
    turn = CallParser(tokenizer)(tokenizer("hm @ping {}!) done")["input_ids"], SCHEMAS, prefix)
    assert (turn.reasoning, turn.content, turn.calls) == ("hm @ping {}!", "done", [])
    # Without another format, a turn that the template cannot parse is a malformed call.
    turn = CallParser(tokenizer)(tokenizer("a @ping {! b")["input_ids"], SCHEMAS)
    (call,) = turn.calls
    assert call.startswith("a tool call must have the format of the prompt: ")
    assert (turn.content, turn.written) == ("a @ping {! b", [])
    # A named format is used instead.
    assert CallParser(tokenizer, tool_format="hermes")(ids, SCHEMAS).calls == []
    tokenizer.response_template = {"fields": {}}
    with pytest.raises(ValueError, match="fields"):
        CallParser(tokenizer)


def test_calls_that_a_response_template_cannot_parse(tokenizer):
    """The format of the chat template tells which call is wrong; TRL drops all calls of the turn."""
    other = new_tokenizer()
    other.response_template = trl_templates.qwen3_template
    for text in (CALL + "<tool_call>{</tool_call>", CALL + '<tool_call>{"arguments": {}}</tool_call>', CALL + NESTED):
        ids = tokenizer(text)["input_ids"]
        turn = CallParser(other, HERMES)(ids, SCHEMAS, [])
        assert turn == CallParser(tokenizer, HERMES)(ids, SCHEMAS, [])
        assert turn.calls[0] == ToolCall("zoom", {"x": 1, "text": "a"})
        assert isinstance(turn.calls[1], MalformedCall)


def test_an_empty_turn(tokenizer):
    turn = CallParser(tokenizer, HERMES)([], SCHEMAS)
    assert turn.message() == {"role": "assistant", "content": ""}
    assert turn.calls == []


def test_a_malformed_call_keeps_the_name_of_its_tool():
    call = pickle.loads(pickle.dumps(MalformedCall("no", "zoom")))
    assert (call, call.name, type(call)) == ("no", "zoom", MalformedCall)
    assert MalformedCall("no").name == ""
