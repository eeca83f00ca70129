# Two commands do all the set-up: `make image` paints a picture, `make test` runs the tests.
PROMPT ?= an oil painting of a fox
OUT ?= picture.png
PYTHON ?= python3
BIN := .venv/bin
# Handed on through the environment: no quote, dollar or backtick of a prompt means anything on the way.
export ATELIER_PROMPT := $(value PROMPT)
export ATELIER_OUT := $(value OUT)
unexport PROMPT OUT  # make would expand them on their way out, $(shell …) too

.PHONY: image test lint clean

image: .venv/installed
	@$(BIN)/atelier paint "$$ATELIER_PROMPT" --out "$$ATELIER_OUT"

test: .venv/tested
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A folder without pip is what an interrupted or pip-less `venv` leaves: it is made again.
.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Atelier needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv --clear .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/tested: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv
