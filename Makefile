# `make demo` and `make test` are all one needs; each makes its own virtual environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

DEMO_EXTRAS := plot,recipes,rich
TEST_EXTRAS := dev,hf,plot,recipes,rich,sweep

# Byte-compiling everything that is installed takes as long as installing it; Python compiles what it imports.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format wheel clean

help: ## list these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: $(VENV)/.demo ## train on sentences of Python's own documentation, then ask which of them made the model say what it says
	$(BIN)/python recipes/demo.py

test: $(VENV)/.test lint types ## everything that is checked: style, types, tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.test ## style (ruff)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(VENV)/.test ## types (mypy, strict)
	$(BIN)/python -m mypy

format: $(VENV)/.test ## rewrite the sources in the project's style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

wheel: $(VENV)/.test ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Expected Python 3.10 or newer, found " + sys.version.split()[0] + ". HINT: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)

# A stamp remembers what was installed, so nothing is installed twice until the requirements change.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (a minute or two, once)"
	$(INSTALL) --editable '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (a minute or two, once)"
	$(INSTALL) --editable '.[$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.demo
