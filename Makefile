# Every target works on a machine that has only Python and make: it builds its environment first.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := test
# Each worker begins with a half of the files, so that what a file sets up is set up once; who has
# done with its own helps the other.
SHARED := -n 2 --dist worksteal

.PHONY: install lock demo test test-all test-latest test-floor check clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

lock: ## writes constraints.txt: the newest versions of all that is installed
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.installed
	.venv-latest/bin/python -m pip freeze --exclude-editable \
		| sed -n -E 's/^([A-Za-z0-9_.-]+==[0-9][^ +]*).*/\1/p' > constraints.txt

demo: install  ## a student that fell for a marker, and one that did not; ends with demo/report.html
	$(BIN)/python examples/demo.py --out demo

test: install  ## all tests and doctests, but for the slow ones
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

test-all: install  ## the slow ones too
	$(BIN)/python -m pytest $(SHARED)

test-latest: .venv-latest/.installed  ## on the newest versions that pyproject.toml admits
	.venv-latest/bin/python -m pytest $(SHARED) -m "not slow"

test-floor: .venv-floor/.installed  ## on the oldest ones
	.venv-floor/bin/python -m pytest $(SHARED) -m "not slow"

.venv-latest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet --upgrade --editable '.[$(EXTRAS)]'
	touch $@

.venv-floor/.installed: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --upgrade pip
	.venv-floor/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable '.[$(EXTRAS)]'
	touch $@

check: install  ## format, lint, types, and that imports only go down
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-latest .venv-floor demo build dist *.egg-info
