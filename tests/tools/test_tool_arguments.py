"""The arguments of a tool call: conversion to the types of the schema, and the reasons why they are refused."""

import math

import pytest

from vlmkernels.tools.arguments import checked
from vlmkernels.tools.formats import MAX_DEPTH, CallError
from vlmkernels.tools.functions import Tools


def schemas_of(hint):
    """The schema of a function with one argument, x."""

    def tool(x):
        """A tool.

        Args:
            x: a value.
        """

    tool.__annotations__ = {"x": hint}
    (schema,) = Tools([tool]).schemas()
    return {"tool": schema}


def convert(value, schemas, typed=True):
    """What the argument x becomes, or the reason why it is refused."""
    try:
        return checked("tool", {"x": value}, schemas, typed)["x"]
    except CallError as error:
        return str(error)


def check(actual, expected):
    """``expected`` is the value, also in the types of its parts, or the start of what it must be."""
    if isinstance(expected, str) and expected.startswith("must be "):
        assert actual.startswith(f"tool: argument 'x' {expected}")
    else:
        assert (actual, repr(actual)) == (expected, repr(expected))


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3), (int, "3", 3), (int, " -3 ", -3), (int, 3.0, 3), (int, "3.0", 3), (int, "1e2", 100),
        (int, 2**63 - 1, 2**63 - 1), (int, 2**63, "must be an integer of at most 64 bits, got 9223372036854775808"),
        (int, 3.5, "must be an integer, got 3.5"), (int, "three", "must be an integer, got 'three'"),
        (int, True, "must be an integer, got True"), (int, None, "must be an integer, got None"),
        (int, [3], "must be an integer, got a list"), (int, "1_0", "must be an integer, got '1_0'"),
        (int, "", "must be an integer, got ''"), (int, math.inf, "must be an integer, got inf"),
        (int, "9" * 10_000, f"must be an integer, got '{'9' * 36}..."),
        (float, 3, 3), (float, 2.5, 2.5), (float, "2.5", 2.5), (float, "-.5e1", -5.0), (float, "7", 7),
        (float, False, "must be a number, got False"), (float, "nan", "must be a number, got 'nan'"),
        (float, math.nan, "must be finite, got nan"), (float, "1e999", "must be finite, got '1e999'"),
        (float, "0x10", "must be a number, got '0x10'"),
        (bool, True, True), (bool, "true", True), (bool, "False", False), (bool, "1", True), (bool, "0", False),
        (bool, 1, "must be true or false, got 1"), (bool, "yes", "must be true or false, got 'yes'"),
        (str, "3", "3"), (str, 3, "3"), (str, 2.5, "2.5"), (str, "", ""), (str, " a\n", " a\n"),
        (str, True, "must be a string, got True"), (str, None, "must be a string, got None"),
        (str, {"a": 1}, "must be a string, got an object"), (str, "\ud800", "must be valid Unicode, got '\\ud800'"),
        (list, [1, "a"], [1, "a"]), (list, "[1, 'a', null]", [1, "a", None]), (list, [], []),
        (list[int], ["1", 2.0], [1, 2]), (list[int], ["a"], "must be a list (each item an integer), got a list"),
        (list[int], 1, "must be a list (each item an integer), got 1"), (list[int], "[1", "must be a list (each item an"),
        (list[int], "[1] 2", "must be a list (each item an"), (list[int], {"a": 1}, "must be a list (each item an"),
        (list[list[float]], [[1, "2"], []], [[1, 2], []]),
        (tuple[int, str], [1, "a"], [1, "a"]), (tuple[int, str], [1], "must be a list of 2 (an integer, a string), got a list"),
        (dict, {"a": [1]}, {"a": [1]}), (dict, '{"a": 1}', {"a": 1}), (dict, 1, "must be an object, got 1"),
        (dict[str, int], {"a": "1"}, {"a": 1}), (dict[str, int], [1], "must be an object (each value an integer), got a list"),
        (dict[str, int], {"a": "b"}, "must be an object (each value an integer), got an object"),
        (int | None, None, None), (int | None, "null", None), (int | None, "3", 3),
        (int | None, "a", "must be an integer or null, got 'a'"),
        (str | None, "null", "null"), (int | str, "3", "3"), (int | str, 3, 3), (int | str, None, "must be an integer or a"),
    ],
)  # fmt: skip
def test_typed_arguments(hint, value, expected):
    check(convert(value, schemas_of(hint)), expected)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, "3", 3), (int, " 3\n", 3), (int, "3.0", 3), (int, "a", "must be an integer, got 'a'"),
        (float, "2.5", 2.5), (float, "7", 7),
        (bool, "True", True), (bool, "false", False), (bool, "", "must be true or false, got ''"),
        (str, "3", "3"), (str, "true", "true"), (str, "[1]", "[1]"), (str, " a ", " a "), (str, "", ""),
        (list[int], '["1"]', [1]), (list[int], "1, 2", "must be a list (each item an integer), got '1, 2'"),
        (list[float], "[NaN]", "must be a list (each item a number), got '[NaN]'"),
        (list[float], "[1e999]", "must be finite, got '[1e999]'"),
        (dict, "{'a': True}", {"a": True}), (dict, '{"a": 1, "a": 2}', "must be an object, got "),
        (int | None, "None", None), (str | None, "null", None), (int | str, "3", 3), (int | str, "three", "three"),
    ],
)  # fmt: skip
def test_arguments_that_are_text(hint, value, expected):
    """In formats whose arguments are text, only the schema tells a number from a string of digits."""
    check(convert(value, schemas_of(hint), typed=False), expected)


