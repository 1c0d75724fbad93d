# Everything works on a machine that has Python 3.11+ and make: each target makes .venv itself, once.
PYTHON ?= python3
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
export RAY_USAGE_STATS_ENABLED := 0
export NO_MKDOCS_2_WARNING := 1

# TRIPTYCH_UNPINNED=1: the newest versions that pyproject.toml allows, in place of the tested ones. Each way has a stamp of
# its own and removes the other's, so that going from one to the other installs again.
ifdef TRIPTYCH_UNPINNED
STAMP := $(VENV)/.installed-newest
VERSIONS := --upgrade --upgrade-strategy eager
else
STAMP := $(VENV)/.installed
VERSIONS := --constraint constraints.txt
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-ray test-plain test-long coverage check docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the tested versions (done by every other target, once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Triptych needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) --editable '.[dev]'
	@rm -f $(VENV)/.installed $(VENV)/.installed-newest
	@touch $@

demo: $(STAMP) ## generate a corpus, train on it, score it, serve it
	$(VENV)/bin/python -m pipelines.demo

# Side by side: tests that start Ray, of which only one should run at a time, and all others, with a thread each.
test: $(STAMP) ## the tests, in two processes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-ray test-plain

test-ray: $(STAMP) ## only the tests that start Ray
	$(PYTEST) -q -m 'not slow and ray'

test-plain: $(STAMP) ## only the others
	OMP_NUM_THREADS=1 $(PYTEST) -q -m 'not slow and not ray'

test-long: $(STAMP) ## all tests, and the long form of each promise
	$(PYTEST) -q

# Measuring slows the tests down, hence the longer timeout. Data of processes that ended before combine them here.
coverage: $(STAMP) ## the tests with branch coverage: prints it, writes htmlcov/
	$(VENV)/bin/coverage erase
	@$(MAKE) --no-print-directory test PYTEST='$(VENV)/bin/coverage run -m pytest --timeout=900'
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage html --quiet
	$(VENV)/bin/coverage report --sort=cover --skip-covered

check: $(STAMP) ## style, spelling, types, the direction of imports, the documentation
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/codespell $$(git ls-files)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mkdocs build --strict # never --quiet: it would count no warnings

docs: $(STAMP) ## serve the documentation on this machine, rebuilt as it is written
	$(VENV)/bin/mkdocs serve --dev-addr 127.0.0.1:8001

format: $(STAMP) ## format the code and mend what ruff can mend
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove .venv and all that demo, coverage and docs wrote
	rm -rf $(VENV) demo runs site htmlcov .coverage .coverage.*
