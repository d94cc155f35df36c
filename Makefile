# `make demo` and `make test` set themselves up; `make help` lists what else there is.
SHELL := /bin/bash
PYTHON ?= python3
PIPELINE ?= recipes/demo
BUNDLE ?= runs/demo/export
ARGS ?=
VENV := .venv
IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip --disable-pip-version-check install -c constraints.txt
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit test-gpu test-engines chat serve clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(STAMP) ## conversations to a served character model; runs/demo/, about 10 minutes on 2 cores
	$(IN_VENV) -m recipes.pipeline $(PIPELINE) $(ARGS)

test: $(STAMP) ## ruff, mypy, pytest
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line lint types unit

lint: $(STAMP)
	$(IN_VENV) -m ruff check .

types: $(STAMP)
	$(IN_VENV) -m mypy

unit: $(STAMP)
	$(IN_VENV) -m pytest -n auto --dist worksteal

test-gpu: $(STAMP) ## the tests that use a GPU; writes tests/gpu_record.json with card and versions
	$(IN_VENV) tests/gpu.py

test-engines: $(BUNDLE)/manifest.json $(STAMP) ## the bundle in vLLM (its own venv): the same greedy tokens as ours
	BASE_PYTHON=$(PYTHON) bash tests/engines/run.sh $(BUNDLE) $(dir $(BUNDLE))data/dialogues/heldout.jsonl

chat: $(BUNDLE)/manifest.json $(STAMP) ## talk to the demo's character in the terminal
	$(IN_VENV) -m serving_export.chat $(BUNDLE)

serve: $(BUNDLE)/manifest.json $(STAMP) ## an OpenAI-compatible server and a chat page
	$(IN_VENV) -m serving_export.server $(BUNDLE)

clean: ## remove the virtual environments and caches; runs/ stays
	rm -rf $(VENV) .venv-engines .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BUNDLE)/manifest.json:
	@echo "there is no bundle at $(BUNDLE); make demo makes one (or name yours: make chat BUNDLE=runs/x/export)" >&2
	@exit 1

# DeepSpeed is built from source against the installed torch, so torch comes first and the build is not isolated.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; found: $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja numpy
	$(PIP) --no-build-isolation -e ".[demo,dev]"
	@touch $(STAMP)
