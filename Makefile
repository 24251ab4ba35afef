# Each target sets up .venv the first time and reuses it until the dependencies change.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINS := .ci/constraints.txt
PARTS := kernels adapters parallel
# the oldest that is supported, and the one that torch 2.11 pins; the newest is in .venv
TRITONS ?= 3.5.0 3.6.0

# Engines that the tests drive, without their dependencies: of those, what has no build for CPUs is
# stubbed in tests/support, and the rest is not needed.
ENGINES := sglang vllm-omni

# Which build of torch: `cpu`, `cu130`, ... or nothing for PyPI's, which on Linux brings
# gigabytes of CUDA libraries. A build has its Triton, so the pin of Triton holds for `cpu` only.
ifneq ($(shell uname -s),Linux)
TORCH_BUILD ?=
else ifneq ($(shell command -v nvidia-smi),)
TORCH_BUILD ?=
else
TORCH_BUILD ?= cpu
endif
TORCH := $(shell grep '^torch==' $(PINS))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: browser help install demo test tritons lint format types docs bench build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12   interpreter for .venv, 3.11 or later (default: python3)'
	@echo 'TORCH_BUILD=cu130   build of torch (default: cpu without an NVIDIA GPU, else PyPI'\''s)'
	@echo 'JOBS=2              processes of `make test`'
	@echo 'ARGS="..."          passed on by demo, test and bench'

install: $(INSTALLED)  ## set up .venv

demo: $(INSTALLED)  ## generate pictures with a small trained model, plain and cached
	$(BIN)/python -m dbcache demo $(ARGS)

# one thread per process: two processes with two threads each would fight for two cores
test: $(INSTALLED) browser  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# A test looks at the report in a headless browser: Debian's, or the one that DBCACHE_BROWSER names.
browser:
	@test -n "$$DBCACHE_BROWSER" || command -v chromium chromium-browser google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update \
		&& apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	|| echo 'tests/core/test_report.py needs Chromium: apt-get install chromium'

# Each lies in a folder of its own, which stands before .venv's packages while kernels are compiled.
tritons: $(TRITONS:%=triton-%)  ## compile the kernels with older Tritons, for sm_90

triton-%: $(INSTALLED)
	@test -d .tritons/$* || { rm -rf .tritons/$*.part \
		&& $(BIN)/pip install -qq --no-deps --only-binary=:all: --target .tritons/$*.part triton==$* \
		&& mv .tritons/$*.part .tritons/$*; } \
	|| { echo 'LEFT OUT: Triton $* cannot be had for this Python and platform, or without a network'; exit 0; }; \
	test ! -d .tritons/$* || { echo 'Triton $*'; DBCACHE_TRITON=$(CURDIR)/.tritons/$* \
		$(BIN)/python -m pytest -q -p no:xdist tests/kernels/test_offline_compile*.py $(ARGS); }

lint: $(INSTALLED)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers do not run import hooks, so they are shown the package as it is installed.
types: $(INSTALLED)  ## check types
	@rm -rf .links && mkdir -p .links/dbcache
	@ln -s $(CURDIR)/dbcache/* $(wildcard $(PARTS:%=$(CURDIR)/%)) .links/dbcache/
	MYPYPATH=.links $(BIN)/mypy -p dbcache

docs: $(INSTALLED)  ## make the site of the documentation in site/
	$(BIN)/python .ci/reference.py
	$(BIN)/python -m zensical build --clean --strict

bench: $(INSTALLED)  ## measure
	$(BIN)/python -m bench.run $(ARGS)

build: $(INSTALLED)  ## make the wheel and the sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	rm -rf build

clean:  ## remove everything generated but .venv
	rm -rf build dist demo_out site .links *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or later: make PYTHON=python3.11 ...")'
	@echo 'Setting up $(VENV); the first time this takes some minutes.'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(filter cpu,$(TORCH_BUILD)),cp $(PINS) $(VENV)/pins.txt,sed '/^triton==/d' $(PINS) >$(VENV)/pins.txt)
	@$(BIN)/pip install --quiet -c $(VENV)/pins.txt '$(TORCH)$(TORCH_BUILD:%=+%)' 2>/dev/null \
	|| $(BIN)/pip install -c $(VENV)/pins.txt '$(TORCH)' \
		$(TORCH_BUILD:%=--extra-index-url https://download.pytorch.org/whl/%)
	@$(BIN)/pip install -qq -c $(VENV)/pins.txt --no-warn-conflicts --editable '.[dev]'
	@$(BIN)/pip install -qq -c $(VENV)/pins.txt --no-deps $(ENGINES)
	@touch $@
