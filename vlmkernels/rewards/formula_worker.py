"""Compare formulas with math-verify. Runs as a script in a process of its own, which ``text.math_equal`` starts.

Each line of the input is a JSON list with two formulas in LaTeX. Each line of the output is a JSON list with two bools: whether
the second formula could be parsed, and whether it equals the first; or null if the first could not be parsed.

A formula that takes more than ``CPU_SECONDS`` ends the process, also within a power of large integers, which a signal handler
could not interrupt.
"""

import json
import logging
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

CPU_SECONDS = 5
_MEMORY = 8 << 30


def main() -> None:
    """Answer requests until the input ends."""
    del sys.path[0]  # the folder of this file, whose modules are not top-level modules
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.set_int_max_str_digits(0)

    # Units are split by ``answers.parse_formula``; math-verify would also remove variables such as m.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)

    def read(formula: str) -> list[Any]:
        options: dict[str, Any] = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
        return list(parse(f"${formula}$", [latex], **options))

    read_reference = lru_cache(maxsize=1024)(read)
    for line in sys.stdin:
        reference, prediction = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        try:
            gold = read_reference(reference)
            answer = read(prediction) if gold else []
            result = [bool(answer), bool(answer) and verify(gold, answer, timeout_seconds=None)] if gold else None
        except (MemoryError, RecursionError):
            result = [False, False]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
