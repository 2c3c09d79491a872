# Everything that is run by hand or by the checks. Each target works as the only command on a fresh clone.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
BENCH_DIR := build/bench

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-faults lint proto bench replay clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY) ## Make .venv with everything that the other targets need (PYTHON=python3.12 picks another)
	@:

# The stamp is newer than both lists only after an installation that went through to the end.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvtier needs Python 3.11 or newer; name one: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	@echo "venv: installing into .venv (about a minute; more when torch is to be downloaded)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		--constraint constraints.txt --editable '.[server,demo,test]'
	@touch $@
	@echo "venv: ready"

demo: $(READY) ## Start a daemon and a reference engine, show hits against recomputing, clean up
	@$(BIN)/kvtier demo

serve: $(READY) ## Run the daemon in the foreground with its defaults
	@$(BIN)/kvtier serve

test: $(READY) ## Run the tests, without faults and slow ones (under 5 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not faults and not slow"

# One worker: a test that kills, fills or corrupts something has the machine for itself.
test-faults: $(READY) ## Run the tests that kill, fill, corrupt or cut something real
	@$(BIN)/python -m pytest -q -m "faults and not slow"

# All of it even after a failure, so that one run names everything.
lint: $(READY) ## Check style, format, types, the import rule and the protocol's style
	@status=0; \
	$(BIN)/ruff check --quiet || status=1; \
	$(BIN)/ruff format --check || { echo "lint: to format: $(BIN)/ruff format" >&2; status=1; }; \
	$(BIN)/mypy || status=1; \
	$(BIN)/python tests/lint/check_imports.py || status=1; \
	$(BIN)/buf lint proto || status=1; \
	exit $$status

proto: $(READY) ## Regenerate the Python code of proto/kvtier/v1/*.proto
	@$(BIN)/python proto/generate.py

bench: $(READY) ## Run every benchmark: a table each, and JSON below build/bench
	@mkdir -p $(BENCH_DIR)
	@set -e; for bench in tests/benchmarks/bench_*.py; do \
		name=$$(basename $$bench .py); \
		PYTHONPATH=. $(BIN)/python -m tests.benchmarks.$$name --json $(BENCH_DIR)/$$name.json; \
		echo; \
	done

replay: $(READY) ## Replay a trace of requests against a daemon and compare the policies
	@PYTHONPATH=. $(BIN)/python -m tests.benchmarks.replay

clean: ## Remove caches and build results (.venv stays)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find proto ops server client tests -name __pycache__ -type d -prune -exec rm -rf {} +
