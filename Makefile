# All commands of this project, for people and CI. `make install` makes the environment
# in .venv, and all other targets need it.

PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
# WORKERS is the number of processes of the suite, at most four. The whole suite has two
# for each core, because its tests often wait for servers. 0 runs it in pytest's own
# process, as for -s and --pdb. Use 0 on an accelerator, too, because every server takes
# most of its memory.
test: WORKERS ?= $(shell expr 2 '*' $$(getconf _NPROCESSORS_ONLN))
test-fast: WORKERS ?= auto
# A process that crashes ends the run: pytest-xdist may wait for ever after it has
# started another.
PARALLEL = --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --max-worker-restart 0

# One thread of OpenBLAS for each process of the suite, because more of them wait for each
# other on the same cores. Tests are compiled once, also where Python is told to write no
# bytecode.
test test-fast: export OPENBLAS_NUM_THREADS ?= 1
test test-fast: export PYTHONDONTWRITEBYTECODE =

.PHONY: install demo test test-fast test-wheel lint types stubs check-stubs docs format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          the main job, on an embedded server, on real data"
	@echo "make test          the whole test suite"
	@echo "make test-fast     unit tests, without a server, in about a minute"
	@echo "make test-wheel    build the wheel and test it without the source tree"
	@echo "make lint types    ruff, mypy"
	@echo "make docs          the documentation site, in build/site"
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
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" tests/client tests/server tests/test_architecture.py $(PYTEST_ARGS)

# The wheel comes before the editable install on the path, so a file that the wheel
# lacks cannot be imported.
test-wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/installed build/wheel/*.whl
	PYTHONPATH=build/wheel/installed $(BIN)/python -m pytest -q tests/deploy/wheel.py tests/e2e/test_local.py

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/towncrier build --draft --version next > /dev/null

types: install
	$(BIN)/mypy

stubs: install
	$(BIN)/python proto/generate.py

check-stubs: install
	$(BIN)/python proto/generate.py --check

# Links, anchors and the navigation are checked. Warnings are errors.
docs: install .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.venv/installed-docs: pyproject.toml constraints.txt .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
