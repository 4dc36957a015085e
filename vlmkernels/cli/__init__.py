"""The command line: ``vlmkernels demo | train | report | doctor | eval | plan | env``, one module per command.

A command's module is imported when the command runs, so that ``vlmkernels --help`` does not wait for transformers.
"""

import argparse
import importlib
import io
import os
import sys

from vlmkernels.version import __version__

# Command -> its module in vlmkernels.cli, which defines ``main(argv: list[str]) -> int``, and its line in --help.
COMMANDS = {
    "demo": ("demo", "train a small VLM to read handwritten numbers on the CPU"),
    "train": ("train", "train a model with GRPO"),
    "report": ("report", "write one HTML page about a training run, finished or not"),
    "doctor": ("doctor", "look for faults in a training run, finished or not, of this package or of TRL"),
    "eval": ("evaluate", "measure a model, or saved predictions, on a dataset"),
    "plan": ("plan", "estimate time and memory of a training step before running it"),
    "env": ("env", "show versions, devices, and which backend serves each op"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command and its arguments. Default: ``sys.argv[1:]``.

    Returns:
        The exit code of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {name:7}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "vlmkernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fused kernels for GRPO on vision-language models, and a trainer built on them.",
        epilog=f"commands:\n{lines}\n\nvlmkernels COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.error(f"COMMAND must be one of {', '.join(COMMANDS)}")
    if command not in COMMANDS:
        from vlmkernels.ops.checks import did_you_mean

        hint = did_you_mean(command, COMMANDS, {"evaluate": "eval", "evaluation": "eval", "training": "train"})
        parser.error(f"COMMAND must be one of {', '.join(COMMANDS)}, got {command!r}{hint}")
    # Rewards named module:function are often in the current folder, which only `python -m` adds to the path. It is added last,
    # so that a folder such as ./datasets does not hide a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show must not end a command
    module, _ = COMMANDS[command]
    return importlib.import_module(f"vlmkernels.cli.{module}").main(argv[1:])
