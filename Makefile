# make setup | study | ui | test | test-all | check | format | chaos | mutants | bench | bench-tree | build-ext: every target installs what it needs into .venv first.
PYTHON ?= python3
STUDY ?= studies/layerwise.yaml
ARGS ?=
PORT ?= 5000
SEEDS ?= 0-49
SCALE ?= 0.1
LATE_SCALE ?= $(SCALE)
PROCESSES ?= 2
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed

.PHONY: setup study plan status report ui test test-all check format chaos mutants bench bench-tree build-ext clean

study: $(INSTALLED)
	@$(BIN)/layerswap run $(STUDY) $(ARGS)

plan status report: $(INSTALLED)
	@$(BIN)/layerswap $@ $(STUDY)

ui: $(INSTALLED)
	@$(BIN)/layerswap ui $(STUDY) --port $(PORT)

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --seeds $(SEEDS)

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.operators

bench-tree: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.tree --scale $(SCALE) --late-scale $(LATE_SCALE)

build-ext: $(INSTALLED)
	$(BIN)/python -m operators.native

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m operators.native || true
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
