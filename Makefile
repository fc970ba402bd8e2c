# Everything that people and CI do with this project. `make install` puts the environment in .venv; all else calls it.

PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
# Processes that the suite runs in: at most four, and one for each core. 0: in none but its own, as for -s and --pdb, and on an
# accelerator, of which every server takes most of the memory.
WORKERS ?= auto

.PHONY: install demo test lint types stubs check-stubs format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          the main job, on an embedded server, on real data"
	@echo "make test          the whole test suite"
	@echo "make lint types    ruff, mypy"
	@echo "make stubs         regenerate client/hvpd/v1 from proto/"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hvpd needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server]' --group dev
	touch $@

demo: install
	$(BIN)/python examples/digits.py

test: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

stubs: install
	$(BIN)/python proto/generate.py

check-stubs: install
	$(BIN)/python proto/generate.py --check

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
