# Everything runs in a virtual environment of its own; only Python >= 3.11, make and a package index are assumed.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin
# The CPU build by its exact version: an open range fetches gigabytes of CUDA packages on a machine without a GPU.
TORCH ?= torch==2.13.0
# Releases that pyproject.toml allows and `make lock` leaves out, each with its reason.
# transformers 5.24 needs peft 0.22 for LoRA, and the newest published peft is 0.21.2.
HELD_BACK := 'transformers<5.24'
PYTEST = HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest -n 2 --dist worksteal
# Build backends are locked too: pip installs them apart from everything else.
PIP_LOCKED = $(BIN)/python -m pip install --quiet --constraint constraints.txt
PIP_NEWEST = $(BIN)/python -m pip install --quiet
# Releases without the suffix of their build, so that other indexes have them too; this project itself left out.
INSTALLED = $(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f

.PHONY: demo test test-long test-newest lock lint docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_LOCKED) --upgrade pip
	$(PIP_LOCKED) $(TORCH)
	$(PIP_LOCKED) --build-constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## the whole pipeline on real text, on a CPU
	HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 $(BIN)/python jobs/demo.py

test: $(VENV)/.ready  ## the tests, within eight minutes on two cores
	$(PYTEST) -m 'not long'

test-long: $(VENV)/.ready  ## the tests that take longest, each for a fault that no other test finds
	$(PYTEST) -m long

test-newest: VENV := build/newest
test-newest:  ## the tests with the newest release of every package, after a list of what differs from the lock
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP_NEWEST) --upgrade pip
	$(PIP_NEWEST) $(TORCH)
	$(PIP_NEWEST) --editable '.[dev]'
	@echo 'Differences from constraints.txt (-) in the newest releases (+):'
	@$(INSTALLED) | diff --unified=0 constraints.txt - | grep '^[-+][^-+#]' || echo 'none'
	$(PYTEST) -m 'not long'

lock: VENV := build/lock
lock:  ## rewrites constraints.txt with the newest releases that are not held back
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP_NEWEST) --upgrade pip
	$(PIP_NEWEST) $(TORCH)
	$(PIP_NEWEST) --editable '.[dev]' $(HELD_BACK)
	(echo '# Exact versions for make and CI, written by `make lock`; pyproject.toml has the ranges that users get.'; \
	    $(INSTALLED)) > constraints.txt.new
	mv constraints.txt.new constraints.txt

lint: $(VENV)/.ready docs  ## style, types and documentation
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.ready  ## the documentation as a site in build/docs; any warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going --quiet -b html -d build/doctrees docs build/docs

clean:  ## removes everything that was made, the virtual environment included
	rm -rf build $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
