# `make help` lists the targets. The set-up runs once and again when the files it depends on change.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
QUICK ?=
BENCH_OUT ?= results
BENCH_ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install -c constraints.txt
SETUP_FILES := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel bench interop interop-setup clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 8

demo: $(VENV)/.installed  ## set up everything and run examples/quickstart.py
	$(PY) examples/quickstart.py

test: $(VENV)/.installed-dev  ## run the tests; PYTEST_ARGS="-k artifacts" narrows them
	$(PY) -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: $(VENV)/.installed  ## build dist/bitblas-*.whl
	$(PY) -m pip wheel . --no-deps -w dist

bench: $(VENV)/.installed-bench  ## measure beside other libraries, for an hour; QUICK=1: five minutes; BENCH_ARGS="--resume"
	$(PY) -m benchmark $(if $(QUICK),--quick) --out $(BENCH_OUT) $(BENCH_ARGS)

interop: $(VENV)/.installed-interop  ## run compressed-tensors, gptqmodel and hqq, unmodified, on this bitblas
	$(PY) -m pytest -n 2 -m interop $(PYTEST_ARGS)

interop-setup: $(VENV)/.installed-interop

clean:  ## remove everything the targets above have made
	rm -rf $(VENV) build dist results python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python testing benchmark examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "bitblas needs Python 3.10 or newer; choose one with 'make PYTHON=python3.11 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python cannot create virtual environments. On Debian and Ubuntu, install the package" \
	    "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP_FILES) | $(PY)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(SETUP_FILES) | $(PY)
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(SETUP_FILES) | $(PY)
	$(PIP_INSTALL) -e '.[bench]'
	@echo "The next builds ggml from source, which takes some minutes."
	$(PIP_INSTALL) -e '.[bench-ggml]' || \
	  echo "NOTE: llama-cpp-python COULD NOT BE INSTALLED (see above): the benchmark runs WITHOUT ggml." >&2
	@touch $@ $(VENV)/.installed

# DISABLE_CUDA: hqq would build kernels for CUDA, which its bitblas layer does not use.
$(VENV)/.installed-interop: $(SETUP_FILES) | $(PY)
	DISABLE_CUDA=1 $(PIP_INSTALL) -e '.[test,interop]'
	$(PIP_INSTALL) --no-deps gptqmodel
	@touch $@ $(VENV)/.installed
