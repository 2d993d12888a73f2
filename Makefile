# The commands a person types. demo and test set up everything they need: .venv, pinned requirements, the build.
PYTHON ?= python3
VENV := .venv
JOBS ?= $(or $(TOKENSIEVE_JOBS),$(shell nproc))

# One interpreter for everything: the virtual environment; `make gpu` takes PYTHON as it is, because it must work with no network.
PY := $(VENV)/bin/python

.PHONY: demo test bench wheel test-wheel gpu lint format sanitize mutate build testing clean help

help: ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build ## prune a real photo end to end: a table and demo.png; ARGS="--method FastV" goes on to the program
	PYTHONPATH=python $(PY) -m tokensieve demo $(ARGS)

test: build testing ## all tests that need no GPU
	$(PY) -m pytest

bench: build ## benchmarks of this machine into bench/results/
	PYTHONPATH=python $(PY) -m bench $(ARGS)

lint: $(VENV)/ready ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/ready ## rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(VENV)/bin/clang-format -i

wheel: $(VENV)/ready ## a wheel into dist/
	$(PY) -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist

test-wheel: wheel ## install the wheel into clean environments and run an op; TORCH="torch==2.14.1" adds a second torch
	TOKENSIEVE_WHEEL="$$(ls -t dist/*.whl | head -1)" TOKENSIEVE_WHEEL_TORCH="$(TORCH)" $(PY) -m pytest -m wheel tests/packaging

sanitize: build ## the kernel tests under ASan + UBSan and under TSan
	$(PY) tools/sanitize.py --jobs $(JOBS)

mutate: testing ## drop every barrier and shift every bound once; lists what the tests miss; ARGS="FILE[:LINE]"
	$(PY) tools/mutate.py $(ARGS)

gpu: ## build for the local card, all tests, benchmarks; no network, no virtual environment
	$(PYTHON) tools/gpu.py --jobs $(JOBS)

build: $(VENV)/ready ## the libraries, into python/tokensieve/
	@$(PY) tools/build.py --jobs $(JOBS)

testing: build ## the numpy module of the kernel tests, into build/testing
	@$(PY) tools/build.py --testing --jobs $(JOBS)

clean: ## remove what was built
	rm -rf build dist python/tokensieve/*.so python/tokensieve/_build_info.json

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("tokensieve needs Python >= 3.10, got " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 # its torchvision loads only beside the CUDA torch
	touch $@
