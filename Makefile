# Set-up, the demo, tests and benchmarks. `make demo` and `make test` need nothing but python3 (3.10 to 3.13), pip and a network.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-suite test test-deepspeed bench lint gpu-build gpu-test gpu-bench clean
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

# DeepSpeed beside the environment, where other tests do not import it; the first run compiles its operation for gloo.
test-deepspeed: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	PATH="$(CURDIR)/.venv/deepspeed/bin:$$PATH" PYTHONPATH=.venv/deepspeed $(BIN)/python -m pytest -q tests/distributed/test_deepspeed.py

bench: setup
	$(BIN)/python -m pytest -q bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

# On a machine with a GPU and without a network: its own python3, torch, triton, transformers, pybind11, pytest and nvcc.
gpu-build:
	VLMKERNELS_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	$(PYTHON) -m pytest -q -p no:cacheprovider -m "device or gpu" $$(grep -lE "mark\.(device|gpu)" tests/test_*.py)

gpu-bench: gpu-build
	$(PYTHON) -m pytest -q -p no:cacheprovider bench

clean:
	rm -rf .venv build vlmkernels/*.so *.egg-info demo-output demo-suite-output
