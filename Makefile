# The commands of the project. `make test` and `make demo` need Python 3.11 or newer with venv and headers, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard apmem2/native/*.c apmem2/native/*.h) apmem2/native/_build.py setup.py pyproject.toml

.PHONY: demo test check bench native bench-compare native-test clean preconditions

preconditions:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or newer ($(PYTHON) is older; say PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: venv (Debian: apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "missing: the Python headers (Debian: apt-get install python3-dev)"; exit 1; }
	@command -v $${CC:-gcc} >/dev/null || { echo "missing: gcc (Debian: apt-get install gcc)"; exit 1; }

$(BIN)/python: | preconditions
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras: built again when the C core or the metadata changed.
$(VENV)/.test-stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.demo-stamp

$(VENV)/.demo-stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

$(VENV)/.check-stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[check]'
	@touch $@ $(VENV)/.test-stamp $(VENV)/.demo-stamp

demo: preconditions $(VENV)/.demo-stamp
	@$(BIN)/python -m examples.demo

test: preconditions $(VENV)/.test-stamp
	$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

check: preconditions $(VENV)/.check-stamp
	$(BIN)/ruff check apmem2 tests examples setup.py
	$(BIN)/ruff format --check apmem2 tests examples setup.py
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: preconditions $(VENV)/.test-stamp
	$(BIN)/python -m tests.benchmarks $(BENCH_ARGUMENTS)

# Two results of `make bench BENCH_ARGUMENTS='--json FILE'`, or several of each: ratios only, status 1 when a goal was lost.
bench-compare: preconditions $(VENV)/.test-stamp
	@[ -n "$(BEFORE)" ] && [ -n "$(AFTER)" ] || { echo "say: make bench-compare BEFORE=a.json AFTER=b.json"; exit 2; }
	$(BIN)/python -m tests.benchmarks.compare --before $(BEFORE) --after $(AFTER)

native:
	$(MAKE) -C apmem2/native lib

native-test:
	$(MAKE) -C apmem2/native test asan tsan

clean:
	rm -rf $(VENV) build dist *.egg-info apmem2/native/build apmem2/native/_apm.*.so apmem2/native/_apm.c .pytest_cache .mypy_cache .ruff_cache .hypothesis
