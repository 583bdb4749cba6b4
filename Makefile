PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NPM    := tests/clients/npm
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test check format torture bench lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PERPETUO needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.txt
	@touch $@

$(BIN)/.dev: requirements-dev.txt $(BIN)/.run
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.txt
	@touch $@

# Not pip's to bring: where it fails, or is not wanted, the tests that need it say so.
$(NPM)/node_modules/.package-lock.json: $(NPM)/package-lock.json
	-$(if $(findstring npm,$(PERPETUO_TEST_WITHOUT)),,cd $(NPM) && npm ci --ignore-scripts --no-audit --no-fund)

run: $(BIN)/.run ## install what is needed, migrate, serve
	$(BIN)/flask --app wsgi db upgrade
	exec $(BIN)/gunicorn wsgi:app

test: $(BIN)/.dev $(NPM)/node_modules/.package-lock.json ## the whole suite, on SQLite and on PostgreSQL
	$(BIN)/python -m pytest $(ARGS)

check: $(BIN)/.dev ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(BIN)/.dev ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

torture: $(BIN)/.dev ## long runs: ten and more seeds of the kill tests on both databases
	$(BIN)/python -m pytest -m torture --timeout=3600 $(ARGS)

bench: $(BIN)/.dev ## what a call costs, beside nginx and BASE=<commit>; ARGS=--quick for a minute's run
	$(BIN)/python -m bench $(if $(BASE),--base $(BASE)) $(ARGS)

lock: $(BIN)/.dev ## pin what requirements*.in ask for, and all that it pulls in, by hash
	$(BIN)/pip install --quiet uv
	for name in requirements requirements-dev; do \
	  $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --no-emit-index-url --output-file $$name.txt $$name.in; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(NPM)/node_modules .pytest_cache .mypy_cache .ruff_cache
