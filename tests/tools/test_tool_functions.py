"""What ``Tools`` holds: schemas, names, environments, the errors of wrong tools, and import paths."""

import enum
import functools
import pickle
import sys
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import TypeHintParsingException

from vlmkernels.tools.functions import Tools, load


def zoom(x: int, box: list[float], label: str | None = None) -> Image.Image:
    """Return a part of the image.

    Args:
        x: the index.
        box: the corners.
        label: a text.
    """


async def search(query: str, mode: Literal["fast", "slow"] = "fast") -> str:
    """Search.

    Args:
        query: what to look for.
        mode: how to look.
    """


class Ruler:
    """Measures."""

    __name__ = "measure"

    def __call__(self, length: float) -> str:
        """Measure a length.

        Args:
            length: in pixels.
        """

    def double(self, length: float) -> str:
        """Double a length.

        Args:
            length: in pixels.
        """


class World:
    """Its property must not be evaluated, and its private and class methods are no tools."""

    scale = 2

    def __init__(self):
        self.steps = 0

    @property
    def broken(self):
        raise RuntimeError("a property was evaluated")

    def reset(self, **row):
        self.steps = 0

    def step(self, n: int) -> str:
        """Go on.

        Args:
            n: how far.
        """
        self.steps += n
        return "ok"

    async def look(self) -> list:
        """Look around."""

    def _hidden(self, undocumented):
        pass

    @classmethod
    def build(cls):
        return cls()

    async def get_reward(self) -> float:
        return float(self.steps)


class Quiet:
    def reset(self):
        return "start"

    def wait(self) -> str:
        """Wait."""


def named(function, name, doc=None):
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc or function.__doc__
    return function


def test_functions_have_the_schemas_of_transformers():
    tools = Tools([zoom, search, Ruler().double])
    assert tools.schemas() == [get_json_schema(zoom), get_json_schema(search), get_json_schema(Ruler().double)]
    assert tools.names() == ["zoom", "search", "double"]
    assert list(tools.functions) == ["zoom", "search", "double"]
    assert tools.functions["zoom"] is zoom
    assert tools.schemas()[0]["function"]["parameters"]["required"] == ["x", "box"]
    assert [tools.has_environments, tools.multi_environment, tools.owns_reward(), tools.reward_names] == [False] * 3 + [[]]
    assert tools.environment_of({"environment": "anything"}) is None
    assert tools.methods() == {}


@pytest.mark.parametrize("tools", [None, [], ()])
def test_no_tools(tools):
    assert not Tools(tools)
    assert Tools(tools).schemas() == Tools(tools).names() == []


def test_the_arguments_that_a_partial_sets_are_not_in_the_schema():
    class Database:  # no JSON type
        pass

    def find(database: Database, key: str, limit: int = 3) -> str:
        """Find rows.

        Args:
            database: where.
            key: what.
            limit: how many.
        """

    for partial in (functools.partial(find, database=Database()), functools.partial(find, Database())):
        tools = Tools([partial])
        function = tools.schemas()[0]["function"]
        assert (function["name"], function["description"]) == ("find", "Find rows.")
        assert function["parameters"]["required"] == ["key"]
        assert {name: of["type"] for name, of in function["parameters"]["properties"].items()} == {
            "key": "string",
            "limit": "integer",
        }
        assert tools.functions["find"] is partial
    renamed = functools.partial(functools.partial(find, Database()), limit=2)
    renamed.__name__ = "find_two"
    assert Tools([partial, renamed]).names() == ["find", "find_two"]
    assert list(Tools([renamed]).schemas()[0]["function"]["parameters"]["properties"]) == ["key"]


def test_callable_objects_and_wrapped_functions():
    tools = Tools([Ruler(), functools.lru_cache(zoom)])
    assert tools.names() == ["measure", "zoom"]
    assert tools.schemas()[0] == {
        "type": "function",
        "function": {
            "name": "measure",
            "description": "Measure a length.",
            "parameters": {
                "type": "object",
                "properties": {"length": {"type": "number", "description": "in pixels."}},
                "required": ["length"],
            },
            "return": {"type": "string"},
        },
    }
    assert tools.schemas()[1] == get_json_schema(zoom)


def no_docstring(x: int) -> str: ...


def no_hint(x) -> str:
    """Do.

    Args:
        x: a number.
    """


def not_described(x: int, y: int) -> str:
    """Do.

    Args:
        x: a number.
    """


def any_arguments(*args: int) -> str:
    """Do.

    Args:
        args: numbers.
    """


def any_names(**kwargs: int) -> str:
    """Do.

    Args:
        kwargs: numbers.
    """


def by_position(x: int, /) -> str:
    """Do.

    Args:
        x: a number.
    """


def takes_object(x: SimpleNamespace) -> str:
    """Do.

    Args:
        x: an object.
    """


def takes_unknown(x: "Missing") -> str:  # noqa: F821
    """Do.

    Args:
        x: an object.
    """


