# The project's commands. `make compare` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BUDGET ?= quick
STUDY ?= alpaca toolcalls matched-toolcalls matched-alpaca again-toolcalls smallest-toolcalls chinese others-toolcalls scales-toolcalls prefix-toolcalls reupload-toolcalls definitions lowrank-alpaca lowrank-toolcalls long-alpaca
OUTPUT ?= reports/compare

BIN := $(VENV)/bin
UV := 0.13.9
LOCK := --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-emit-package torch -c constraints.txt
SOURCES := $(shell find csrc python -type f -not -name '*.pyc' -not -name '*.so') cmake/* CMakeLists.txt pyproject.toml

.PHONY: help compare study study-small test peft-suite docs gpu-check cuda-evidence bench bench-environments bench-plots lint lock audit stubs clean
help:
	@echo "make compare   train QAA, LoRA, SoRA, Prefix and full fine-tuning on a real LLM; report in $(OUTPUT)"
	@echo "make study     the tables of docs/study, four tasks, 26 hours; make study-small: two rows, one seed"
	@echo "make test      the test-suite"
	@echo "make peft-suite           all of PEFT's own tests that take a configuration, on QAA and SoRA"
	@echo "make docs      the documentation as a site, in build/docs"
	@echo "make gpu-check CUDA kernels on this machine's GPU: tests, compute-sanitizer, times; results in reports/gpu"
	@echo "make cuda-evidence        registers, spills and occupancy of compiled CUDA kernels, into tests/cuda/resources.json"
	@echo "make bench     kernels against simulators and LoRA, and the goals; results in reports/bench"
	@echo "make bench-environments   environments for simulators that do not fit into the project's own"
	@echo "make bench-plots          cost per state against wires, layers and batch; figures in reports/bench"
	@echo "make lint      ruff and mypy"
	@echo "make lock      versions and hashes of packages, into requirements/; make audit: what is known against them"

# Packages have the versions and hashes of requirements/, except torch, whose builds differ from machine to machine; no
# later step resolves anything. Python compiles what is imported, when it is imported, and keeps it: images often forbid
# that by a variable, and every process that imports torch and transformers then takes 20 s instead of 8.
unexport PYTHONDONTWRITEBYTECODE
HASHED := --quiet --no-compile --require-hashes --no-deps --no-build-isolation

$(VENV)/.build: requirements/build.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement $<
	touch $@

# The compiler of the CUDA kernels, where the build is told to take it from the package index (QAA_CUDA_FROM_PYPI=1).
CUDA := $(if $(QAA_CUDA_FROM_PYPI),$(VENV)/.cuda)
$(VENV)/.cuda: requirements/dev.txt $(VENV)/.build
	awk '/^[a-z]/ {wanted = /^nvidia-/} wanted' $< > $(VENV)/cuda.txt
	$(BIN)/python -m pip install $(HASHED) --requirement $(VENV)/cuda.txt
	touch $@

$(VENV)/.compare-packages $(VENV)/.dev-packages: $(VENV)/.%-packages: requirements/%.txt constraints.txt $(VENV)/.build $(CUDA)
	$(BIN)/python -m pip install $(HASHED) --requirement $<
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	touch $@

# Compiled without these packages, so that `make --jobs 2` does both at a time.
$(VENV)/.wheel: $(VENV)/.build $(CUDA) $(SOURCES)
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	touch $@

# An environment for development serves the comparison as well.
$(VENV)/.compare $(VENV)/.dev: $(VENV)/.%: $(VENV)/.%-packages $(VENV)/.wheel
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $(VENV)/.compare-packages $(VENV)/.compare $@

# Newer versions: rm requirements/*.txt, and again.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet uv==$(UV)
	build/lock/bin/uv pip compile $(LOCK) --group build -o requirements/build.txt
	build/lock/bin/uv pip compile $(LOCK) --extra dev -c requirements/build.txt -o requirements/dev.txt pyproject.toml
	build/lock/bin/uv pip compile $(LOCK) --extra compare -c requirements/dev.txt -o requirements/compare.txt pyproject.toml

# What is known against the locked versions, and torch's; asks an advisory service, and fails without an answer.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	for file in requirements/build.txt requirements/dev.txt constraints.txt; do \
	  build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $$file || exit 1; done

compare: $(VENV)/.compare
	$(BIN)/qaa compare --budget $(BUDGET) --out $(OUTPUT)

# Both can be interrupted: the same command continues. The results are committed, and the page is made from them.
# One of them: make study STUDY=alpaca
study: $(VENV)/.compare
	for task in $(STUDY); do \
	  $(BIN)/qaa compare --config docs/study/$$task.yaml && \
	  cp reports/study/$$task/results.json docs/study/$$task.json || exit 1; done
	$(BIN)/python -m qaa.compare.study docs/study/README.md

study-small: $(VENV)/.compare
	$(BIN)/qaa compare --config docs/study/small.yaml

# PEFT's tests are in its sdist, of which `make test` runs a part; torchao stays out of the environment.
test: $(VENV)/.dev
	$(BIN)/python tests/peft_suite.py --fetch
	$(BIN)/python tests/peft_quantized.py --fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 40

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

peft-suite: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft_suite.py --numprocesses auto

# An environment of its own, in which torch has CUDA and the kernels are compiled for this machine's GPU alone.
gpu-check:
	@nvidia-smi >/dev/null 2>&1 || { echo "expected a machine with an NVIDIA GPU and its driver, received one without" >&2; exit 1; }
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt '.[test]' \
	  -Ccmake.define.QAA_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native
	.venv-gpu/bin/python -m benchmarks.gpu

# What test_cuda_static.py compares with; needs no GPU.
cuda-evidence: $(VENV)/.dev
	$(BIN)/python tests/cuda_evidence.py

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# Rivals that need versions of their own; `make bench` leaves out what is not installed.
bench-environments: $(VENV)/.dev
	$(BIN)/python -m benchmarks.environments

bench-plots: $(VENV)/.dev
	$(BIN)/python -m benchmarks.plots --sweep

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Type stubs of the compiled module, from the module itself.
stubs: $(VENV)/.dev
	$(BIN)/pybind11-stubgen qaa._core --output-dir build/stubs
	cp build/stubs/qaa/_core.pyi python/qaa/_core.pyi && $(BIN)/ruff format python/qaa/_core.pyi

clean:
	rm -rf build dist reports $(VENV) .venv-bench .venv-gpu
