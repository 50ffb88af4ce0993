.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: help test test-all demo lint format clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# The stamp is as new as the last install, so only a changed pyproject.toml installs again.
$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: $(STAMP) ## Lint, type-check and test
	$(VENV)/bin/python tools/dev/check.py

test-all: $(STAMP) ## The same, with the slow tests
	$(VENV)/bin/python tools/dev/check.py --all

demo: $(STAMP) ## Run a flash-attention kernel on this CPU and compare it with PyTorch
	$(VENV)/bin/python -m graphwright.tools.demo

lint: $(STAMP) ## Lint and type-check
	$(VENV)/bin/python tools/dev/check.py --lint

format: $(STAMP) ## Format the sources and apply safe lint fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find compiler ir passes codegen runtime tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
