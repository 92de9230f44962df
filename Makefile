# make test, make demo, make bench-cpu and make check need a Linux machine with Python 3.10 or newer (with
# venv) and g++; each sets up .venv by itself first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help test test-torch test-integrations demo bench bench-cpu experiments gpu-check gpu-bundle
.PHONY: test-emulated test-neon test-nvcc test-thorough wheel wheel-test docs docs-serve check clean

help:
	@echo "make test         the tests"
	@echo "make test-torch   the tests with another torch, TORCH=2.11.0, in an environment of its own"
	@echo "make test-integrations"
	@echo "                  the tests with trainers, in an environment of their own"
	@echo "make test-emulated"
	@echo "                  GPU kernels of rows and of few bits, interpreted and emulated on the CPU"
	@echo "make test-thorough"
	@echo "                  combinations of options beyond those of make test"
	@echo "make test-neon    the kernels for aarch64, cross-compiled and emulated: AVX2's bits"
	@echo "make test-nvcc    the CUDA kernels compiled for all architectures: registers, spills, accesses"
	@echo "make demo         a small GPT trained with AdamW and with AMAdamW: table and picture"
	@echo "make bench-cpu    step times on the CPU against torch's AdamW and SGD, and docs/performance.md"
	@echo "make bench        the same on the GPU, with PYTHON's own torch; no document is written"
	@echo "make experiments  small models trained with each optimizer, in minutes"
	@echo "make gpu-check    the GPU backends tested and timed, with PYTHON's own torch and triton"
	@echo "make gpu-bundle   their compiled parts for another machine: build/gpu-bundle"
	@echo "make wheel        the wheel for every Python and torch, into dist"
	@echo "make wheel-test   the wheel installed and used in environments of several Pythons and torches"
	@echo "make docs         the documentation as a site: build/site"
	@echo "make docs-serve   the same on this machine's port 8000, anew at each change"
	@echo "make check        linters, formatters, type checker, and links in the documents"
	@echo "make clean        removes what was built, .venv included"

# A file's tests stay together: some share what takes long to make. Files begin in the order of
# tests/conftest.py.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# With another torch, as PyPI has it (with CUDA, 3 GB), and the triton that it asks for. In a copy, as
# the C++ extension lies in the package's folder and is tied to its torch. Left out are benchmarks,
# and what knows no torch.
TORCH ?= 2.11.0
OTHER := .venv-torch-$(TORCH)
COPIED := adamem_fused bench csrc docs examples tests triton_kernels $(wildcard *.* LICENSE Makefile)
LEFT_OUT := test_bench* test_experiments.py test_cuda_build.py test_documents.py test_release_files.py

test-torch: $(OTHER)/installed
	$(call copy,$(OTHER))
	cd $(OTHER)/copy && ../bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LEFT_OUT:%=--ignore-glob='*/%')

define copy
mkdir -p $(1)/copy
find $(1)/copy -type f ! -name '*.so' -delete
tar -c --exclude='*.so' --exclude=__pycache__ $(COPIED) | tar -x -C $(1)/copy
endef

# In an environment of its own, as trainers bring much with them, and in a copy for its torch.
test-integrations: .venv-integrations/installed
	$(call copy,.venv-integrations)
	cd .venv-integrations/copy && ../bin/python -m pytest -m integrations tests/integrations

# Debian, Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user. Without them pytest would skip.
# What make test leaves out of them: two to three minutes.
test-emulated: .venv/installed
	$(BIN)/python -m pytest -n 2 -m emulated tests/test_triton.py tests/test_cuda.py tests/test_gpu_check.py

# In make test each value of an option meets each of the others once.
test-thorough: .venv/installed
	$(BIN)/python -m pytest -n 2 -m thorough

test-neon: .venv/installed
	cd tests && ../$(BIN)/python -c 'import sys, test_neon; sys.exit(test_neon.why_not())'
	$(BIN)/python -m pytest -m neon tests/test_neon.py