def takes_image(images: list[Image.Image]) -> str:
    """Do.

    Args:
        images: images.
    """


def takes_tensor(x: dict[str, torch.Tensor]) -> str:
    """Do.

    Args:
        x: a tensor.
    """


class Empty(enum.Enum):
    pass


def takes_empty(x: Empty) -> str:
    """Do.

    Args:
        x: a member.
    """


def spaced(x: int) -> str:
    """Do.

    Args:
        x: a number.
    """


spaced.__name__ = "two words"


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        ([no_docstring], ValueError, "tool no_docstring must have a docstring in Google style .*: .* has no docstring$"),
        ([not_described], ValueError, "tool not_described must have a docstring .* each of its arguments: .* argument 'y'$"),
        ([no_hint], ValueError, "tool no_hint must have a type hint .*: Argument x is missing a type hint in"),
        ([takes_unknown], ValueError, "tool takes_unknown must have a type hint .*: name 'Missing' is not defined$"),
        ([takes_image], ValueError, "tool takes_image must have arguments that a model can write, got an image .* 'images'$"),
        ([takes_tensor], ValueError, "tool takes_tensor must have arguments that a model can write, .* 'x'$"),
        ([any_arguments], ValueError, r"must take each argument by its name, .* and \*\*kwargs, got '\*args: int'$"),
        ([any_names], ValueError, r"tool any_names must take each argument by its name, .* got '\*\*kwargs: int'$"),
        ([by_position], ValueError, "tool by_position must take each argument by its name"),
        ([spaced], ValueError, "tool two words must have a name of letters, digits, '_', '-' and '.', got 'two words'$"),
        ([max], ValueError, "tool max must be a Python function, got <built-in function max>$"),
        ([lambda x: x], ValueError, "tool <lambda> must have a docstring"),
        ([zoom, zoom], ValueError, "tools must have distinct names, and two are named 'zoom'$"),
        ([get_json_schema(zoom)], TypeError, r"tools must be functions, not JSON schemas \(pass the function that the schema"),
        ([World], TypeError, r"tools must be functions, not classes \(pass an .* as environment_factory\), got World$"),
        (["zoom"], TypeError, "tools must be functions, got str$"),
        ([SimpleNamespace()], TypeError, "tools must be functions, got SimpleNamespace$"),
        ([torch.nn.ReLU()], ValueError, r"a tool that is no function must have an attribute __name__, got ReLU\(\)$"),
        (zoom, TypeError, "tools must be a list of functions, got function$"),
        ("zoom", TypeError, "tools must be a list of functions, got str$"),
        ({zoom}, TypeError, "tools must be a list of functions, got set$"),
    ],
)  # fmt: skip
def test_errors_of_wrong_tools(tools, error, message):
    with pytest.raises(error, match=message) as raised:
        Tools(tools)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tool", [takes_object, takes_empty], ids=["class", "empty Enum"])
def test_a_hint_without_a_json_type(tool):
    try:
        get_json_schema(tool)
    except TypeHintParsingException:
        with pytest.raises(ValueError, match=f"tool {tool.__name__} must have a type hint of a JSON type for each argument: "):
            Tools([tool])
    else:
        pytest.skip("this transformers accepts any class as an object")


def test_the_methods_of_an_environment_are_tools():
    tools = Tools([zoom], World)
    world = World()
    assert tools.has_environments
    assert not tools.multi_environment
    assert tools.environments == {None: World}
    assert tools.environment_class() is World
    assert tools.names() == ["zoom", "look", "step"]
    assert tools.schemas() == [get_json_schema(zoom), get_json_schema(world.look), get_json_schema(world.step)]
    assert tools.methods() == {"look": "look", "step": "step"}
    assert (tools.owns_reward(), tools.reward_name(), tools.reward_names) == (True, "World", ["World"])
    assert tools.environment_of({"environment": "unknown"}) is None  # only a mapping reads the column


def test_tools_of_static_and_renamed_methods():
    class Room:
        def reset(self): ...

        @staticmethod
        def clap(n: int) -> str:
            """Clap.

            Args:
                n: how often.
            """

    def _renamed(self) -> str:
        """Shout."""

    Room.shout = named(_renamed, "yell")
    tools = Tools(environment_factory=Room)
    assert tools.methods() == {"clap": "clap", "yell": "shout"}
    assert tools.schemas()[0] == get_json_schema(Room.clap)
    assert tools.reward_name() is None


def test_a_mapping_of_environments():
    tools = Tools([search], {"world": World, "quiet": lambda: Quiet(), "other": World})
    assert tools.multi_environment
    assert tools.names("world") == ["search", "look", "step"]
    assert tools.names("quiet") == ["search", "wait"]
    assert [tools.owns_reward(name) for name in tools.environments] == [True, False, True]
    assert tools.reward_names == ["World"]  # once, although two names have this class
    assert tools.environment_of({"environment": "quiet", "prompt": ""}) == "quiet"
    message = "the column environment must be one of world, quiet, other, the names of environment_factory, got 'wrld'"
    with pytest.raises(ValueError, match=rf"{message} \(did you mean world\?\)$"):
        tools.environment_of({"environment": "wrld"})
    for row in ({}, {"environment": None}, {"environment": ["quiet"]}):
        with pytest.raises(ValueError, match="the column environment must be one of world, quiet, other"):
            tools.environment_of(row)


