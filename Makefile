# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,bench,dev]'
	@touch $@

demo: $(STAMP)  ## train and time mechanisms side by side on real text and images, then write a report
	$(BIN)/attnlib compare --preset demo --out demo-report

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure again what benchmarks/results holds
	$(BIN)/attnlib bench --suite all --out benchmarks/results

clean:
	rm -rf $(VENV) demo-report .pytest_cache .mypy_cache .ruff_cache
