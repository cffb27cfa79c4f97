# Every command of the project; `make help` lists them. A fresh machine needs Python 3.11 or newer and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Packages are installed without bytecode; whatever the environment says, the first run of a module writes it.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
CASCADE ?= $(BIN)/cascade

# An option only for what was given on make's own command line, so that CASCADE_HOST and CASCADE_PORT count otherwise.
given = $(if $(filter command,$(origin $(1))),$(2) '$($(1))')

# Two stamps, because a server needs fewer packages than the tests. Both are renewed when a requirement changes.
SERVER_READY := $(VENV)/.server-ready
TESTS_READY := $(VENV)/.tests-ready

.PHONY: help serve test test-quick quick-dispatcher quick-jobs test-slow test-gpu check format lint types imports deployment chaos bench bench-serve bench-gpu train evaluate gallery install constraints clean

help:  ## List the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options of what a command runs go into ARGS: make evaluate ARGS='--prompts 50'"

serve: $(SERVER_READY)  ## Install what is missing and serve on 127.0.0.1:8000 (HOST=, PORT= change it)
	@exec $(CASCADE) serve $(call given,HOST,--host) $(call given,PORT,--port)

test: $(TESTS_READY)  ## Install what is missing and run the fast tests
	$(BIN)/pytest $(ARGS)

DISPATCHER_TESTS := tests/app/jobs/dispatcher tests/app/jobs/test_supervisor.py
SCHEDULER_TESTS := $(addprefix tests/app/engine/test_,caps.py cost.py fairness.py scheduler.py)

# In two processes, but in one when ARGS chooses among the tests. Make 3.81 cannot keep what they print apart.
test-quick: $(TESTS_READY)  ## Run the tests of scheduler and jobs, which need neither torch nor PostgreSQL: seconds
ifdef ARGS
	$(BIN)/pytest -q tests/app/jobs $(SCHEDULER_TESTS) -k "not postgresql" $(ARGS)
else
	@$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) --no-print-directory quick-dispatcher quick-jobs
endif

quick-dispatcher:
	$(BIN)/pytest -q $(DISPATCHER_TESTS)

quick-jobs:
	$(BIN)/pytest -q tests/app/jobs $(addprefix --ignore=,$(DISPATCHER_TESTS)) $(SCHEDULER_TESTS) -k "not postgresql"

test-slow: $(TESTS_READY)  ## Run the tests that take longer than a few seconds
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: $(TESTS_READY)  ## Run the parity tests at published size on a CUDA device
	$(BIN)/pytest -m gpu $(ARGS)

check: format lint types imports deployment test  ## Format, lint, type check, check imports and deployment, run the fast tests

format: $(TESTS_READY)  ## Format the code
	$(BIN)/ruff format .

lint: $(TESTS_READY)  ## Check formatting and lint, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(TESTS_READY)  ## Type check strictly
	$(BIN)/mypy

imports: $(TESTS_READY)  ## Check which module may import which
	$(BIN)/pytest -q tests/test_architecture.py

deployment: $(TESTS_READY)  ## Check Dockerfile, compose file, manifests, unit and rules
	.ci/check-deployment

chaos: $(TESTS_READY)  ## Kill the server and its engines in every way under load (QUICK=1: three minutes)
	$(BIN)/python -m tests.chaos.run $(ARGS)

bench: $(TESTS_READY)  ## Compare time and memory with diffusers on the same weights, noise and steps
	$(BIN)/python -m tests.benchmarks.run $(ARGS)

bench-serve: $(TESTS_READY)  ## Put our server and a plain FastAPI and diffusers server under the same load
	$(BIN)/python -m tests.benchmarks.serve.run $(ARGS)

bench-gpu: $(TESTS_READY)  ## Time the networks at published size on a CUDA device
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)

train: $(TESTS_READY)  ## Train the embedded checkpoint anew in runs/tiny (core hours; resumes after an interruption)
	$(CASCADE) train tiny $(ARGS)

evaluate: $(SERVER_READY)  ## Score the embedded checkpoint on prompts that it never saw, in its own and in free wordings
	$(CASCADE) evaluate --model tiny --prompts 300 $(ARGS)

gallery: $(SERVER_READY)  ## Draw a sheet of every task with the embedded checkpoint into docs/
	$(BIN)/python -m cascade.evaluation.gallery $(ARGS)

install: $(TESTS_READY)  ## Create .venv with everything that development needs

constraints: $(TESTS_READY)  ## Write the versions that are installed now into constraints.txt
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' | grep -viE '^(nvidia|cuda|triton)' > constraints.txt

clean:  ## Delete the environment, caches and build output (never data/ or runs/)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find app cascade tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=$$(.ci/find-python) && echo "Creating $(VENV) with $$($$python --version)" && $$python -m venv $(VENV)

$(SERVER_READY): pyproject.toml constraints.txt | $(BIN)/python
	@.ci/install $(VENV) .
	@touch $@

$(TESTS_READY): pyproject.toml constraints.txt | $(BIN)/python
	@.ci/install $(VENV) '.[dev]'
	@touch $(SERVER_READY) $@
