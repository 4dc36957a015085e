"""The arguments of a tool call: comparison with the JSON schema of the tool, and conversion to its types."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vlmkernels.ops.checks import did_you_mean
from vlmkernels.tools.formats import MAX_DEPTH, CallError, literal, number

Schema = Mapping[str, Any]


def checked(name: str, arguments: dict[str, Any], schemas: Mapping[str, Schema], typed: bool) -> dict[str, Any]:
    """Return the arguments of a call, converted to the types of the tool's schema.

    A value of another type is converted if it can only mean one value: "3" and 3.0 to an integer, 3 to a string, "true" to a
    boolean, "[1, 2]" to a list.

    Args:
        name: the name of the tool in the call.
        arguments: its arguments in the call.
        schemas: the schemas of the tools that the call can use, by name.
        typed: False if the format of the call writes all arguments as text.

    Raises:
        CallError: there is no such tool, or the arguments do not fit it.
    """
    if name not in schemas:
        hint = did_you_mean(name[:80], schemas)
        raise CallError(f"there is no tool {name[:40]!r}{hint}, the tools are {', '.join(schemas)}", name[:80])
    parameters = schemas[name]["function"]["parameters"]
    properties = parameters.get("properties", {})
    for key in arguments:
        if key not in properties:
            raise CallError(f"{name} has no argument {key[:40]!r}, its arguments are {', '.join(properties) or 'none'}", name)
    for key in parameters.get("required", ()):
        if key not in arguments:
            raise CallError(f"{name} needs the argument {key!r}", name)
    converted = {}
    for key, value in arguments.items():
        try:
            converted[key] = _convert(value, properties[key], typed)
            problem = _problem(converted[key])
        except (ValueError, RecursionError):
            problem = _wanted(properties[key])
        if problem:
            raise CallError(f"{name}: argument {key!r} must be {problem}, got {_short(value)}", name)
    return converted


def _short(value: Any) -> str:
    """Return a value as text, at most 40 characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value if not isinstance(value, str) else value[:40])
    return text if len(text) <= 40 else f"{text[:37]}..."


def _problem(value: Any) -> str | None:
    """Return the rule that a value breaks at any depth, or None. Other programs could not read such a value."""
    rest = [(value, 0)]
    while rest:
        value, depth = rest.pop()
        if depth > MAX_DEPTH:
            return f"nested at most {MAX_DEPTH} levels deep"
        if isinstance(value, dict):
            rest += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list):
            rest += [(part, depth + 1) for part in value]
        elif isinstance(value, float) and not math.isfinite(value):
            return "finite"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "an integer of at most 64 bits"
        elif isinstance(value, str) and not _is_unicode(value):
            return "valid Unicode"
    return None


def _is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _options(schema: Schema) -> list[Schema]:
    """Return the alternatives of a schema, each with at most one type."""
    if "anyOf" in schema:
        options = [option for part in schema["anyOf"] for option in _options(part)]
    else:
        names = schema.get("type", ())
        options = [{**schema, "type": name} for name in ([names] if isinstance(names, str) else names)] or [schema]
    return options + ([{"type": "null"}] if schema.get("nullable") else [])


def _convert(value: Any, schema: Schema, typed: bool) -> Any:
    """Return a value in the type of a schema, or raise ValueError."""
    options = _options(schema)
    if not typed:  # any text is a string, so that other types come first
        options.sort(key=lambda option: option.get("type") == "string")
    for lenient in (False, True) if typed else (True,):
        for option in options:
            try:
                converted = _CONVERTERS.get(option.get("type", ""), _any)(value, option, lenient)
            except (ValueError, OverflowError):
                continue
            if "enum" not in option or converted in option["enum"]:
                return converted
    raise ValueError


def _any(value: Any, schema: Schema, lenient: bool) -> Any:
    return value


def _number(value: Any, schema: Schema, lenient: bool) -> int | float:
    if lenient and isinstance(value, str):
        value = number(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    return value


def _integer(value: Any, schema: Schema, lenient: bool) -> int:
    value = _number(value, schema, lenient)
    if lenient and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int):
        raise ValueError
    return value


def _boolean(value: Any, schema: Schema, lenient: bool) -> bool:
    if lenient and isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if not isinstance(value, bool):
        raise ValueError
    return value


def _string(value: Any, schema: Schema, lenient: bool) -> str:
    if lenient and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError
    return value


def _null(value: Any, schema: Schema, lenient: bool) -> None:
    if value is not None and not (lenient and isinstance(value, str) and value.strip() in ("null", "None")):
        raise ValueError


def _collection(value: Any, lenient: bool, kind: type | tuple[type, ...]) -> Any:
    """Return a list or a dict, which can be written in a string."""
    if lenient and isinstance(value, str):
        text = value.strip()
        value, end = literal(text)
        if end < len(text):
            raise ValueError
    if not isinstance(value, kind):
        raise ValueError
    return value


def _array(value: Any, schema: Schema, lenient: bool) -> list[Any]:
    values = _collection(value, lenient, list)
    schemas = schema.get("prefixItems", [schema.get("items", {})] * len(values))
    if len(schemas) != len(values):
        raise ValueError
    return [_convert(value, of_item, typed=True) for value, of_item in zip(values, schemas, strict=True)]


def _object(value: Any, schema: Schema, lenient: bool) -> dict[str, Any] | list[Any]:
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    # Older versions of transformers describe the hint ``list`` as an object.
    values = _collection(value, lenient, dict if properties or other else (dict, list))
    if isinstance(values, list):
        return values
    return {key: _convert(value, properties.get(key, other), typed=True) for key, value in values.items()}


_CONVERTERS: dict[str, Callable[[Any, Schema, bool], Any]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "string": _string,
    "null": _null,
    "array": _array,
    "object": _object,
}
_NOUNS = {
    **{"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"},
    **{"null": "null", "array": "a list", "object": "an object", "": "a value"},
}


def _wanted(schema: Schema) -> str:
    """Describe the values of a schema."""
    return " or ".join(dict.fromkeys(map(_noun, _options(schema))))


def _noun(option: Schema) -> str:
    if "enum" in option:
        return "one of " + ", ".join(map(repr, option["enum"]))
    if "items" in option:
        return f"a list (each item {_wanted(option['items'])})"
    if "prefixItems" in option:
        return f"a list of {len(option['prefixItems'])} ({', '.join(map(_wanted, option['prefixItems']))})"
    if option.get("additionalProperties"):
        return f"an object (each value {_wanted(option['additionalProperties'])})"
    return _NOUNS.get(option.get("type", ""), "a value")
