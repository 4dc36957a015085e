#!/bin/sh
# Runs the fast tests with other versions of Python and of the packages, each row of the table below in an environment of its own in
# .venv-versions. Without names it runs all rows; it runs the rows that are left after a failure, and then fails.
#
#   sh tools/test_versions.sh [NAME...]
set -euf
cd "$(dirname "$0")/.."

# name | python | what is installed. "oldest" has the lower bounds of pyproject.toml; numpy is what its Triton's interpreter
# supports. TRL and transformers >= 5.21 do not support Python 3.10, and SmolVLM does not work in 5.18 to 5.20 (docs/versions.md).
versions='
oldest     python3.11 .[test,trl,liger,qlora] torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 accelerate==1.14.0 peft==0.18.0 datasets==4.7.0 trl==1.16.0 numpy==2.3.5
newest     python3.13 .[test,trl,liger,qlora] --constraint constraints.txt
unpinned   python3.13 .[test,trl,liger,qlora]
python3.12 python3.12 .[test,trl,liger,qlora] --constraint constraints.txt
python3.10 python3.10 .[test,liger,qlora] transformers==5.17.0
'
# These take minutes, or do not depend on the versions.
slow='simt sanitizer demo bench examples train/faults train/distributed ops/test_cuda_compile.py ops/test_triton_compile.py'

ignored=$(for path in $slow; do printf ' --ignore tests/%s' "$path"; done)
status=0
for name in ${*:-oldest newest unpinned python3.12 python3.10}; do
    row=$(echo "$versions" | grep "^$name " || { echo "name must be a row of $0, got $name" >&2; exit 2; })
    set -- $row
    python=$2
    shift 2
    "$python" --version > /dev/null || { echo "$name needs $python on PATH (pyenv: set PYENV_VERSION)" >&2; exit 2; }
    environment=.venv-versions/$name
    [ -d "$environment" ] || "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --editable "$@"
    echo "== $name: $("$environment/bin/python" -m pip list 2>/dev/null | grep -E '^(torch|transformers|trl|peft|accelerate) ' | xargs)"
    OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -p no:cacheprovider -n "${WORKERS:-2}" --dist loadfile $ignored tests ||
        { status=1 && echo "== $name failed" >&2; }
done
exit $status