@pytest.mark.parametrize("close", ["]", "}"])
def test_the_depth_is_limited(close):
    def nested(depth):
        value = 1
        for _ in range(depth):
            value = [value] if close == "]" else {"a": value}
        return value

    schemas = schemas_of(dict)
    assert convert(nested(MAX_DEPTH), schemas) == nested(MAX_DEPTH)
    check(convert(nested(MAX_DEPTH + 1), schemas), f"must be nested at most {MAX_DEPTH} levels deep")
    check(convert(nested(800), schemas), f"must be nested at most {MAX_DEPTH} levels deep")
    check(convert(str(nested(800)), schemas), "must be an object, got ")


def test_problems_at_any_depth():
    for value in (math.nan, 2**63, "\udfff"):
        for nested in ([[value]], {"a": [value]}, {"a": {"b": value}}):
            assert convert(nested, schemas_of(dict)).startswith("tool: argument 'x' must be ")
    assert convert({"\ud800": 1}, schemas_of(dict)).startswith("tool: argument 'x' must be valid Unicode")
    assert convert({"ü": "😀"}, schemas_of(dict)) == {"ü": "😀"}


def test_alternatives_and_unknown_types():
    """Schemas as newer and older versions of transformers write them."""

    def with_schema(schema):
        return {"tool": {"function": {"parameters": {"properties": {"x": schema}}}}}

    either = with_schema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}], "nullable": True})
    assert [convert(value, either) for value in (3, "3", ["3"], "[3]", None)] == [3, 3, [3], [3], None]
    check(convert("a", either), "must be an integer or a list (each item an integer) or null, got 'a'")
    several = with_schema({"type": ["boolean", "string"], "enum": ["a", True]})
    assert [convert(value, several) for value in ("a", True, "true")] == ["a", True, True]
    check(convert("b", several), "must be one of 'a', True, got 'b'")
    check(convert(False, several), "must be one of 'a', True, got False")
    assert convert([1, {"a": None}], with_schema({})) == [1, {"a": None}]
    assert convert("3", with_schema({}), typed=False) == "3"
    shape = with_schema({"type": "object", "properties": {"n": {"type": "integer"}}})
    assert convert({"n": "3"}, shape) == {"n": 3}


def test_choices():
    def paint(color: str, level: int = 0):
        """Paint.

        Args:
            color: the color (choices: ["red", "green"])
            level: how much (choices: [0, 1])
        """

    schemas = {"paint": Tools([paint]).schemas()[0]}
    assert checked("paint", {"color": "red", "level": "1"}, schemas, True) == {"color": "red", "level": 1}
    with pytest.raises(CallError, match=r"^paint: argument 'color' must be one of 'red', 'green', got 'blue'$"):
        checked("paint", {"color": "blue"}, schemas, True)
    with pytest.raises(CallError, match=r"^paint: argument 'level' must be one of 0, 1, got 2$") as raised:
        checked("paint", {"color": "red", "level": 2}, schemas, True)
    assert raised.value.name == "paint"
