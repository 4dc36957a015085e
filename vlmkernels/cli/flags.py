"""Shared code of the commands: help texts, the help formatter, user errors, and YAML files of arguments."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmkernels.ops.checks import did_you_mean

DATASET = "a .jsonl or .parquet file, or a folder written by Dataset.save_to_disk"
REWARD = "a built-in reward (exact_match, cer, iou, ...) or an import path module:function; repeat the flag for several"
TOOL = "a function that the model may call: an import path module:function or file.py:function; repeat the flag for several"
ENVIRONMENT = (
    "a class or function that creates the environment of a completion, whose methods the model may call: an import path"
    " module:function; or NAME=module:function, repeated, for those that the column 'environment' of the dataset names"
)
REWARDS = "rewards with weights and options, instead of --reward: a JSON list of {name, weight, ...}"


class Help(argparse.HelpFormatter):
    """Show one spelling of each flag, ``VALUE`` as the placeholder, and the default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = "" if action.nargs in (0, "?") else " ..." if action.nargs == "+" else " VALUE"
        return ", ".join(action.option_strings[:1]) + values

    def _get_help_string(self, action: argparse.Action) -> str:
        return f"{action.help} [%(default)s]" if action.default not in (None, argparse.SUPPRESS, [], False) else action.help


class Repeated(argparse.Action):
    """A flag that may be repeated, with a list of its values. They replace the default, which a YAML file may have set."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [value] if before is self.default else [*before, value])


@contextmanager
def user_errors(parser: argparse.ArgumentParser, argument: str = "", more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """End the program with exit code 2 and a one-line message when an argument is wrong.

    Args:
        parser: the command's parser.
        argument: prefix of the message. For errors whose message does not name the argument.
        more: exceptions to handle besides ValueError, TypeError, OSError, ImportError and NotImplementedError.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, *more) as error:
        parser.error(f"{argument}: {error}" if argument else str(error))


def json_list(text: str) -> list:
    """Parse a JSON list. argparse replaces the ValueError for any other text with its own message."""
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError
    return value


def add_flag(parser: argparse._ActionsContainer, name: str, **options) -> None:
    """Add a flag with two spellings, ``--some_name`` and ``--some-name``, like transformers."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **options)


def tool_functions(given: str | Sequence[str] | None) -> list[Callable[..., Any]]:
    """Return the functions that the values of --tools name, as ``tools`` of the trainer.

    Args:
        given: values of the flag, or the value of a YAML file.

    Raises:
        TypeError, ValueError: a value cannot be imported.
    """
    from vlmkernels.tools.functions import load

    return [load(path) for path in ([given] if isinstance(given, str) else given or ())]


def environment_factory(given: str | Sequence[str] | None) -> Callable[..., Any] | dict[str, Callable[..., Any]] | None:
    """Return what the values of --environment name, as ``environment_factory`` of the trainer.

    Args:
        given: values of the flag, or the value of a YAML file.

    Raises:
        TypeError, ValueError: a value cannot be imported, or there are several and one has no name.
    """
    from vlmkernels.tools.functions import load

    if not given:
        return None
    given = [given] if isinstance(given, str) else given
    named = [spec.partition("=") for spec in given]
    if len(named) == 1 and not named[0][1]:
        factory: Callable[..., Any] = load(given[0])
        return factory
    names = [name for name, _, _ in named]
    if not all(path for _, _, path in named) or len(set(names)) < len(names):
        raise ValueError(f"environment must be one import path, or NAME=path with distinct names, got {', '.join(given)}")
    return {name: load(path) for name, _, path in named}


def require_given(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the program with exit code 2 and a message if named arguments are missing; it names all of them."""
    missing = [f"--{name}" for name in names if not getattr(args, name)]
    if missing:
        parser.error(f"{' and '.join(missing)} must be given")


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], advice: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """Parse the flags. An unknown flag ends the program with a message that suggests the closest valid one.

    Args:
        advice: names of flags of other programs, and what to do instead.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), "")
        wanted = flag.lstrip("-").partition("=")[0].replace("-", "_")
        names = {option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")}
        hint = did_you_mean(wanted, names).replace("mean ", "mean --") if wanted else ""
        if advice and wanted in advice:
            hint = f": {advice[wanted]}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def read_yaml(parser: argparse.ArgumentParser, path: str, advice: Mapping[str, str] | None = None) -> None:
    """Set the values of a YAML file as defaults of the parser. Flags on the command line override them.

    Keys are names of arguments. An unknown key ends the program with a message that suggests the closest valid key.
    """
    import yaml

    with user_errors(parser, f"--config {path}"):
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"the file must be YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the file must map names to values, got {type(values).__name__}")
        valid = sorted(action.dest for action in parser._actions if action.dest not in ("help", "help_all", "config"))
        for key in values:
            if key not in valid:
                hint = f": {advice[key]}" if advice and key in advice else did_you_mean(key, valid)
                raise ValueError(f"unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")
    parser.set_defaults(**values)