# make test compiles norms.cu for one architecture.
test-nvcc: .venv/installed
	$(BIN)/python -m pytest -m nvcc tests/test_cuda_build.py

demo: .venv/installed
	$(BIN)/python -m bench.demo --out build/demo

bench-cpu: .venv/installed
	$(BIN)/python -m bench kernels --device cpu
	$(BIN)/python -m bench train --device cpu
	$(BIN)/python -m bench phase --device cpu
	$(BIN)/python -m bench low-precision --device cpu
	$(BIN)/python -m bench host
	$(BIN)/python -m bench readme

experiments: .venv/installed
	$(BIN)/python -m bench.experiments run --quick

# These take the machine's own torch, which knows its GPU.
bench:
	$(PYTHON) -m bench kernels --device cuda
	$(PYTHON) -m bench train --device cuda
	$(PYTHON) -m bench phase --device cuda
	$(PYTHON) -m bench low-precision --device cuda

# Takes the machine's own torch, which knows its GPU, and its nvcc where nothing is compiled yet.
gpu-check:
	$(PYTHON) -m bench.gpu_check

# What gpu-check needs compiled, for a machine where that would cost time that is short: it has
# this Python and torch, and an sm_90 GPU or a newer one. torch's headers and libraries are
# enough to compile against, so that nothing of CUDA is downloaded.
PYTHON312 ?= python3.12
BUNDLE := build/gpu-bundle
gpu-bundle: build/gpu-venv/installed
	ADAMEM_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 build/gpu-venv/bin/python setup.py build_ext \
		--build-lib $(BUNDLE) --build-temp build/gpu-temp --parallel 2
	TORCH_CUDA_ARCH_LIST=9.0 build/gpu-venv/bin/python -m bench.gpu_check.cuda_sizes $(BUNDLE)/sizes

build/gpu-venv/installed:
	$(PYTHON312) -m venv build/gpu-venv
	build/gpu-venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		torch==2.11.0 setuptools==80.9.0
	touch $@

wheel: build/wheel-venv/installed
	build/wheel-venv/bin/python packaging/make_wheel.py

build/wheel-venv/installed: packaging/requirements.txt
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# In fresh environments without a compiler. Pythons are those of PATH, or named by PYTHON310 and so on.
WHEEL_TESTS := 3.10:2.9.1 3.11:2.13.0 3.12:2.11.0 3.13:2.15.0
wheel-test:
	$(PYTHON) tests/wheel $(wildcard dist/*.whl) $(WHEEL_TESTS)

# The site's source has these at their places in the repository, so that links lead where they do here.
PAGES := $(wildcard *.md LICENSE CITATION.cff docs examples bench/results)

docs docs-serve: build/docs-venv/installed
	rm -rf build/docs
	mkdir -p build/docs/bench
	$(foreach page,$(PAGES),ln -s $(abspath $(page)) build/docs/$(page);)
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs $(if $(filter docs,$@),build --strict,serve)

build/docs-venv/installed: docs/requirements.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* tests/cuda_emulation/*.h)
	$(BIN)/mypy
	$(BIN)/zizmor --offline --strict-collection --quiet .github
	$(BIN)/python -m pytest -q tests/test_documents.py -k "links or paths or commands"

.venv/requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "adamem_fused needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed: .venv/requirements setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	@echo "Compiling the C++ extension: about a minute"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

$(OTHER)/requirements: requirements.txt
	$(PYTHON) -m venv $(OTHER)
	grep -v -E '^(torch|triton)==' requirements.txt > $@.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) -r $@.txt
	touch $@

$(OTHER)/installed: $(OTHER)/requirements setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(call copy,$(OTHER))
	ADAMEM_CUDA=0 $(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable $(OTHER)/copy
	touch $@

.venv-integrations/installed: tests/integrations/requirements.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(call copy,.venv-integrations)
	ADAMEM_CUDA=0 .venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .venv-integrations/copy
	touch $@

clean:
	rm -rf .venv .venv-torch-* .venv-integrations build dist *.egg-info adamem_fused/*.so
