# Two commands do everything: `make quickstart` and `make test`. Each sets up .venv by itself, once; the quickstart also
# fetches a pretrained base of 93 MB, once, after which it needs no network.
PYTHON ?= python3.11
BIN := .venv/bin
# Tests run one process per core with one thread each, which is faster here than threads that wait for each other.
PYTEST_PROCESSES ?= auto

.PHONY: quickstart base test test-slow test-server docs setup format clean

quickstart: base
	$(BIN)/manyicl quickstart

# Where it cannot be fetched, the command says why, and the quickstart shows what needs no base.
base: .venv/.installed
	$(BIN)/manyicl models get smollm2 || true

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_PROCESSES) --dist worksteal -m "not slow and not gpu and not server"

# Checks that take long.
test-slow: .venv/.installed
	$(BIN)/pytest -m slow

# The task server with PostgreSQL, skipped where it is not installed, with servers that are killed, and what else takes
# minutes.
test-server: .venv/.installed
	$(BIN)/pytest -m server

# The pages of docs/ as a site that opens from the folder site/, without a network.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: base

# torch comes first and pinned, so that nothing else pulls in another build of it.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist site src/*.egg-info
