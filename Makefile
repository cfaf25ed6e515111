# make setup | study | ui | test | check | format | bench: every target installs what it needs into .venv first.
PYTHON ?= python3
STUDY ?= studies/layerwise.yaml
PORT ?= 5000
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup study plan status report ui test check format clean

study: $(INSTALLED)
	@$(BIN)/layerswap run $(STUDY)

plan status report: $(INSTALLED)
	@$(BIN)/layerswap $@ $(STUDY)

ui: $(INSTALLED)
	@$(BIN)/layerswap ui $(STUDY) --port $(PORT)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
