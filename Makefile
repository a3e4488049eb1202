# `make demo` and `make test` work in a fresh clone: they make .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TOOLS  := .tools

.PHONY: demo test lint docs wheel setup sbom audit clean
.DEFAULT_GOAL := demo

# The constraints file pins every version the tests ran with; torch goes first, so that nothing else chooses its build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nacre needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/installed-dev  ## everything a contributor needs

demo: $(VENV)/installed  ## grow a small model on the embedded text, about five minutes
	$(BIN)/nacre grow --out runs/demo --overwrite
	$(BIN)/nacre generate runs/demo "The function returns" --depths

test: $(VENV)/installed-dev  ## the whole test suite, on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations 15

lint: $(VENV)/installed-dev  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev  ## the documentation as a site, build/site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tools that look at the environment from outside have one of their own.
$(TOOLS)/installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet 'cyclonedx-bom>=7' 'pip-audit>=2.9'
	@touch $@

sbom: $(VENV)/installed $(TOOLS)/installed  ## what is installed, as CycloneDX: sbom.json
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --of JSON -o sbom.json

# Needs the network. Strict: a package that could not be looked up is a failure, not a pass.
audit: $(TOOLS)/installed  ## known vulnerabilities of the pinned versions
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

wheel: $(VENV)/installed-dev  ## test the wheel, then build it into dist/
	$(BIN)/pytest tests/test_wheel.py
	$(BIN)/python -m hatchling build -t wheel -d dist

clean:  ## remove what these targets made, but not the models in runs/
	rm -rf $(VENV) $(TOOLS) build dist sbom.json
