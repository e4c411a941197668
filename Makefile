# Two commands are all: `make quickstart` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
# Two workers with a thread each: threads that compete for cores are several times slower than one that has its own.
ALONE := OMP_NUM_THREADS=1
PARALLEL := -n 2 --dist worksteal
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint types fast-tests long-tests install clean

quickstart: $(STAMP) ## install, fetch the small model, run the study, say where the report is
	$(BIN)/mech models fetch smollm2-135m-instruct
	$(BIN)/mech run studies/quickstart.yaml --out $(OUT)

test: lint types ## install, lint, import rules, type check, all tests
	-$(BIN)/mech models fetch smollm2-135m-instruct
	@command -v chromium >/dev/null 2>&1 || echo "no chromium here: the tests marked 'browser' will be skipped"
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

fast-tests: $(STAMP) ## without the real model and the slow ones
	$(ALONE) $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real and not browser"

long-tests: $(STAMP) ## the whole plan of the paper's studies on tiny models
	$(BIN)/python -m pytest --long -m long

install: $(STAMP)

# torch comes first and alone: the constraint names one tested version, so no other build is considered.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes in silence, some GB with torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
