# .venv is used if it is there (see README.md), else python3; PYTHON=... overrides.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
MODEL ?= bert-base
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help pretrain test lint format notebook report

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

pretrain:  ## pretrain MODEL (bert-base) on text that is on this machine; more options in ARGS="--steps=300"
	$(PYTHON) -m train.pretrain --model=$(MODEL) $(ARGS)

test:  ## run the tests; options of pytest in ARGS="-k masks"
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest $(ARGS)

lint:  ## check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:  ## correct style and formatting
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

notebook:  ## run the notebooks and write their outputs to .ipynb files
	JAX_PLATFORMS=cpu $(PYTHON) notebooks/build.py

report:  ## bring the tables in README.md and docs up to date with benchmarks/results
	$(PYTHON) -m benchmarks.report
