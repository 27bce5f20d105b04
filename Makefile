# The two commands are `make serve` and `make test`; each sets up everything it needs, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000

.PHONY: setup serve test format lint types

setup: $(VENV)/.ready

# The versions this project was tested with are in constraints.txt; ranges are in pyproject.toml.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: setup
	$(BIN)/qserve serve --host $(HOST) --port $(PORT)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

# Runs the GPU's kernels where there is no GPU, in its interpreter. A torch for CUDA brings it along.
$(VENV)/.triton: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[triton]'
	touch $@

test: setup lint types $(VENV)/.triton
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile
