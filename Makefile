# Everything runs in .venv, made here: a fresh clone needs Python 3.11+ and make, nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Two times quiet: a machine's own pip configuration may print warnings that are not ours.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# A worker of the tests for each core that this process may use, two at least, as most of a test with a pool is waiting.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))' 2>/dev/null || echo 2)
# Another processor's: what passes with these kernels and with the machine's own rests on neither. KERNELS=... names others.
KERNELS := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

# Nothing is written into the user's home. IPython warns, and takes a temporary folder, if the parent is missing.
export IPYTHONDIR := $(CURDIR)/build/ipython
export MPLCONFIGDIR := $(CURDIR)/build/matplotlib
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: help demo test docs package lint pytest numerics soak fuzz nbval twice format store bench coverage lab clean distclean

help:
	@echo "make demo       run notebooks/quickstart.ipynb headless; leaves build/quickstart.ipynb and .html"
	@echo "make test       lint, pages, then every test, numeric ones on two kinds of kernels, then every notebook"
	@echo "make numerics   the numeric tests on the kernels of an older processor, or those that KERNELS= names"
	@echo "make docs       the documentation's pages, with every link checked; in build/site"
	@echo "make package    source archive and wheel, as they would be uploaded; in build/dist"
	@echo "make lint       format, lint, types, floors, notebooks"
	@echo "make lab        JupyterLab on notebooks/"
	@echo "make format     rewrite the code as 'make lint' wants it"
	@echo "make twice      run every cell of every notebook twice in one kernel"
	@echo "make store      run the notebooks and keep their outputs, as they are committed"
	@echo "make bench      benchmarks beside their rivals, about 25 minutes; python -m benchmarks --list says which"
	@echo "make soak       20,000 random schedules of the coordinator and 20 of a real pool, about 25 minutes"
	@echo "make fuzz       250,000 frames of noise against a pool's sockets, of strangers and of key holders; needs root"
	@echo "make coverage   the tests with coverage, engines and hub included"
	@echo "make clean      remove build/ and caches; distclean removes .venv too"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    found=$$($(PYTHON) --version 2>/dev/null || echo "no Python at all"); \
	    echo "dnb needs Python 3.11 or later; '$(PYTHON)' is $$found: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dnb[demo] into $(VENV): a few minutes the first time"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev-stamp: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dnb[dev] into $(VENV): a few minutes the first time"
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo-stamp

build:
	@mkdir -p $@

demo: $(VENV)/.demo-stamp | build
	$(BIN)/python -m dnb.cli demo --output build

lab: $(VENV)/.demo-stamp | build
	$(BIN)/python -m jupyterlab --ServerApp.root_dir=notebooks

test: lint docs package pytest numerics nbval

# Any warning, such as a link to nowhere, ends the build (with --quiet mkdocs would count none). The pages load nothing
# from elsewhere.
docs: $(VENV)/.dev-stamp | build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What would be uploaded, held against what a package index takes.
package: $(VENV)/.dev-stamp | build
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist . >build/package.log || { cat build/package.log; exit 1; }
	$(BIN)/python -m twine check --strict build/dist/*

pytest: $(VENV)/.dev-stamp | build
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal --durations 15

# Only files that have such a test are collected.
numerics: $(VENV)/.dev-stamp | build
	env $(KERNELS) $(BIN)/python -m pytest -m numeric -n $(WORKERS) --dist worksteal \
	    $$(grep -rl --include='test_*.py' 'mark\.numeric' tests)

soak: $(VENV)/.dev-stamp | build
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest --timeout 0 \
	    tests/unit/hub/scheduling/test_coordinator_schedules.py tests/faults/test_random_schedules.py

# The tests of strangers with more than 250,000 frames of noise in all.
fuzz: $(VENV)/.dev-stamp | build
	DNB_FUZZ_FRAMES=30000 $(BIN)/python -m pytest --timeout 0 --durations 0 tests/faults/test_strangers.py

# A call of its own: nbval collects by file and has its own options. Each notebook starts its own pool; DNB_QUICK shrinks
# what takes long, and leaves outputs that are compared as they are.
nbval: $(VENV)/.dev-stamp | build
ifneq ($(NOTEBOOKS),)
	DNB_QUICK=1 $(BIN)/python -m pytest --nbval --nbval-current-env \
	    --nbval-sanitize-with dnb/nbval_sanitize.cfg $(NOTEBOOKS)
endif

# Every cell of every notebook twice in one kernel.
twice: $(VENV)/.dev-stamp | build
	DNB_QUICK=1 $(BIN)/python .ci/run_twice.py $(NOTEBOOKS)

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
ifneq ($(NOTEBOOKS),)
	$(BIN)/nbqa "ruff check" $(NOTEBOOKS) --nbqa-process-cells dtrain
	$(BIN)/python .ci/check_notebooks.py $(NOTEBOOKS)
endif

format: $(VENV)/.dev-stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

store: $(VENV)/.dev-stamp | build
	$(BIN)/python .ci/store_notebook.py $(NOTEBOOKS)

bench: $(VENV)/.dev-stamp
	$(BIN)/python -m benchmarks

coverage: $(VENV)/.dev-stamp | build
	$(BIN)/coverage run -m pytest tests
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
