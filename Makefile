# `make quickstart` and `make test` are all a newcomer needs; both set up .venv once.
PYTHON ?= python3
BIN := .venv/bin
# A second transformers, in a folder of its own, with which the tests load exported models, too.
TRANSFORMERS_5 := transformers==5.24.0 huggingface-hub==1.33.0 tokenizers==0.23.3
# Whichever of both .venv was set up with.
CUDA_INSTALLED := .venv/.installed-cuda
INSTALLED := $(or $(wildcard $(CUDA_INSTALLED)),.venv/.installed)
CUDA := $(shell sed -n 's/^cuda-toolkit==\([0-9]*\.[0-9]*\).*/\1/p' constraints-cuda.txt)
# DRIVER=elsewhere: the driver is on other machines than this one, as where a login node has no GPU.
DRIVER ?= here

# Each worker's tests take about one core; those of SLURM wait for it most of the time.
WORKERS ?= $(shell nproc)
SLURM_WORKERS := 8
# Reports for tools/slowest_tests.py.
PYTEST = $(BIN)/pytest --junit-xml=build/tests/$(1).xml
EACH = not slow and

.PHONY: help install install-cuda quickstart check test test-fast test-all wheel try-wheel parity benchmarks docs format clean

help:
	@echo "make quickstart  train, evaluate and sample a small model on this machine"
	@echo "make check       check format, lint and types"
	@echo "make test-fast   the tests that start no runs, for while one works"
	@echo "make test        make check and the tests"
	@echo "make test-all    the same with every parallel layout, every tile of the kernels and long campaigns"
	@echo "make parity      every parallel layout against one process, as a table"
	@echo "make benchmarks  renew the tables of benchmarks/ that this machine can renew (--list: tools/benchmarks.py)"
	@echo "make docs        build the documents as a site, in build/site"
	@echo "make wheel       build a wheel and a source archive in build/dist"
	@echo "make try-wheel   install that wheel into an empty environment and run its quickstart there"
	@echo "make install     only set up .venv"
	@echo "make install-cuda  the same with CUDA builds, for GPUs (not run on one)"
	@echo "make format      format the code and mend what the linter can"
	@echo "make clean       remove .venv and caches; runs and data stay"

install: $(INSTALLED)

install-cuda: $(CUDA_INSTALLED)

define check_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
endef

# torch and torchvision come first and together: a later dependency would pull a torchvision that brings another torch.
define install_torch
@echo "Setting up .venv, once; this takes a few minutes."
$(PYTHON) -m venv .venv
$(BIN)/pip install --quiet --constraint $(1) torch torchvision
endef

define install_rest
DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint $(1) --editable '.[dev]'
$(BIN)/pip install --quiet --no-deps --upgrade --target .venv/transformers-5 $(TRANSFORMERS_5)
@touch $@
endef

.venv/.installed: setup.py pyproject.toml constraints.txt Makefile
	$(check_python)
	$(call install_torch,constraints.txt)
	$(call install_rest,constraints.txt)

$(CUDA_INSTALLED): setup.py pyproject.toml constraints-cuda.txt Makefile
	$(check_python)
	@test $(DRIVER) = elsewhere || why=$$($(PYTHON) bd3_scale/launch/gpus.py --cuda $(CUDA) 2>&1) || { \
	  echo "$$why; make install is for machines without a GPU, make install-cuda DRIVER=elsewhere for a login node" \
	    "whose compute nodes have GPUs" >&2; exit 1; }
	$(call install_torch,constraints-cuda.txt)
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None and "torch " + torch.__version__ + " was built without CUDA: make clean, take the index of CPU builds out of PIP_EXTRA_INDEX_URL, and try again")'
	$(call install_rest,constraints-cuda.txt)

quickstart: $(INSTALLED)
	$(BIN)/bd3-scale quickstart

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint cluster/container/Dockerfile
	$(BIN)/shellcheck cluster/container/*.sh

test-fast: $(INSTALLED)
	$(call PYTEST,fast) --numprocesses=$(WORKERS) --dist=loadfile -m "not slow and not launch and not alone"

test: check
	rm -f build/tests/*.xml
	$(call PYTEST,together) --numprocesses=$(WORKERS) --dist=loadfile -m "$(EACH) not slurm and not alone"
	$(call PYTEST,slurm) --numprocesses=$(SLURM_WORKERS) --dist=loadgroup -m "$(EACH) slurm"
	$(call PYTEST,alone) -m "$(EACH) alone"

test-all: EACH =
test-all: test

wheel: $(INSTALLED)
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@ls build/dist/*

# Nothing of this checkout is in reach there: the package finds its recipes, its page and its kernels in the wheel.
try-wheel: wheel
	rm -rf build/try
	$(PYTHON) -m venv build/try/venv
	build/try/venv/bin/pip install --quiet --constraint constraints.txt torch torchvision
	DS_BUILD_OPS=0 build/try/venv/bin/pip install --quiet --constraint constraints.txt build/dist/*.whl
	cd build/try && venv/bin/bd3-scale quickstart

parity: $(INSTALLED)
	$(BIN)/python -W ignore -m tests.integration.parity

benchmarks: $(INSTALLED)
	$(BIN)/python tools/benchmarks.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
