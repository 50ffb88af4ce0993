.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.PHONY: help test test-all demo demo-kernel readme lint format clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 13

# The stamps are as new as the last install, so only a changed pyproject.toml installs again. What tests need includes the demo.
$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

test: $(STAMP) ## Lint, type-check and test
	$(VENV)/bin/python tools/dev/check.py

test-all: $(STAMP) ## The same, with the slow tests
	$(VENV)/bin/python tools/dev/check.py --all

demo: $(DEMO_STAMP) ## Compile a sentence encoder, embed Python's documentation with it, and compare with PyTorch
	$(VENV)/bin/python -m graphwright.tools.demo

demo-kernel: $(DEMO_STAMP) ## Run a Triton kernel on this CPU and compare it with PyTorch
	$(VENV)/bin/python -m graphwright.tools.demo_kernel

readme: $(STAMP) ## Run what README.md shows the output of, and put the new output in
	$(VENV)/bin/python tools/dev/readme.py

lint: $(STAMP) ## Lint and type-check
	$(VENV)/bin/python tools/dev/check.py --lint

format: $(STAMP) ## Format the sources and apply safe lint fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find compiler ir passes codegen runtime tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
