"""Running the reproductions that the conformance suite prints."""

import contextlib
import io
import re

from vlmkernels.conformance import Adapter
from vlmkernels.conformance.contract import HEADER

MAX_LINES = 10


def output_of(script: str, adapter: Adapter) -> tuple[str, str]:
    """What a reproduction prints after "got" and after "expected". script: with or without its first lines."""
    name = type(adapter).__name__
    if not script.startswith("import torch"):
        script = HEADER.format(load=f"{name}()") + script
    assert len(script.splitlines()) <= MAX_LINES, script
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(script, {name: lambda: adapter})
    # A tensor of several rows is printed on several lines.
    got, expected = re.split(r"^expected", text.getvalue().removeprefix("got"), maxsplit=1, flags=re.MULTILINE)
    return got.strip(), expected.strip()
