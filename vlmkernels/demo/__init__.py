"""``vlmkernels demo``: a small VLM learns to read numbers written by hand. Needs the extra ``demo``."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    """0 where GRPO improved the model as much as it must, else 1."""
    parser = argparse.ArgumentParser(
        "vlmkernels demo",
        description="Train a small vision-language model to read handwritten numbers: a short supervised warm-up, then GRPO"
        " from rewards alone. Takes some minutes on two CPU cores and downloads nothing.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the training images and the sampling [0]")
    parser.add_argument("--steps", type=positive, help="GRPO steps [150, of the suite 250]")
    parser.add_argument("--suite", action="store_true", help="the benchmark shapes-and-digits in place of numbers")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the results [demo-output]")
    args = parser.parse_args(argv)
    try:
        if args.suite:
            from vlmkernels.demo.suite import run
        else:
            from vlmkernels.demo.run import run
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'vlmkernels[demo]'")
    return run(args.seed, args.steps or (250 if args.suite else 150), args.output)
