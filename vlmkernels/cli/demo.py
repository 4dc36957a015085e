"""``vlmkernels demo``: a small VLM learns to read handwritten numbers. Needs the extra ``demo``."""

import argparse
from pathlib import Path

from vlmkernels.cli.flags import parse_arguments


def positive(text: str) -> int:
    """Parse an integer >= 1. argparse replaces the ValueError for any other text with its own message."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: list[str]) -> int:
    """Run the demo. Returns 0 if GRPO improved the model as much as the demo requires, else 1."""
    parser = argparse.ArgumentParser(
        "vlmkernels demo",
        description="Train a small vision-language model to read handwritten numbers: a short supervised warm-up, then GRPO"
        " from rewards only. Takes a few minutes on two CPU cores and downloads nothing.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, training images and sampling [0]")
    parser.add_argument("--steps", type=positive, help="number of GRPO steps [150; 250 with --suite; 100 with --tools]")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--suite", action="store_true", help="train on the benchmark shapes-and-digits instead of numbers")
    task.add_argument("--tools", action="store_true", help="train on numbers that are too small, with a tool that zooms")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the results [demo-output]")
    args = parse_arguments(parser, argv)
    try:
        if args.tools:
            from vlmkernels.demo.zoom_run import run
        elif args.suite:
            from vlmkernels.demo.suite import run
        else:
            from vlmkernels.demo.run import run
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vlmkernels[demo]'")
    return run(args.seed, args.steps or (100 if args.tools else 250 if args.suite else 150), args.output)
