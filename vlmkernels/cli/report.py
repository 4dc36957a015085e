"""``vlmkernels report``: write one HTML page about a training run."""

import argparse
from pathlib import Path

from vlmkernels.cli.flags import parse_arguments, user_errors
from vlmkernels.record.files import write_atomic


def main(argv: list[str]) -> int:
    """Write the page, print its path, and return 0. If RUN is not a run, end the program with exit code 2."""
    parser = argparse.ArgumentParser(
        "vlmkernels report",
        description="Write one HTML page about a training run, finished or not, from the files in its output_dir: curves, time"
        " per phase, tokens, samples with their images, and the configuration. The page is self-contained and loads nothing.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of the run")
    parser.add_argument("--output", type=Path, help="file to write [RUN/report.html]")
    args = parse_arguments(parser, argv)
    from vlmkernels.report.page import run_page
    from vlmkernels.report.run import Run

    output = args.output or args.run / "report.html"
    with user_errors(parser):
        if output.is_dir():
            raise ValueError(f"--output must be a file, got the folder {output}")
        write_atomic(output, run_page(Run.read(args.run)))
    print(output)
    return 0
