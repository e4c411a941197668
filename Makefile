# Two commands are all: `make quickstart` and `make test`. Each sets up what it needs. `make help` lists the others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
# Workers with a thread each: threads that compete for cores are several times slower than one that has its own.
WORKERS ?= 2
ALONE := OMP_NUM_THREADS=1
PARALLEL := -n $(WORKERS) --dist worksteal
STAMP := $(VENV)/.installed

.PHONY: help quickstart test lint types fast-tests long-tests install clean

help: ## this list; PYTHON, VENV, OUT and WORKERS may be given: `make test WORKERS=8`
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(STAMP) ## install, fetch the small model, run the study, say where the report is
	$(BIN)/mech models fetch smollm2-135m-instruct
	$(BIN)/mech run studies/quickstart.yaml --out $(OUT)

test: lint types ## install, lint, import rules, type check, all tests
	-$(BIN)/mech models fetch smollm2-135m-instruct
	@command -v chromium >/dev/null 2>&1 || echo "no chromium here: the tests marked 'browser' will be skipped"
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) --durations=15

lint: $(STAMP) ## style and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

fast-tests: $(STAMP) ## without the real model and the slow ones
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real and not browser"

long-tests: $(STAMP) ## the whole plan of the paper's studies on tiny models
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) --long -m long

install: $(STAMP) ## into VENV, with all that the tests need

# torch comes first and alone: the constraint names one tested version, so no other build is considered.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes in silence, some GB with torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean: ## remove VENV and caches; runs/ and fetched models stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
