"""``vlmkernels doctor``: look for faults in a training run."""

import argparse
import json
from pathlib import Path

from vlmkernels.cli.flags import parse_arguments, user_errors


def main(argv: list[str]) -> int:
    """Print the diagnosis, and return 0 if no problem was found, 1 if there is one, 2 if no rule could be checked.

    If RUN is not a run, end the program with exit code 2.
    """
    parser = argparse.ArgumentParser(
        "vlmkernels doctor",
        description="Look for faults in a training run of this package or of TRL, finished or not, from the files in its"
        " output_dir. Each finding has the step, the numbers, an example where completions are stored, and a remedy. The exit"
        " code is 0 if no problem was found, 1 if there is one, and 2 if the run could not be judged.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parse_arguments(parser, argv)
    from vlmkernels.doctor import PROBLEM, RULES, diagnose, read_run, unchecked
    from vlmkernels.doctor.output import as_json, as_text

    with user_errors(parser):
        run = read_run(args.run)
    findings, skipped = diagnose(run), unchecked(run)
    if args.json:
        print(json.dumps(as_json(args.run, run, findings, skipped), indent=1))
    else:
        print(as_text(args.run, run, findings, skipped, len(RULES)))
    if any(finding.severity == PROBLEM for finding in findings):
        return 1
    return 2 if len(skipped) == len(RULES) else 0
