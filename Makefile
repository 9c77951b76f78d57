# make demo       everything from no data to generated pictures, in .venv and ./lathe-demo
# make install    the environment in .venv alone
# make check      format, lint, types, architecture
# make test-fast  tests that need no server, under 3 minutes
# make test       check and all tests, the smoke demo among them
# make test-long  heavier proofs

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
ARGS ?=

.PHONY: demo install develop check format test-fast test test-long clean

demo: install
	@$(BIN)/lathe demo $(ARGS)

install:
	@$(PYTHON) infra/install.py demo

develop:
	@$(PYTHON) infra/install.py demo dev

check: develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launchers/*.sh .ci/run
	$(BIN)/pytest -q tests/test_architecture.py

format: develop
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-fast: develop
	$(BIN)/pytest -m "not s3 and not ranks and not demo and not tools and not long" $(ARGS)

test: check
	$(BIN)/pytest -m "not long" $(ARGS)

test-long: develop
	$(BIN)/pytest -m long $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
