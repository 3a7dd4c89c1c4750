# Omni's chores. Each target does its own set-up in .venv; plain `make` lists them.
#   make PYTHON=/path/to/python ...   use this interpreter instead of the first fit on PATH
#   make test ARGS=tests/test_load.py  hand arguments to pytest

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ARGS ?=
PIP := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --progress-bar off -c constraints.txt

# A name on PATH is not enough: version managers leave stubs there, and some systems split venv and ensurepip off.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	if $$name -c '$(USABLE)' >/dev/null 2>&1; then echo $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz check format clean

help:  ## list the targets
	@awk -F ':.*## +' '/^[a-z]+:.*##/ {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED)  ## draw demo.png: an LLM rewrites a prompt, a diffusion model draws it, on two Ray actors
	$(BIN)/omni run configs/demo.yaml --prompt "flag of japan" --seed 7 --output demo.png

test: $(INSTALLED)  ## run the whole test suite, without the tests that need a GPU
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

fuzz: $(INSTALLED)  ## send the server 5,000 made-up requests, of which the test suite sends 300
	@OMNI_FUZZ_CASES=5000 $(BIN)/python -m pytest -s tests/server/test_schemathesis.py

check: $(INSTALLED)  ## lint, format, types, architecture and style
	$(BIN)/ruff check --output-format concise
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_style.py

format: $(INSTALLED)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(USABLE)'; then \
		echo "omni needs Python >= 3.11 with the modules venv and ensurepip, and found none on PATH." >&2; \
		echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or say make PYTHON=/path/to/python" >&2; \
		exit 1; fi
	@echo "installing into $(VENV) with $(PYTHON) (a few minutes the first time)"
	@$(BIN)/python -c '$(USABLE)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $(INSTALLED)