class NoReset:
    reset = 3


class Fails:
    def __init__(self):
        raise OSError("no display")


class NeedsArgument:
    def __init__(self, path):
        self.path = path


class Judged:
    def reset(self): ...

    def get_reward(self, scale, *args, weight=1, **kwargs): ...


class Undocumented:
    def reset(self): ...

    def act(self, x: int): ...


class Clash:
    def reset(self): ...

    def zoom(self) -> str:
        """Zoom."""


def _other_world():
    class World:
        def reset(self): ...

        def get_reward(self): ...

    return World


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (NoReset, ValueError, "environment_factory must return an environment with a method reset, got NoReset$"),
        (Fails, ValueError, "environment_factory must return an .* without arguments, got OSError: no display$"),
        (NeedsArgument, ValueError, "environment_factory must return an .* without arguments, got TypeError: .*'path'$"),
        (Judged, ValueError, "Judged.get_reward must take no arguments, got scale$"),
        (Undocumented, ValueError, "tool Undocumented.act must have a docstring"),
        (Clash, ValueError, "tools and Clash must have distinct names, and two are named 'zoom'$"),
        (World(), TypeError, "environment_factory must be a callable that returns an environment, such as its class, got <"),
        ({}, ValueError, r"environment_factory must have at least one name, all of them strings, got \[\]$"),
        ({1: World}, ValueError, r"environment_factory must have at least one name, all of them strings, got \[1\]$"),
        ({"a": "World"}, TypeError, r"environment_factory\['a'\] must be a callable that returns an environment"),
        ({"a": World, "b": _other_world()}, ValueError, "environment classes with get_reward must have distinct names, got"),
    ],
)
def test_errors_of_wrong_environments(factory, error, message):
    with pytest.raises(error, match=message):
        Tools([zoom], factory)


def test_tools_can_be_sent_to_another_process():
    copy = pickle.loads(pickle.dumps(Tools([zoom, search], {"world": World, "quiet": Quiet})))
    assert copy.names("world") == ["zoom", "search", "look", "step"]
    assert copy.functions["zoom"] is zoom
    assert copy.environments == {"world": World, "quiet": Quiet}


SOURCE = '''
def crop(x: int) -> str:
    """Crop.

    Args:
        x: where.
    """
    return f"{x}"

class Game:
    def reset(self): ...

number = 3
'''


@pytest.fixture
def isolated(monkeypatch):
    """Imports of a test end with it."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_load(tmp_path, isolated):
    (tmp_path / "my_tools_of_a_file.py").write_text(SOURCE)
    path = str(tmp_path / "my_tools_of_a_file.py")
    crop = load(f"{path}:crop")
    assert crop(3) == "3"
    assert Tools([crop], load(f"{path}:Game")).names() == ["crop"]
    assert load("my_tools_of_a_file:crop") is crop  # a worker imports it by its name
    assert pickle.loads(pickle.dumps(crop)) is crop
    assert load("numpy:linalg.norm") is np.linalg.norm


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("crop", ValueError, "tool must be named by 'module:name' or 'path/to/file.py:name', got 'crop'$"),
        ("math:", ValueError, "tool must be named by"),
        (":crop", ValueError, "tool must be named by"),
        ("missing_tools.py:crop", ValueError, "tool must be in an existing file, got 'missing_tools.py:crop'$"),
        ("missing_tools:crop", ValueError, "tool must be importable, got 'missing_tools:crop': No module named"),
        ("math:crops", ValueError, "tool must be importable, got 'math:crops': .* has no attribute 'crops'"),
        ("FILE:number", TypeError, "tool must be a function or a class, got '.*number', which is int$"),
        ("FILE:corp", ValueError, r"tool must be importable, got 'other_tools:corp': .* \(did you mean crop\?\)$"),
        ("BROKEN:crop", ValueError, "tool must be importable, got 'broken_tools:crop': ZeroDivisionError: division by zero$"),
        ("PICKLE:crop", ValueError, "tool must be in a file whose name no other module has, got .*pickle.py has it too$"),
    ],
)
def test_errors_of_load(tmp_path, isolated, spec, error, message):
    files = {"FILE": "other_tools.py", "BROKEN": "broken_tools.py", "PICKLE": "pickle.py"}
    for key, name in files.items():
        (tmp_path / name).write_text("1 / 0" if key == "BROKEN" else SOURCE)
        spec = spec.replace(key, str(tmp_path / name))
    with pytest.raises(error, match=message):
        load(spec)
