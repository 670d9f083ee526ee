# `make demo` and `make test` each work as the first command on a fresh Debian or Ubuntu machine with Python 3.11+.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Dagster would write down what `dg` does, and send it.
export DG_CLI_CONFIG := $(CURDIR)/.dg.toml
export DAGSTER_DISABLE_TELEMETRY := 1

PYTHON ?= python3
BIN := .venv/bin
# Installing what is missing takes root; elsewhere sudo asks for it.
APT := $(if $(filter 0,$(shell id -u)),,sudo )env DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: help demo dev check verify backfill test pythons soak bench cluster lint audit hashes screenshots docs clean sandbox postgresql pgbouncer chromium redis

help: ## What there is to make
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 13

demo: sandbox ## Export three days of sample data, and show what landed
	@echo "Exporting $$(cat .sandbox/demo_range) (the log is .sandbox/demo.log) ..."
	@$(BIN)/dg launch --assets events,persons,sessions --partition-range "$$(cat .sandbox/demo_range)" \
		>.sandbox/demo.log 2>&1 || { tail -n 40 .sandbox/demo.log; exit 1; }
	@$(BIN)/python -m pg_exports.sandbox show

dev: sandbox ## The sandbox and Dagster's UI
	@$(BIN)/dg dev

check: .venv/installed ## Whether the connections and tables of the exports are as they should be (EXPORT=events)
	@$(BIN)/python -m pg_exports.check $(EXPORT)

backfill: .venv/installed ## Export a range without the UI (EXPORT=events FROM=2026-11-01 TO=2026-11-20 REPLAY=1)
	@$(BIN)/python -m pg_exports.backfill $(EXPORT) $(FROM) $(TO) $(if $(REPLAY),--replay)

verify: .venv/installed ## Compare ClickHouse, the ledger, the table and Dagster (EXPORT=events FROM=2026-11-01 TO=2026-11-20)
	@$(BIN)/python -m pg_exports.verify $(EXPORT) $(FROM) $(TO)

# Three processes, each with servers of its own: they keep two cores busy throughout. ALL=1, as in CI, adds the slow ones:
# of the bench, the package in another project, and a pod's run; and those that depend on the version of PostgreSQL or
# Python, with others. POSTGRES=17 runs the former with that version alone.
test: lint .venv/cluster-installed postgresql pgbouncer redis chromium ## Every check and test (ALL=1: the slow ones, too; POSTGRES=17)
ifdef POSTGRES
	@$(BIN)/python -m pg_exports_tests.postgres_versions $(POSTGRES)
else
	@$(BIN)/python -m pytest $(if $(ALL),,-m 'not slow') --numprocesses 3 --dist loadscope --no-loadscope-reorder
	@$(if $(ALL),$(BIN)/python -m pg_exports_tests.postgres_versions)
	@$(if $(ALL),$(BIN)/python -m pg_exports_tests.python_versions)
endif

pythons: .venv/installed postgresql ## The demo and a short suite with Python 3.11 to 3.13, those that are here (PYTHONS=3.13)
	@$(BIN)/python -m pg_exports_tests.python_versions $(or $(PYTHONS),3.11 3.12 3.13)

soak: postgresql ## Random faults at random moments (SEED=123 ROUNDS=60)
	@$(BIN)/python -m pg_exports_tests.soak $(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS))

