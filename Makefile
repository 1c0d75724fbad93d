# Everything works on a machine that has Python 3.11+ and make: each target makes .venv itself, once.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo test test-ray test-plain test-long check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Triptych needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/python -m pipelines.demo

# Side by side: tests that start Ray, of which only one should run at a time, and all others, with a thread each.
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-ray test-plain

test-ray: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m 'not slow and ray'

test-plain: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m 'not slow and not ray'

test-long: $(STAMP)
	$(VENV)/bin/python -m pytest -q

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) demo runs
