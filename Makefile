PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
FLOOR_TESTS ?= tests
# A worker a core; a file's tests stay together, so that its fixtures are made once. Files start in
# the order of tests/conftest.py: by default those with the fewest tests, which are long, start last.
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo check test fuzz bench tasks soak docs floor clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.complete  ## fill .venv with everything for development

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,demo]'
	@touch $@

demo: setup  ## compress a real language model into out/demo
	$(BIN)/python scripts/fetch_demo.py
	$(BIN)/lrc compress configs/demo.yaml
	$(BIN)/lrc verify out/demo --against .cache/models/smollm2-135m
	@echo "report: out/demo/report.html"

check: setup  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## fetch what the tests need, run them
	$(BIN)/python scripts/fetch_demo.py --tests
	$(BIN)/python $(PYTEST)

fuzz: setup  ## try random values, then bytes, on the readers, FUZZ_SECONDS (600) each
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python scripts/fuzz.py
	$(BIN)/python scripts/fuzz_bytes.py

bench: setup  ## print the quality table of docs/benchmarks.md
	$(BIN)/python scripts/fetch_demo.py --tests
	$(BIN)/python scripts/bench_quality.py

tasks: setup  ## score compressed models on their own tasks
	$(BIN)/python scripts/fetch_demo.py --tasks
	$(BIN)/python scripts/bench_tasks.py

soak: setup  ## random jobs, kills, many runs in one process
	$(BIN)/python scripts/soak.py

docs: setup  ## regenerate the references of commands and config
	$(BIN)/python scripts/references.py

floor: $(FLOOR)/.complete setup  ## run the tests on the oldest versions pyproject.toml allows
	$(BIN)/python scripts/fetch_demo.py --tests
	$(FLOOR)/bin/python $(PYTEST) $(FLOOR_TESTS)

$(FLOOR)/.complete: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet -c constraints-floor.txt -e '.[dev,demo,fuzz]'
	@touch $@

clean:  ## remove outputs and build leavings; keeps .venv and .cache
	rm -rf out .lrc-work build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
