# Everything runs in a virtual environment of its own; only Python >= 3.11, make and a package index are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build by its exact version: an open range fetches gigabytes of CUDA packages on a machine without a GPU.
TORCH ?= torch==2.13.0
PYTEST = HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-long lint clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## the whole pipeline on real text, on a CPU
	HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 $(BIN)/python jobs/demo.py

test: $(VENV)/.ready  ## the tests, within ten minutes on two cores
	$(PYTEST) -m 'not long'

test-long: $(VENV)/.ready  ## those that take longest, each for what no other finds
	$(PYTEST) -m long

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## removes what was made, the virtual environment included
	rm -rf build $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
