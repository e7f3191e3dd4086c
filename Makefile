# Two commands: `make demo` and `make test`. Both need only Python >= 3.11, make and the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	@mkdir -p out
	$(BIN)/bnfold optimize models/digits_resnet.onnx -o out/digits_resnet.folded.onnx
	$(BIN)/python -m models.demo models/digits_resnet.onnx out/digits_resnet.folded.onnx

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("bnfold needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(PIP) -e '.[cpu]'
	@touch $@

# torch first: on its own it resolves to the build that the index offers for this machine.
$(VENV)/.test: $(BIN)/python pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
