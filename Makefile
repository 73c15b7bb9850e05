# Every target does all its own set-up: a machine needs Python 3.11, 3.12 or 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

# Some containers set it; a hundred processes of the tests would each compile all that they import.
unexport PYTHONDONTWRITEBYTECODE

# Test processes, each of up to 5 GB; a third on two cores works while the tests of servers wait.
WORKERS ?= 3

.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo       record demonstrations, train a tiny VLA, serve and evaluate it (about 15 min, 2 cores)"
	@echo "make test       lint, types and the test suite"
	@echo "make test-slow  the tests marked slow: all variants, foreign clients, killed runs, many seeds"
	@echo "make lint       ruff and pyrefly"
	@echo "make bench      loader and tabletop benchmarks"

$(BIN)/uv:
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f'needs Python 3.11, 3.12 or 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv

$(VENV)/.demo: setup.py | $(BIN)/uv
	$(UV) -e ".[demo]"
	touch $@

$(VENV)/.dev: setup.py | $(BIN)/uv
	$(UV) -e ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python launch/demo.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

test: lint
	$(BIN)/pytest -m "not slow and not gpu and not sim" --fixtures tests/fixtures -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

bench: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python bench/tabletop.py
	$(BIN)/python bench/loader.py --data tests/fixtures --window 1 8 --json runs/bench/loader.json

clean:
	rm -rf $(VENV) runs
