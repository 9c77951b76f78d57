# make demo       everything from no data to generated pictures, in .venv and ./lathe-demo
# make install    the environment in .venv alone
# make check      format, lint, types, architecture
# make test-fast  tests that need no server and no process of their own, in two processes, under 3 minutes; ARGS="-n 0" for one
# make test       check and all tests, the smoke demo among them; those with servers or ranks one at a time
# make programs   what some of them talk to, from apt: Prometheus and its servers, SLURM, a browser; part of make test
# make test-long  heavier proofs

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
ARGS ?=
ALONE := s3 or ranks or demo or tools or alone or prometheus or browser or slurm
FAST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not ($(ALONE)) and not long"

.PHONY: demo install develop programs check format test-fast test test-long clean

demo: install
	@$(BIN)/lathe demo $(ARGS)

install:
	@$(PYTHON) infra/install.py demo

develop:
	@$(PYTHON) infra/install.py demo dev

programs:
	@$(PYTHON) infra/system_packages.py

check: develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck launchers/*.sh .ci/run
	$(BIN)/shfmt -d -i 2 -ci launchers/*.sh .ci/run
	$(BIN)/yamllint -s infra configs launchers .yamllint
	$(BIN)/pytest -q tests/test_architecture.py

format: develop
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-fast: develop
	$(FAST) $(ARGS)

test: check programs
	@failed=0; \
	$(FAST) $(ARGS) || failed=1; \
	$(BIN)/pytest -m "($(ALONE)) and not long" $(ARGS) || failed=1; \
	exit $$failed

test-long: develop programs
	$(BIN)/pytest -m long $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
