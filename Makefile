# Everything runs in .venv, made from the pinned versions of constraints.txt: `make` alone lists the targets.
SHELL  := bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
STAMP  := $(VENV)/.installed

PROFILE ?= small
BASELINES ?= plain
SEED    ?=
ARGS    ?=
WORKERS ?= 2
EXTRA   := $(if $(filter all,$(BASELINES)),$(VENV)/.baselines)

export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export MPLBACKEND := Agg
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help env models lint shape test test-nbs test-clean test-py reproduce names smoke bench reliability docs readme lock clean

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## Make the environment (.venv), when it is missing or out of date

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(VENV) has %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@# notebooks are merged cell by cell, in this clone (.gitattributes names the driver)
	@if git rev-parse --git-dir >/dev/null 2>&1; then git config merge.nbdev-merge.name 'cells of notebooks' && git config merge.nbdev-merge.driver '$(BIN)/nbdev_merge %O %A %B %P'; fi
	@touch $@

$(VENV)/.baselines: $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,baselines]'
	@touch $@

test: lint test-clean test-nbs test-py ## Export and clean checks, every notebook's checks, then pytest

lint: env ## ruff: line length, unused names, order of imports
	ruff check .

shape: env ## The shape of the code, and whether its limits hold
	$(BIN)/python .ci/shape.py --walk --check

test-clean: env ## The library and the notebooks are what nbdev_export, nbdev_clean and `make readme` leave
	$(BIN)/python .ci/clean.py

test-nbs: env ## The checks inside the notebooks
	OMP_NUM_THREADS=1 nbdev_test --n_workers $(WORKERS) --timing

test-py: env ## pytest
	$(BIN)/python -m pytest tests -q

reproduce: env $(EXTRA) ## Every table and figure from real counts: PROFILE=small|evidence|full|smoke BASELINES=plain|all SEED=0 ARGS="..."
	mgf_reproduce --profile $(PROFILE) --baselines $(BASELINES) $(if $(SEED),--seed $(SEED)) $(ARGS)
	@$(MAKE) --no-print-directory readme

MODELS_FROM ?=
models: env ## Make the shipped models again, resumable: MODELS_FROM=folder of .h5ad for cells that no name fetches
	mgf_models --out build/models $(if $(MODELS_FROM),--folder $(MODELS_FROM)) $(ARGS)

names: env ## Make the tables of earlier names of genes again, from HGNC and MGI
	$(BIN)/python .ci/earlier.py

smoke: env ## The same notebooks at their smallest, into build/smoke: minutes, and numbers that mean nothing
	mgf_reproduce --profile smoke --out build/smoke --overwrite

bench: env ## Every stage beside the published way to the same result, and how each grows: bench/results, figures/scaling.png; ARGS="--only NAME"
	$(BIN)/python bench/run.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python bench/scaling.py)
	$(if $(ARGS),,$(BIN)/python bench/memory.py)

STRIKES ?= 50
reliability: env ## Strike every command by every fault, STRIKES=50 times each, and write what happened: tables/reliability (hours)
	RELIABILITY=1 STRIKES=$(STRIKES) $(BIN)/python -m pytest -q -m 'slow or not slow' tests/test_interruptions.py tests/test_security.py tests/cells/test_foreign.py

docs: env ## The site, into _docs, with every local link checked
	$(BIN)/python .ci/docs.py

PAGES := nbs/index.ipynb nbs/results.ipynb nbs/reliability.ipynb nbs/paper_vs_code.ipynb nbs/guides/read_a_perturbation.ipynb

readme: env ## Show tables/ and figures/ as they are now in the pages and in README.md
	jupyter execute --inplace $(PAGES)
	for p in $(PAGES); do nbdev_clean --fname $$p; done
	$(BIN)/python .ci/readme.py

lock: env $(VENV)/.baselines ## constraints.txt from the environment as it is, with the extra
	@{ sed -n 1p constraints.txt; pip freeze --all --exclude-editable | grep -v '^pip==' | sed -E 's/\+cpu$$//'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## Remove what the other targets made, but for .venv
	rm -rf build _docs _proc *.egg-info .pytest_cache .hypothesis
