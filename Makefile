# Every target works on a machine that has only Python and make: it builds .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: install  ## train a teacher, rank students, distil two; ends with demo/report.html (about six minutes)
	$(BIN)/python examples/demo.py --out demo

test: install  ## all tests and doctests
	$(BIN)/python -m pytest -n 2

check: install  ## format, lint, types, and that imports only go down
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf .venv demo build dist *.egg-info
