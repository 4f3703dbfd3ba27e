# Every target makes its own environment: Python >= 3.10, git and make are enough to start.
# make PYTHON=python3.12 test   picks another interpreter for a new .venv

PYTHON ?= python3
RUN := .venv/bin/python -m
READY := .venv/.flashtile-ready
JOBS ?= 2

.PHONY: demo test check bench lint types law clean

demo: $(READY)
	$(RUN) flashtile demo

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS)

check: lint types law test

bench: $(READY)
	$(RUN) flashtile bench

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY)
	$(RUN) mypy

law: $(READY)
	$(RUN) pytest -q tests/test_law.py

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter's age is asked before anything is made; pip gets the tested versions and then flashtile itself,
# with nothing else to resolve.
$(READY): requirements/tested.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flashtile needs Python 3.10 or newer; make PYTHON=...")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet -r requirements/tested.txt
	$(RUN) pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
