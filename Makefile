# Everything from a fresh clone: make sets up .venv by itself and installs again only when needed.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test pytest lint format types clean

VENV := .venv
BIN := $(VENV)/bin
MODEL := examples/models/tiny-llama
# the first of these that is 3.11 or newer
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-compile
# pip leaves compiling to the first import, which must then be kept: else every process compiles torch again
export PYTHONDONTWRITEBYTECODE :=
# processes that run tests; on a GPU, one
WORKERS ?= 2
# a CUDA build of torch that the system already has is kept; the tested build is for CPUs
HAS_CUDA_TORCH = $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null

help: ## list these targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(VENV)/dev-installed ## install hasten and its tools into .venv

demo: $(VENV)/installed ## optimize the model that ships; the report is runs/demo/report.html
	$(BIN)/hasten optimize $(MODEL) --new-tokens 32 -o runs/demo

test: setup ## lint, types and all tests, at the same time
	@$(MAKE) --no-print-directory -j3 lint types pytest

pytest: setup ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: setup ## ruff: mistakes and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## mypy, strict
	$(BIN)/mypy

clean: ## remove .venv and every cache, keep runs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "hasten needs Python 3.11 or newer: install it, or name it with make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	@echo "1/3 $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $$($(HAS_CUDA_TORCH) && echo --system-site-packages) $(VENV)
	@$(PIP) --upgrade -c constraints.txt pip # the one that comes with Python 3.11 takes twice as long
	@# what the environment has already is kept, so it is not pinned
	@$(BIN)/python -m pip --disable-pip-version-check list --format=freeze | sed 's/=.*/==/' | \
		grep -viFf - constraints.txt > $(VENV)/constraints.txt || true
	@echo "2/3 torch: $$(grep '^torch==' $(VENV)/constraints.txt || echo the CUDA build that is there)"
	@$(PIP) -c $(VENV)/constraints.txt torch 'setuptools>=80'
	@touch $@

$(VENV)/installed: $(VENV)/torch
	@echo "3/3 hasten with the onnxruntime and serve extras"
	@$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[onnxruntime,serve]'
	@touch $@

$(VENV)/dev-installed: $(VENV)/torch
	@echo "3/3 hasten with the onnxruntime, serve and dev extras"
	@$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[onnxruntime,serve,dev]'
	@touch $(VENV)/installed $@
