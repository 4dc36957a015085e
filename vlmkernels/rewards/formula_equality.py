"""Compare formulas with math-verify, in a process that is killed if a formula takes too long, such as ``9^{9^{9}}``."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from vlmkernels.rewards import workers

LIMIT_S = 5.0


class Comparison(NamedTuple):
    """What math-verify says of two formulas.

    Attributes:
        reference_parsed: whether the reference could be parsed.
        parsed: whether the prediction could be parsed within the time limit.
        equal: whether they are equal.
    """

    reference_parsed: bool
    parsed: bool
    equal: bool


def compare(reference: str, prediction: str) -> Comparison:
    """Compare two formulas in LaTeX.

    A process compares them, so that a comparison can be ended after ``LIMIT_S`` seconds on any thread. If this already is the
    process of a reward with a timeout, it compares them itself, within that timeout.
    """
    if workers.is_worker():
        return _compare(reference, prediction)
    result = _PROCESS.call({"reference": reference, "prediction": prediction}, LIMIT_S)
    if isinstance(result, ImportError):
        raise result
    return Comparison(True, False, False) if isinstance(result, Exception) else cast(Comparison, result)


def _compare(reference: str, prediction: str) -> Comparison:
    read_reference, read, verify = _math_verify()
    try:
        gold = read_reference(reference)
        answer = read(prediction) if gold else []
        equal = bool(answer) and verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)
        return Comparison(bool(gold), bool(answer), equal)
    except (MemoryError, RecursionError):
        return Comparison(True, False, False)


@functools.lru_cache(maxsize=1)
def _math_verify() -> tuple[Callable[..., Any], ...]:
    """Return functions that parse a reference, parse a prediction, and compare the results. Changes settings of the process."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    if hasattr(sys, "set_int_max_str_digits"):  # not in the first releases of Python 3.10
        sys.set_int_max_str_digits(0)
    # Units are split by ``answers.parse_formula``; math-verify would also remove variables such as m.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)
    # math-verify's own time limits need the main thread.
    options: dict[str, Any] = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}

    def read(formula: str) -> list[Any]:
        return list(parse(f"${formula}$", [latex], **options))

    return functools.lru_cache(maxsize=1024)(read), read, verify


_PROCESS = workers.ProcessWorker(_compare, ("reference", "prediction"))
