#!/bin/sh
# Prepare what benchmarks and tests need on a GPU machine without a network: Python 3.12, x86-64 Linux, torch and transformers
# installed. Download packages into .whl/, in the versions of constraints.txt; with HOPPER=1 also those for Hopper. Install them
# there with
#     python3 -m pip install --no-index --no-deps .whl/*.whl
# With nvcc and python3.12, also build the extension in place, with CUDA code for VLMKERNELS_CUDA_ARCHS (default 90a).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# Liger's Hopper kernel and FlashAttention-4 need the CUTLASS Python DSL, for CUDA 13.
hopper="flash-attn-4 quack-kernels torch-c-dlpack-ext einops apache-tvm-ffi nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base
    nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13"
packages="trl datasets dill multiprocess xxhash simplejpeg liger_kernel RapidFuzz math-verify latex2sympy2_extended kernels pycocotools"
platforms=""
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms="$platforms --platform ${tag}_x86_64"
done
mkdir -p .whl
rm -f .whl/*.whl
pinned=""
[ "${HOPPER:-}" = 1 ] || hopper=""
for package in $packages $hopper; do
    pin=$(grep -i "^$package==" constraints.txt) || pin=$package
    pinned="$pinned $pin"
done
# shellcheck disable=SC2086
$python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms -d .whl $pinned
# Not every version of antlr4-python3-runtime, a pure Python package, has a wheel.
$python -m pip wheel --quiet --no-deps -w .whl "$(grep -i '^antlr4-python3-runtime==' constraints.txt)"
ls -l .whl

module=vlmkernels/_C.cpython-312-x86_64-linux-gnu.so
build=build/gpu-wheels
if [ -e "$module" ] && [ -z "$(find setup.py csrc -newer "$module" -print -quit)" ]; then
    echo "$module is up to date"
elif command -v nvcc > /dev/null && python3.12 --version > /dev/null 2>&1; then
    python3.12 -m pip install --quiet --upgrade --target "$build/tools" setuptools pybind11
    PYTHONPATH="$PWD/$build/tools" VLMKERNELS_CUDA=1 VLMKERNELS_CUDA_ARCHS="${VLMKERNELS_CUDA_ARCHS:-90a}" \
        python3.12 setup.py --quiet build_ext --inplace --build-temp "$build" > "$build/log"
    ls -l "$module"
else
    echo "$module is not built: that needs nvcc and python3.12. \`make gpu-check\` builds it on the GPU machine, which takes minutes."
fi
