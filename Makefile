# From a fresh clone, with nothing but Python (3.10 or newer) and make:  make demo
#
#   PYTHON=python3.12     the interpreter that the environment is made with
#   PIP_ARGS='...'        further arguments for pip, say another index (CONTRIBUTING.md: CPU build of torch)
#   PYTEST_ARGS='...'     further arguments for pytest, say PYTEST_ARGS='-k losses -x'
#   JOBS=4                test processes, each on one thread

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
# Not at their lowest in test-oldest. Of torch, PyPI has old releases only with CUDA, of several GB; where its CPU
# index can be reached:  make test-oldest NOT_OLDEST=none PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
NOT_OLDEST ?= torch
# What those of their time brought along: matplotlib 3.8 calls names that pyparsing 3.3 warns of.
OF_THEIR_TIME := pyparsing<3.3

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard sklearn_sparseattn/*/_*.[ch])

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest lint format clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make .venv with everything in it

# A virtual environment in $(1), if there is none that works.
define make_environment
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "No '$(PYTHON)' here. Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "'$(PYTHON)' is `"$(PYTHON)" --version`; Python 3.10 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@"$(1)/bin/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(1)"
endef

# Runs again only when what is to be installed has changed.
$(STAMP): $(SOURCES)
	$(call make_environment,$(VENV))
	"$(PY)" -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Every `name>=version` of pyproject.toml as `name==version`, but what the checks or the build alone need.
$(OLDEST)/.installed: $(SOURCES) Makefile
	$(call make_environment,$(OLDEST))
	@grep -oE '^[^#]*"[a-z0-9-]+>=[^"]+"' pyproject.toml | grep -oE '[a-z0-9-]+>=[^"]+' | sed 's/>=/==/' \
	  | grep -vE '^(mypy|ruff|setuptools|$(NOT_OLDEST))==' | sort -u >"$(OLDEST)/lowest.txt"
	@grep -vE "^($$(sed 's/==.*//' "$(OLDEST)/lowest.txt" | paste -sd '|' -))==" constraints.txt >"$(OLDEST)/rest.txt"
	@printf '%s\n' '$(OF_THEIR_TIME)' >>"$(OLDEST)/rest.txt"
	"$(OLDEST)/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_ARGS) \
	  -c "$(OLDEST)/lowest.txt" -c "$(OLDEST)/rest.txt" -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## set up, then run the main job: cells of four modalities, learned and shown
	"$(PY)" examples/demo.py

# One thread per process: two processes of two torch threads each on two cores run ten times slower.
# SCIPY_ARRAY_API: without it scikit-learn skips its array API checks.
test: $(STAMP)  ## set up, then run the tests and doctests
	OMP_NUM_THREADS=1 SCIPY_ARRAY_API=1 "$(PY)" -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# The Python must be one for which the lowest NumPy was built: 3.10 to 3.12.
test-oldest: $(OLDEST)/.installed  ## test with the lowest versions that pyproject.toml names, in .venv-oldest
	OMP_NUM_THREADS=1 SCIPY_ARRAY_API=1 "$(OLDEST)/bin/python" -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff (rules and format), mypy on the package
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: $(STAMP)  ## let ruff format and mend what it can
	"$(PY)" -m ruff format .
	"$(PY)" -m ruff check --fix .

clean:  ## remove caches and built files
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . \( -path "./$(VENV)" -o -path "./$(OLDEST)" \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv and .venv-oldest too
	rm -rf "$(VENV)" "$(OLDEST)"