# The pages have the figures of the default sizes alone: WRITE=1 writes those of ONLY.
bench: .venv/bench-installed postgresql redis ## Speed, and what exports cost (EVENTS=1000000 ROUNDS=3 ONLY=peers,streams WRITE=1)
	@$(BIN)/python -m pg_exports_tests.bench $(if $(EVENTS),--events $(EVENTS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write,$(if $(EVENTS)$(ROUNDS)$(ONLY),,--write))

cluster: .venv/cluster-installed postgresql redis ## A backfill over Celery workers that are killed, cut off, added and removed
	@$(BIN)/python -m pg_exports_tests.cluster

lint: .venv/installed ## Format, lint, types, definitions
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
		DAGSTER_HOME="$$folder" PG_EXPORTS_TEAM_ID=1 $(BIN)/dg check defs >"$$folder/log" 2>&1 || { cat "$$folder/log"; exit 1; }

# A look at the history takes a minute, and at vulnerabilities the network: `make test` has the former alone, with ALL=1.
audit: .venv/cluster-installed ## Secrets in files and history, known vulnerabilities of what is installed (OSV=https://...)
	@$(BIN)/python -m pg_exports_tests.audit $(if $(OSV),--osv-url $(OSV))

# With the build backend, so that the project itself is installed without fetching anything (docs/set-up.md).
hashes: .venv/hashes-installed ## deploy/requirements.txt, written anew: what production installs, with sha256 hashes
	@printf 'hatchling\neditables\n' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
		--constraints deploy/constraints.txt --extra celery --extra kubernetes pyproject.toml - \
		--generate-hashes --only-binary :all: --emit-build-options --no-strip-extras --no-annotate \
		--custom-compile-command 'make hashes' --output-file deploy/requirements.txt

screenshots: postgresql chromium ## The pictures of README.md, made anew
	@$(BIN)/python -m pg_exports_tests.ui.screenshots

docs: .venv/installed ## The page of an export's attributes, written anew
	@$(BIN)/python -m pg_exports_tests.attributes_page

clean: ## Stop the sandbox; delete it and everything that was installed here
	@if [ -e .sandbox/sandbox.json ]; then \
		[ -x $(BIN)/python ] || { echo "The sandbox may run, and .venv is gone: \`make sandbox clean\`."; exit 1; }; \
		$(BIN)/python -m pg_exports.sandbox down; fi
	@if [ -e .bench/sandbox.json ]; then \
		[ -x $(BIN)/python ] || { echo "A bench may run, and .venv is gone: \`make sandbox clean\`."; exit 1; }; \
		$(BIN)/python -m pg_exports_tests.bench --stop; fi
	@rm -rf .venv .sandbox .bench .tmp_dagster_home_* .pytest_cache .mypy_cache .ruff_cache

sandbox: .venv/installed postgresql
	@$(BIN)/python -m pg_exports.sandbox up

postgresql: .venv/installed
	@$(BIN)/python -m pg_exports.sandbox check 2>/dev/null \
		|| { command -v apt-get >/dev/null && $(APT) update -qq && $(APT) install -qq -y postgresql >/dev/null; } \
		|| $(BIN)/python -m pg_exports.sandbox check

# Where it cannot be installed, the tests that need it fail and say how.
pgbouncer:
	@PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null || ! command -v apt-get >/dev/null \
		|| { $(APT) update -qq && $(APT) install -qq -y pgbouncer >/dev/null; } || true

# Where they cannot be installed, `make cluster` says what it needs; without iproute2 its workers are plain processes.
redis:
	@{ command -v redis-server && command -v ip; } >/dev/null || ! command -v apt-get >/dev/null \
		|| { $(APT) update -qq && $(APT) install -qq -y redis-server iproute2 >/dev/null; } || true

# Where there is none, the tests of the UI in a browser are skipped.
chromium:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null \
		|| { $(APT) update -qq && $(APT) install -qq -y chromium >/dev/null; } || true

.venv/installed: pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: $$($(PYTHON) --version). Set PYTHON=python3.11, say."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { $(APT) update -qq && $(APT) install -qq -y "python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" >/dev/null; }
	@echo "Installing into .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sandbox,dev]' --constraint deploy/constraints.txt
	@touch $@

.venv/bench-installed: .venv/cluster-installed
	@echo "Installing what is compared into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sandbox,dev,celery,kubernetes,deploy,audit,bench]' --constraint deploy/constraints.txt
	@touch $@

.venv/cluster-installed: .venv/installed
	@echo "Installing what deployments on many hosts have into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sandbox,dev,celery,kubernetes,deploy,audit]' --constraint deploy/constraints.txt
	@touch $@

.venv/hashes-installed: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[sandbox,dev,hashes]' --constraint deploy/constraints.txt
	@touch $@
