# make demo    a policy trained over HTTP, from an empty machine to an answered action
# make test    everything tested
# make serve   the server for real use
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test serve check fast lint prove bench install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

# The stamp is newer than what decides the installation, so a second run calls no pip.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgengine needs Python 3.11 or newer")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (once; a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/installed

demo: install
	@$(BIN)/python -m server demo

serve: install
	@$(BIN)/python -m server serve

lint: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fast: install
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

check: lint fast

test: install
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

prove: install
	@$(BIN)/python benchmarks/intervals.py --output benchmarks/intervals.md
	@$(BIN)/python benchmarks/learning.py --output benchmarks/learning.md

bench: install
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV)
