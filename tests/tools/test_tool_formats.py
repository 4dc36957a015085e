"""Reading names and arguments in each format of tool calls, from the text of a turn."""

import pytest

from vlmkernels.tools.formats import FORMATS, MAX_CALLS, CallError, split


@pytest.mark.parametrize(
    ("tool_format", "text", "calls"),
    [
        # Strings with the delimiters of the format, in quotes.
        ("hermes", '<tool_call>{"name": "a", "arguments": {"t": "</tool_call><tool_call>"}}</tool_call>', [("a", "t")]),
        ("gemma", '<|tool_call>call:a{t:<|"|>},b:1<|"|>}<tool_call|>', [("a", "t")]),
        ("gemma", "<|tool_call>call:a{t: 'it\\'s', }<tool_call|><|tool_call>call:b{}<tool_call|>", [("a", "t"), ("b", None)]),
        ("pythonic", "<|tool_call_start|>[a(t='])', ), b()]<|tool_call_end|>", [("a", "t"), ("b", None)]),
        ("llama", '<|python_tag|>{"name": "a", "parameters": {"t": "}"}}', [("a", "t")]),
        # The end of the turn closes a complete call.
        ("hermes", '<tool_call>{"name": "a", "arguments": {"t": ""}}', [("a", "t")]),
        ("xml", "<tool_call>\n<function=a>\n<parameter=t>\n\n</parameter>\n</function>", [("a", "t")]),
        ("xml", "<tool_call><function=a><parameter=t>x</parameter></function></tool_call>", [("a", "t")]),
        ("glm", "<tool_call>a<arg_key>t</arg_key><arg_value>x</arg_value></tool_call>", [("a", "t")]),
        ("gemma", "<|tool_call>call:a{t:''}", [("a", "t")]),
        ("pythonic", "<|tool_call_start|>[a(t='')]", [("a", "t")]),
    ],
)
def test_details_of_the_formats(tool_format, text, calls):
    content, found, _ = split(text, FORMATS[tool_format], opened=False)
    assert [(name, *arguments) for name, arguments in found] == [tuple(filter(None, call)) for call in calls]
    assert content == ""


def test_the_text_of_arguments():
    """A value in tags loses the line breaks that the template adds, and no other spaces; strings have their escapes."""

    def code(text, tool_format):
        _, [(_, arguments)], _ = split(text, FORMATS[tool_format], opened=False)
        return arguments["code"]

    tagged = "<tool_call>\n<function=run>\n<parameter=code>\n  if a:\n    b \n\n</parameter>\n</function>\n</tool_call>"
    assert code(tagged, "xml") == "  if a:\n    b \n"
    assert code("<tool_call>run\n<arg_key>code</arg_key>\n<arg_value> 3\n</arg_value>\n</tool_call>", "glm") == " 3\n"
    python = r"""<|tool_call_start|>[run(code='it\'s\n"\d" \\n \u00fc \ud83d\ude00 \x41')]<|tool_call_end|>"""
    assert code(python, "pythonic") == 'it\'s\n"\\d" \\n ü 😀 A'
    assert code(r'<|tool_call>call:run{code:<|"|>it\n"<|"|>}<tool_call|>', "gemma") == r'it\n"'


@pytest.mark.parametrize(
    ("tool_format", "text", "reason"),
    [
        ("xml", "<tool_call>\nzoom\n</tool_call>", "must start with the name of a tool"),
        ("xml", "<tool_call><function=zoom><parameter=x>1</tool_call>", "zoom: argument 'x' must be closed"),
        ("xml", f"<tool_call><function=zoom>{'<parameter=x>1</parameter>' * 2}", "zoom: argument 'x' must be given once"),
        ("xml", "<tool_call><function=ping>1</function></tool_call>", "must end after its arguments (tool 'ping')"),
        ("glm", "<tool_call></tool_call>", "must start with the name of a tool"),
        ("glm", "<tool_call>zoom<arg_key>x</arg_key><arg_value>1</tool_call>", "zoom: argument 'x' must be closed"),
        ("glm", "<tool_call>ping\n<arg_key>x</arg_key></tool_call>", "must end after its arguments (tool 'ping')"),
        ("gemma", "<|tool_call>zoom{}<tool_call|>", "must have the form call:name{argument:value}"),
        ("gemma", "<|tool_call>call:zoom{x:1,x:2}<tool_call|>", "'x' is given twice"),
        ("gemma", "<|tool_call>call:zoom{x:1", "must have ',' or '}' where it has ''"),
        ("gemma", "<|tool_call>call:zoom{x}<tool_call|>", "must have ':' and a value after the name 'x'"),
        ("gemma", "<|tool_call>call:zoom{x:-}<tool_call|>", "must have a value where it has '-}"),
        ("gemma", "<|tool_call>call:zoom{1:1}<tool_call|>", "must have the name of an argument where it has '1:1}"),
        ("gemma", "<|tool_call>call:zoom{x:%s}<tool_call|>" % ("{a:" * 1000), "must not be nested more than 32 levels deep"),
        ("gemma", "<|tool_call>call:zoom{x:%s}<tool_call|>" % ("9" * 10_000), "an integer of 10000 digits is too large"),
        ("gemma", "<|tool_call>call:zoom{x:NaN}<tool_call|>", "must have a value where it has 'NaN}"),
        ("pythonic", "<|tool_call_start|>zoom(x=1)<|tool_call_end|>", "must have the form [name(argument=value)]"),
        ("pythonic", "<|tool_call_start|>[zoom]<|tool_call_end|>", "must have the form [name(argument=value)]"),
        ("pythonic", "<|tool_call_start|>[zoom(1)]<|tool_call_end|>", "must have the name of an argument where it has '1)]"),
        ("pythonic", "<|tool_call_start|>[zoom(x=y)]<|tool_call_end|>", "must have a value where it has 'y)]"),
        ("pythonic", "<|tool_call_start|>[zoom(x=1+1)]<|tool_call_end|>", "must have ',' or ')' where it has '+1)]"),
        ("pythonic", "<|tool_call_start|>[zoom(x=%s" % ("[" * 100_000), "must not be nested more than 32 levels deep"),
        ("pythonic", "<|tool_call_start|>[ping()] x<|tool_call_end|>", "must end after its arguments (tool 'ping')"),
        ("mistral", "[TOOL_CALLS]ping", "must be valid JSON: Expecting value"),
        ("mistral", '[TOOL_CALLS]{"name": "ping"}', "must have the name of a tool, or a list of calls, after [TOOL_CALLS]"),
        ("mistral", '[TOOL_CALLS][{"name": "ping"}, 3]', 'must be a JSON object with "name" and "arguments"'),
        ("llama", '{"name": "zoom", "parameters": {"x": 1}', "must be valid JSON: Expecting ',' delimiter"),
        ("llama", '{"name": 3, "parameters": {}}', 'must be a JSON object with "name" and "arguments"'),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else value,
)  # fmt: skip
def test_malformed_calls(tool_format, text, reason):
    content, (call,), _ = split(f"Look. {text}", FORMATS[tool_format], opened=False)
    assert isinstance(call, CallError)
    assert reason in str(call)
    assert content == f"Look. {text}"


@pytest.mark.parametrize("text", ['It is {"name": "Ann", "age": 3}. Also {"name": "Bob"', '{"name": "zoom"}', '{"x": 1}', "{}"])
def test_objects_in_an_answer_are_no_calls_of_llama(text):
    assert split(text, FORMATS["llama"], opened=False) == (text, [], None)


OPENINGS = {
    "hermes": "<tool_call>",
    "xml": "<tool_call>\n<function=zoom>\n",
    "glm": "<tool_call>zoom\n",
    "gemma": "<|tool_call>call:zoom{",
    "pythonic": "<|tool_call_start|>[zoom(",
    "mistral": "[TOOL_CALLS]",
    "llama": '{"name": ',
}


@pytest.mark.parametrize("tool_format", FORMATS)
def test_the_time_is_linear(tool_format):
    """With repeated starts of every construct, whose ends are missing, a parser that backtracks would not end."""
    opening = OPENINGS[tool_format]
    inside = ("", '{"', "[", "x='", 'x:<|"|>', "<parameter=x>1", "<arg_key>x</arg_key> <arg_value>", "-")
    alone = ("<think>", "<think></think>", " ", "\n", "<", "{", "[", "(", "\\", "'", '"', "9")
    parts = (*(opening + part for part in inside), *alone)
    for part in parts:
        for text in (part * (100_000 // len(part)), opening + part * (100_000 // len(part))):
            content, calls, _ = split(text, FORMATS[tool_format], opened=None)
            assert len(calls) <= MAX_CALLS + 1
            assert len(content) <= len(text)
