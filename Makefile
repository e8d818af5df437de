# make demo | test | check | soak: each sets up .venv first, in a fresh clone with nothing installed by hand.
#   make test ARGS="tests/test_layout.py -k bare"      any argument of pytest
#   make demo SEED=3
#   make soak SEED=3                                   other kills, flips and power cuts; the table goes to soak.md
#   make test PYTHON=python3.12                        which Python the environment is made of, the first time
#   make test WORKERS=8                                processes that share the tests
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check soak install lint types clean

install: $(VENV)/.installed

# torch goes first: with it in place nothing that follows can pull another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/memdb demo $(if $(SEED),--seed $(SEED))

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# One after the other also under make -j: the quick checks come first.
check: install
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the package as it installs (ingest, query and schemas inside memdb), from a folder elsewhere.
types: install
	$(BIN)/python -m tools.check_types

# The campaigns and their table, then the tests that take long. One after the other also where the first fails.
soak: install
	$(BIN)/python -m tools.soak $(if $(SEED),--seed $(SEED)) $(SOAK) --out soak.md; campaigns=$$?; \
	MEMDB_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -n $(WORKERS) --dist load \
		-o addopts='-q --strict-markers' -m soak $(ARGS) && exit $$campaigns

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
