# Each target creates .venv when it is missing; nothing but Python >= 3.11 and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench clean

demo: $(READY)  ## draw a toy world, bank it, train twice on the bank, evaluate, ask
	@echo written later

test: $(READY)  ## the default tests (at most four minutes on two cores)
	$(BIN)/pytest -q -m "not slow and not gpu" -n 2

test-all: $(READY)  ## the default tests and the long ones
	$(BIN)/pytest -q -m "not gpu" -n 2

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "framebank needs Python >= 3.11: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,lora]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo bench-results .mypy_cache .ruff_cache .pytest_cache .hypothesis
