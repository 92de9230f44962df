# make test, make demo, make bench-cpu and make check need a Linux machine with Python 3.10 or newer (with
# venv) and g++; each sets up .venv by itself first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help test demo bench-cpu experiments gpu-check check clean

help:
	@echo "make test       the tests"
	@echo "make demo       a small GPT trained with AdamW and with AMAdamW: table and picture"
	@echo "make bench-cpu  the cpu backend's time against torch's fused AdamW"
	@echo "make experiments  small models trained with each optimizer, in minutes; the README has hours"
	@echo "make gpu-check  the GPU backends tested and timed, with PYTHON's own torch and triton"
	@echo "make check      linters, formatters and type checker"
	@echo "make clean      removes what was built, .venv included"

test: .venv/installed
	$(BIN)/python -m pytest

demo: .venv/installed
	$(BIN)/python -m bench.demo

bench-cpu: .venv/installed
	$(BIN)/python -m bench.cpu

experiments: .venv/installed
	$(BIN)/python -m bench.experiments run --quick

# Takes the machine's own torch, which knows its GPU.
gpu-check:
	$(PYTHON) -m bench.gpu_check

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/mypy

.venv/requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "adamem_fused needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed: .venv/requirements setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	@echo "Compiling the C++ extension: about a minute"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build *.egg-info adamem_fused/*.so
