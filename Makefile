# Two commands for a newcomer: `make demo` and `make test`. Both make .venv, install what constraints.txt pins, and build.
#
#   make demo [ARGS=...]      the demonstration on real models       make wheel    dist/*.whl
#   make test [ARGS=...]      all tests                              make sdist    dist/*.tar.gz
#   make test-long            attention on 20,000 cases of a fresh seed, which is printed
#   make lint                 ruff, clang-format, mypy               make format   rewrite sources in the common style
#   make bench [ARGS=...]     the microbenchmarks                    make clean    remove builds (not .venv)
#   make gpu-check DIR=out    checks and measures the GPU rows, with the machine's own Python and torch
#
# PYTHON chooses the interpreter of .venv, MAX_JOBS bounds the parallel compilations; pip's own environment variables
# are honoured (a CPU-only torch comes from the index that PIP_INDEX_URL names).
PYTHON ?= python3
VENV ?= .venv
DIR ?= out
ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATION := $(wildcard tests/emulation/*.h)
PYTHON_SOURCES := $(shell find python kernels benchmarks -name '*.py')

.PHONY: demo test test-long test-emulated lint format bench wheel sdist gpu-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.extra-demo $(VENV)/.built
	$(VENV)/bin/tpweave demo $(ARGS)

test: $(VENV)/.extra-test $(VENV)/.built
	$(VENV)/bin/python -m pytest $(ARGS)
	@$(MAKE) --no-print-directory test-emulated

# The AVX-512 kernels, compiled over AVX2. A processor that has AVX-512 BF16 has run them in `make test` already.
test-emulated: $(VENV)/.extra-test $(VENV)/.built
	@if [ "$$($(VENV)/bin/python .ci/emulation_use.py)" = run ]; then \
	  $(MAKE) --no-print-directory build/emulated/.built && \
	  PYTHONPATH=$(CURDIR)/build/emulated $(VENV)/bin/python -m pytest -q tests/ops tests/comm tests/distributed -k avx512; \
	else echo "test-emulated: skipped, $$($(VENV)/bin/python .ci/emulation_use.py)"; fi

# TPWEAVE_GRID_SEED=<number> and TPWEAVE_GRID_CASES=<number> run the cases of a known seed again.
test-long: $(VENV)/.extra-test $(VENV)/.built
	TPWEAVE_GRID_SEED=$${TPWEAVE_GRID_SEED:-fresh} TPWEAVE_GRID_CASES=$${TPWEAVE_GRID_CASES:-20000} \
	  $(VENV)/bin/python -m pytest -q --timeout 3600 tests/ops/test_attention_grid.py $(ARGS)

lint: $(VENV)/.extra-lint $(VENV)/.built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy

format: $(VENV)/.extra-lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: $(VENV)/.extra-demo $(VENV)/.built
	$(VENV)/bin/tpweave bench --out benchmarks/results $(ARGS)

wheel: $(VENV)/.made
	$(PIP) wheel --no-deps --wheel-dir dist .

sdist: $(VENV)/.made
	$(VENV)/bin/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --dir $(DIR)

clean:
	rm -rf build dist python/*.egg-info *.egg-info python/tpweave/_C*.so python/tpweave/_cuda*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.built

$(VENV)/.made: constraints.txt .ci/preflight.py
	@command -v $(PYTHON) >/dev/null || { echo "tpweave: $(PYTHON) was not found; install Python 3.10 to 3.14." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "tpweave: Python 3.10 to 3.14 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) .ci/preflight.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools pybind11
	@touch $@

# Installs in place: Python sources are used where they are, only C++ is built (and built again by .built below).
$(VENV)/.extra-%: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[$*]' torch
	@touch $@

$(VENV)/.built: $(VENV)/.made $(CXX_SOURCES) setup.py
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	@touch $@

build/emulated/.built: $(CXX_SOURCES) $(EMULATION) $(PYTHON_SOURCES) setup.py
	TPWEAVE_EMULATE_AVX512=1 $(VENV)/bin/python setup.py --quiet build --build-lib build/emulated
	@touch $@
