"""``vlmkernels report``: one HTML page of a training run."""

import argparse
from pathlib import Path

from vlmkernels.ops.checks import require
from vlmkernels.record.files import write_whole


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "vlmkernels report",
        description="Make one HTML page of a training run, finished or not, from what its output_dir holds: curves, where the"
        " time went, tokens, samples with their images, configuration. The page needs nothing else and loads nothing.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of the run")
    parser.add_argument("--output", type=Path, help="the page [RUN/report.html]")
    args = parser.parse_args(argv)
    from vlmkernels.report.page import run_page
    from vlmkernels.report.run import Run

    output = args.output or args.run / "report.html"
    try:
        require(not output.is_dir(), "--output", "be a file", f"the folder {output}")
        write_whole(output, run_page(Run.read(args.run)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(output)
    return 0
