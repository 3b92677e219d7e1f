# Two commands, each from a clean clone: `make demo` and `make test`.
# They need only python3 (3.11 or newer), make and a package index.

STEP := python3 tools/step.py
BIN := .venv/bin

.PHONY: demo test setup lint types unit format clean

demo: setup
	@$(STEP) "demo" $(BIN)/python examples/demo.py demo

test: setup lint types unit

setup:
	@$(STEP) "set up .venv" python3 tools/setup_venv.py
	@mkdir -p .dev && ln -sfn .. .dev/tokenlabel

lint: setup
	@$(STEP) "lint" $(BIN)/ruff check .
	@$(STEP) "format" $(BIN)/ruff format --check .

types: setup
	@$(STEP) "types" $(BIN)/mypy

unit: setup
	@$(STEP) "tests and the docs' code blocks" $(BIN)/pytest

format: setup
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv .dev demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build dist
