# infl_cache: everything runs from here. `make` alone prints what there is.
# With no TASK the stages run the built-in demo (scikit-learn's handwritten digits).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TASK ?= scripts/digits.py:digits
RUN ?= runs/digits
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help grads stest influence self-influence status report validate export test faults check bench clean

help: ## print this
	@echo "usage: make TARGET [TASK=file.py:function] [RUN=folder] [ARGS='--damping 0.1 ...']"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "With no TASK: the built-in demo. 'make influence' alone sets everything up and shows its rankings."

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or later, found " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

grads: $(STAMP) ## stage 1: the gradient of every training sample into RUN/grad_z.zarr
	$(BIN)/infl-cache grads --task $(TASK) --run $(RUN) $(ARGS)

stest: $(STAMP) ## stage 2: s_test of every test sample into RUN/s_test.zarr
	$(BIN)/infl-cache stest --task $(TASK) --run $(RUN) $(ARGS)

influence: $(STAMP) ## all that is missing of stages 1 and 2, then stage 3 and the report
	$(BIN)/infl-cache run --task $(TASK) --run $(RUN) $(ARGS)

self-influence: $(STAMP) ## which training samples are probably mislabelled, after make grads
	$(BIN)/infl-cache self-influence --task $(TASK) --run $(RUN) $(ARGS)

status: $(STAMP) ## what is done, what is left, sizes, rates
	$(BIN)/infl-cache status $(RUN)

report: $(STAMP) ## what the run found: a table, and a page for the browser: ARGS='--tests 0,5,7'
	$(BIN)/infl-cache report $(RUN) --task $(TASK) $(ARGS)

validate: $(STAMP) ## is it true? retrain without chosen samples: ARGS='--kind lds --subsets 20'
	$(BIN)/infl-cache validate --task $(TASK) --run $(RUN) $(ARGS)

export: $(STAMP) ## the finished matrix as json, csv or parquet: ARGS='--format csv --out FILE'
	$(BIN)/infl-cache export $(RUN) $(ARGS)

test: $(STAMP) ## all tests, a part of the files on each core
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

faults: $(STAMP) ## the long versions of the tests of faults, with their seeds, on all cores
	INFL_CACHE_FAULTS=long $(BIN)/python -m pytest tests/faults --numprocesses logical --maxprocesses 8 -rP --durations 5 -o faulthandler_timeout=1800

check: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## the benchmarks, beside plain PyTorch and other libraries: ARGS='--workloads W1,W3'
	$(BIN)/python scripts/bench_grads.py --json bench.jsonl $(ARGS)
	$(BIN)/python scripts/bench_store.py --json bench_store.jsonl
	$(BIN)/python scripts/bench_stest.py --parts products,fisher --json bench_stest.jsonl
	$(BIN)/python scripts/bench_influence.py --workloads W1 --samples 4000 --tests 20 --rounds 2 --rows-bytes 1000000000 --json bench_influence.jsonl
	$(BIN)/python scripts/bench_job.py --only lissa,fisher,ekfac,plain --rounds 1 --json bench_job.jsonl

clean: ## remove the environment and the demo's run, never another RUN
	rm -rf $(VENV) *.egg-info runs/digits
