"""The functions and environments whose tools a model may call: names, JSON schemas and checks.

``Tools`` holds what ``tools=`` and ``environment_factory=`` of TRL's ``GRPOTrainer`` hold, with the same meaning. A tool is a
function, sync or async, with type hints and a docstring in Google style. An environment is an object with a method ``reset``;
its other public methods, except ``get_reward``, are tools.
"""

import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException, get_json_schema

from vlmkernels.ops.checks import did_you_mean, import_object

Tool = Callable[..., Any]
EnvironmentFactory = Callable[[], Any]

_NOT_TOOLS = ("reset", "get_reward")  # public methods of an environment that the model cannot call
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class _Environment:
    """What is known of an environment from one instance.

    Args:
        factory: creates an instance.
        kind: the class of the instances.
        methods: the attribute of each tool, by the name of the tool.
        schemas: the JSON schemas of the tools.
        owns_reward: whether the class has ``get_reward``.
    """

    factory: EnvironmentFactory
    kind: type
    methods: dict[str, str]
    schemas: list[dict[str, Any]]
    owns_reward: bool


class Tools:
    """The tools of a run: functions, and the methods of environments.

    One instance of each environment is created to read its tools.

    Args:
        tools: functions, bound methods, partials or callable objects, sync or async.
        environment_factory: a callable that returns an environment, or a mapping from names to such callables. With a mapping,
            the column ``environment`` of the dataset names the environment of each row.

    Attributes:
        functions: the functions of ``tools``, by name.
        environments: the factories by name; the name of a single one is None.
        multi_environment: whether ``environment_factory`` is a mapping.

    Raises:
        TypeError: a tool is no function, or ``environment_factory`` is not callable.
        ValueError: a tool has no docstring, no type hints or no name of its own, or an environment cannot be created or has no
            ``reset``.
    """

    def __init__(
        self,
        tools: Sequence[Tool] | None = None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
    ):
        tools = [] if tools is None else tools
        if isinstance(tools, str) or not isinstance(tools, Sequence):
            raise TypeError(f"tools must be a list of functions, got {type(tools).__name__}")
        self.functions: dict[str, Tool] = {}
        self._schemas = []
        for tool in tools:
            _check_callable(tool)
            schema = _schema(tool, _name(tool))
            _add(self.functions, schema, tool, "tools")
            self._schemas.append(schema)
        self.multi_environment = isinstance(environment_factory, Mapping)
        self._environments = {name: self._probe(name, factory) for name, factory in _factories(environment_factory).items()}
        self.environments: dict[str | None, EnvironmentFactory] = {n: e.factory for n, e in self._environments.items()}
        kinds = {environment.kind for environment in self._environments.values() if environment.owns_reward}
        if len({kind.__name__ for kind in kinds}) < len(kinds):
            names = ", ".join(sorted(kind.__qualname__ for kind in kinds))
            raise ValueError(f"environment classes with get_reward must have distinct names, got {names}")

    def _probe(self, name: str | None, factory: EnvironmentFactory) -> _Environment:
        """Create an instance of an environment and describe it. Only the class is searched, as properties must not run."""
        label = "environment_factory" if name is None else f"environment_factory[{name!r}]"
        if not callable(factory):
            raise TypeError(f"{label} must be a callable that returns an environment, such as its class, got {factory!r}")
        try:
            instance = factory()
        except Exception as error:  # raised by the code of the environment
            raise ValueError(
                f"{label} must return an environment if called without arguments, got {type(error).__name__}: {error}"
            ) from error
        kind = type(instance)
        members = dict(inspect.getmembers(kind, inspect.isfunction))
        if "reset" not in members:
            raise ValueError(f"{label} must return an environment with a method reset, got {kind.__name__}")
        if "get_reward" in members:
            required = [p.name for p in _parameters(instance.get_reward) if p.default is p.empty and p.kind not in _VARIADIC]
            if required:
                raise ValueError(f"{kind.__name__}.get_reward must take no arguments, got {', '.join(required)}")
        methods: dict[str, str] = {}
        schemas = []
        for attribute in members:
            if attribute.startswith("_") or attribute in _NOT_TOOLS:
                continue
            method = getattr(instance, attribute)
            schema = _schema(method, f"{kind.__name__}.{attribute}")
            _add({**self.functions, **methods}, schema, attribute, f"tools and {kind.__name__}")
            methods[schema["function"]["name"]] = attribute
            schemas.append(schema)
        return _Environment(factory, kind, methods, schemas, "get_reward" in members)

    def __bool__(self) -> bool:
        return bool(self.functions or self._environments)

    @property
    def has_environments(self) -> bool:
        """Whether trajectories have an environment."""
        return bool(self._environments)

    def schemas(self, environment: str | None = None) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools of a trajectory with this environment, for the chat template."""
        return self._schemas + (self._environments[environment].schemas if self._environments else [])

    def names(self, environment: str | None = None) -> list[str]:
        """Return the names of the tools of a trajectory with this environment."""
        return [schema["function"]["name"] for schema in self.schemas(environment)]

    def methods(self, environment: str | None = None) -> dict[str, str]:
        """Return the attributes of an environment that are its tools, by the name of the tool."""
        return self._environments[environment].methods if self._environments else {}

    def environment_class(self, environment: str | None = None) -> type:
        """Return the class of the environment."""
        return self._environments[environment].kind

    def owns_reward(self, environment: str | None = None) -> bool:
        """Return whether the environment has ``get_reward``."""
        return bool(self._environments) and self._environments[environment].owns_reward

    def reward_name(self, environment: str | None = None) -> str | None:
        """Return the name of the environment's own reward in the logs, its class name; None without ``get_reward``."""
        return self._environments[environment].kind.__name__ if self.owns_reward(environment) else None

    @property
    def reward_names(self) -> list[str]:
        """The names of the rewards of all environments. Environments of the same class share one."""
        return list(dict.fromkeys(name for environment in self._environments if (name := self.reward_name(environment))))

    def environment_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the name of the environment of a row of the dataset; None unless ``environment_factory`` is a mapping.

        Raises:
            ValueError: the column ``environment`` of the row is not the name of an environment.
        """
        if not self.multi_environment:
            return None
        name = row.get("environment")
        if not isinstance(name, str) or name not in self._environments:
            names = [str(valid) for valid in self._environments]
            raise ValueError(
                f"the column environment must be one of {', '.join(names)}, the names of environment_factory, got {name!r}"
                f"{did_you_mean(name, names)}"
            )
        return name


def load(spec: str) -> Any:
    """Return the function or class at "module:name" or "path/to/file.py:name".

    The folder of a file is added to ``sys.path``, so that worker processes can import the file by its name.

    Raises:
        TypeError: the object is not callable.
        ValueError: ``spec`` has another form, or cannot be imported.
    """
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise ValueError(f"tool must be named by 'module:name' or 'path/to/file.py:name', got {spec!r}")
    if module.endswith(".py"):
        path = Path(module).resolve()
        if not path.is_file():
            raise ValueError(f"tool must be in an existing file, got {spec!r}")
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
            importlib.invalidate_caches()
        found_spec = importlib.util.find_spec(path.stem)
        origin = None if found_spec is None else found_spec.origin
        if origin is None or Path(origin).resolve() != path:
            raise ValueError(f"tool must be in a file whose name no other module has, got {spec!r}, and {origin} has it too")
        module = path.stem
    found = import_object("tool", f"{module}:{name}")
    if not callable(found):
        raise TypeError(f"tool must be a function or a class, got {spec!r}, which is {type(found).__name__}")
    return found


def _factories(given: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None) -> dict[str | None, EnvironmentFactory]:
    """Return the factories of ``environment_factory`` by name."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {None: given}
    if not given or not all(isinstance(name, str) for name in given):
        raise ValueError(f"environment_factory must have at least one name, all of them strings, got {list(given)}")
    return {name: factory for name, factory in given.items()}


