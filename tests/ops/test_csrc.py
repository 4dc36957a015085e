"""The C++ sources: headers include only headers below them, and errors of the structs name the field."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from vlmkernels import backend

CSRC = Path(__file__).parents[2] / "csrc"
# The folders whose headers the files of each folder may include. The bindings are in ".".
ALLOWED = {"common": {"common"}, "cpu": {"cpu", "common"}, "cuda": {"cuda", "common"}, ".": {".", "common"}}


def test_includes_point_down():
    graph = {}
    for file in (path for path in CSRC.rglob("*") if path.is_file()):
        names = re.findall(r'^#include "(.+)"', file.read_text(), flags=re.MULTILINE)
        graph[file] = {(file.parent / name).resolve() for name in names}
        folders = {str(path.parent.relative_to(CSRC)) for path in graph[file]}
        assert folders <= ALLOWED[str(file.parent.relative_to(CSRC))], file
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rowz": 0}, AttributeError, "GatherLogps has no field rowz"),
        ({"vocab": "many"}, TypeError, "GatherLogps.vocab cannot be 'many'"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, bfloat16, float16, got int8"),
    ],
)
def test_errors_of_a_struct_name_the_field(fields, error, message):
    module = backend.native()
    if isinstance(module, ImportError):
        pytest.skip(str(module))
    with pytest.raises(error, match=re.escape(message)):
        module.GatherLogps(**fields)
