# Two commands set up everything on a machine with Python 3.11 or later: `make demo` and `make test`.
# An active virtual environment is used; without one, .venv is made here. Only pip reaches the network, at its configured index.

PYTHON ?= python3
EXTRAS ?= dev
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(ENV)/bin
# The stamp lives in the environment, and its name is the key: another checkout, set of extras or list of versions sets up anew.
KEY := $(shell { cat pyproject.toml constraints.txt; echo "$(CURDIR) $(EXTRAS)"; } | cksum | cut -d' ' -f1)
STAMP := $(ENV)/.linearize-setup-$(KEY)

# The root holds a folder `kernels`, which is also the name of a third-party package: keep it off sys.path.
export PYTHONSAFEPATH := 1

.PHONY: help setup demo test test-oldest lint typecheck bench gpu bless docs clean

help:  ## List the targets
	@echo "linearize: make TARGET [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Environment: $(ENV)"

setup:  ## Make the environment if none is active and install the project in it, once (EXTRAS=dev,gpu adds triton)
	@[ ! -f "$(STAMP)" ] || exit 0; \
	fail() { echo "setup: $$1" >&2; exit 1; }; \
	works() { "$(BIN)/python" -m pip --version >/dev/null 2>&1; }; \
	if [ -n "$(VIRTUAL_ENV)" ]; then \
	    works || fail "the active environment $(ENV) has no pip; add it (python -m ensurepip) or deactivate it"; \
	elif ! works; then \
	    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	        || fail "$(PYTHON) is missing or older than 3.11; name another one: make PYTHON=..."; \
	    "$(PYTHON)" -m venv --clear "$(ENV)"; \
	fi; \
	"$(BIN)/python" tools/setup_environment.py "$(EXTRAS)"; \
	touch "$(STAMP)"

demo: setup  ## Compile the embedded model and compare it with its source, under three minutes (DEMO_ARGS=...)
	@"$(BIN)/linearize" demo $(DEMO_ARGS)

test: setup  ## Run the whole suite (PYTEST_ARGS="-k name", WORKERS=0 for one process)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} "$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-oldest:  ## Run the suite with the oldest torch and transformers that are supported, in their own environment
	"$(PYTHON)" tools/test_versions.py $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

lint: setup  ## Check style and imports with ruff
	"$(BIN)/ruff" check .

# mypy reads files, not installs: give it the tree as it is installed, in links, and report the paths as they are on disk.
typecheck: setup  ## Check types with mypy over the four packages, as they are installed
	@rm -rf .mypy_tree; mkdir -p .mypy_tree/linearize; \
	for entry in linearize/* passes kernels export; do [ ! -e "$$entry" ] || ln -s "../../$$entry" .mypy_tree/linearize/; done; \
	cd .mypy_tree; \
	"$(BIN)/python" -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p linearize \
	    | sed -E 's#^linearize/(passes|kernels|export)/#\1/#'

bench: setup  ## Run every benchmark in benchmarks/ and print its table (BENCH_ARGS=...)
	@shopt -s nullglob; files=(benchmarks/bench_*.py); \
	[ $${#files[@]} -gt 0 ] || { echo "bench: no benchmarks/bench_*.py" >&2; exit 1; }; \
	for file in "$${files[@]}"; do echo "== $$file"; PYTHONSAFEPATH= "$(BIN)/python" "$$file" $(BENCH_ARGS); done

gpu: setup  ## On a machine with a GPU: test its kernels, then measure them (BENCH_ARGS=--quick)
	LINEARIZE_GPU=1 "$(BIN)/python" -m pytest -q tests/gpu $(PYTEST_ARGS)
	"$(BIN)/python" benchmarks/bench_kernels_gpu.py --json docs/kernels_gpu.json $(BENCH_ARGS)

bless: setup  ## Rewrite the golden files in tests/golden from what the code does now; review the diff
	"$(BIN)/python" -m pytest --bless -q $(PYTEST_ARGS)
	@git diff --stat -- tests/golden

docs: setup  ## Run the examples of README.md and docs/ and check the commands that they name
	"$(BIN)/python" -m pytest tests/test_docs.py $(PYTEST_ARGS)

clean:  ## Remove caches, builds and .venv; an active environment of your own stays
	rm -rf .venv build dist *.egg-info .mypy_tree .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