def _add(known: dict[str, Any], schema: dict[str, Any], tool: Any, where: str) -> None:
    """Add a tool by its name, which must be new."""
    name = schema["function"]["name"]
    if name in known:
        raise ValueError(f"{where} must have distinct names, and two are named {name!r}")
    known[name] = tool


def _check_callable(tool: Any) -> None:
    """Raise TypeError unless ``tool`` can be a tool."""
    if isinstance(tool, Mapping):
        raise TypeError(f"tools must be functions, not JSON schemas (pass the function that the schema describes), got {tool}")
    if isinstance(tool, type):
        raise TypeError(
            f"tools must be functions, not classes (pass an environment as environment_factory), got {tool.__name__}"
        )
    if not callable(tool):
        raise TypeError(f"tools must be functions, got {type(tool).__name__}")


def _layers(tool: Tool) -> Iterator[Any]:
    """Yield a tool and, if it is a partial, the callables that it wraps."""
    while isinstance(tool, functools.partial):
        yield tool
        tool = tool.func
    yield tool


def _name(tool: Tool) -> str:
    """Return the name of a tool."""
    name = next((layer.__name__ for layer in _layers(tool) if hasattr(layer, "__name__")), None)
    if name is None:
        raise ValueError(f"a tool that is no function must have an attribute __name__, got {tool!r}")
    return str(name)


def _parameters(tool: Tool) -> list[inspect.Parameter]:
    """Return the parameters of a tool that the model can set: those that no partial has set."""
    bound = {name for layer in _layers(tool) if isinstance(layer, functools.partial) for name in layer.keywords}
    return [parameter for parameter in inspect.signature(tool).parameters.values() if parameter.name not in bound]


def _as_function(tool: Tool) -> Tool:
    """Return a tool, or a function with the name, docstring, hints and signature of one that is no function."""
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return tool
    inner = inspect.unwrap(list(_layers(tool))[-1])
    if not (inspect.isfunction(inner) or inspect.ismethod(inner)):
        inner = inner.__call__
    parameters, hints = _parameters(tool), get_type_hints(inner)

    def described() -> None: ...

    described.__name__, described.__doc__ = _name(tool), inspect.getdoc(inner)
    described.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    described.__annotations__ = {name: hints[name] for name in (*(p.name for p in parameters), "return") if name in hints}
    return described


def _schema(tool: Tool, name: str) -> dict[str, Any]:
    """Return the JSON schema of a tool; ``name`` is its name in error messages."""
    try:
        parameters = _parameters(tool)
    except ValueError as error:  # a builtin function
        raise ValueError(f"tool {name} must be a Python function, got {tool!r}") from error
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, *_VARIADIC):
            raise ValueError(f"tool {name} must take each argument by its name, without *args and **kwargs, got '{parameter}'")
    try:
        schema: dict[str, Any] = get_json_schema(_as_function(tool))
    except DocstringParsingException as error:
        raise ValueError(
            f"tool {name} must have a docstring in Google style that describes it and each of its arguments: {_line(error)}"
        ) from error
    except (TypeHintParsingException, TypeError, NameError, ValueError) as error:
        raise ValueError(f"tool {name} must have a type hint of a JSON type for each argument: {_line(error)}") from error
    if not _NAME.fullmatch(schema["function"]["name"]):
        raise ValueError(
            f"tool {name} must have a name of letters, digits, '_', '-' and '.', got {schema['function']['name']!r}"
        )
    for argument, of_argument in schema["function"]["parameters"]["properties"].items():
        if not {"image", "audio"}.isdisjoint(_types(of_argument)):
            raise ValueError(
                f"tool {name} must have arguments that a model can write, got an image or a tensor for {argument!r}"
            )
    return schema


def _types(schema: Any) -> Iterator[str]:
    """Yield the types in a JSON schema."""
    if isinstance(schema, dict):
        names = schema.get("type", ())
        yield from [names] if isinstance(names, str) else names
        for key in ("items", "additionalProperties"):
            yield from _types(schema.get(key))
        for key in ("anyOf", "prefixItems"):
            for part in schema.get(key, ()):
                yield from _types(part)


def _line(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()).rstrip("!.")
