# Two commands do all the set-up: `make train` and `make test`. Both make .venv from requirements.lock first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all test-ui bench check docs ui lock
train: .venv/installed
	$(BIN)/captcha-exp train experiment=quickstart

# On all cores, four at most: more would wait for each other in torch. Each process takes neighboring tests, which
# share fixtures, and one that has finished takes half of those of another.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

# Without the tests marked `long`: five minutes on two cores.
test: .venv/installed
	$(BIN)/pytest $(PARALLEL)

test-all: .venv/installed
	$(BIN)/pytest $(PARALLEL) -m 'not slow and not gpu and not ui'

# In a real browser: needs chromium at /usr/bin/chromium.
test-ui: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ui]'
	$(BIN)/pytest -m ui

# Short forms of the benchmarks of speed, in one table: some minutes on two idle cores.
bench: .venv/installed
	$(BIN)/python benchmarks/bench.py

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/, in build/site. A warning is an error, also of a page that loads something from another host.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ui: .venv/installed
	$(BIN)/captcha-exp ui

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and \
	    f"Python {v[0]}.{v[1]} is not supported, 3.11 to 3.13 are: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing the locked dependencies into .venv (once, a minute or two)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# The newest versions that pyproject.toml allows, written to requirements.lock; review the difference before committing.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet --editable '.[dev]'
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > requirements.lock
	rm -rf .venv-lock
