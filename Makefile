SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.NOTPARALLEL:
.PHONY: help setup fetch-demo demo serve test format lint types imports unit slow wheel proto reference clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup:
	@scripts/setup.sh

fetch-demo: setup ## Fetch and convert the demo's base model into the user's cache (once)
	@$(BIN)/meteora fetch-demo

demo: fetch-demo ## Serve eight experts from two ranks and ask them over HTTP and gRPC
	@$(BIN)/meteora demo

serve: fetch-demo ## Serve the demo bank and stay up: HTTP on 8000, gRPC on 9000
	@$(BIN)/meteora serve --config serve_config.yaml

test: lint types imports unit wheel ## Run everything CI runs
	@echo "all checks passed"

lint: setup ## Check format and style (make format repairs)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup ## Format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: setup ## Check the types
	$(BIN)/mypy --strict

imports: setup ## Check who may import whom
	$(BIN)/lint-imports --no-logo

unit: fetch-demo ## Run the tests, except the slow ones
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not slow"

slow: fetch-demo ## Run the slow tests, one after the other
	$(BIN)/pytest -m slow

wheel: setup ## Build the wheel and use it in a fresh environment
	scripts/check_wheel.sh

proto: setup ## Regenerate the gRPC stubs from the proto
	$(BIN)/python -m meteora_dist.serving.proto.generate

reference: setup ## Regenerate docs/api.md from the schemas and the proto
	$(BIN)/python -m meteora_dist.serving.reference docs/api.md

clean: ## Remove caches and build results; .venv and the fetched model stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +
