# `make demo` and `make test` set up everything they need; both start from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test style quality clean

help: ## show what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up .venv with pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## convert a tiny checkpoint, then generate, edit and ask with it
	$(BIN)/python demo.py

test: $(INSTALLED) quality ## lint and run all tests
	$(BIN)/python -m pytest --numprocesses 2

style: $(INSTALLED) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED) ## what CI checks besides tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove everything that make created
	rm -rf $(VENV) demo
