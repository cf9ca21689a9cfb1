# Everything runs in .venv, which is made from packaging/requirements-dev.lock at the first use.
# Needs Python 3.11 or newer with venv and pip; PYTHON=... chooses one.

PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
CYCLES ?= 10
DIST ?= dist
LOCK_FLAGS ?=

LOCK := packaging/requirements.lock
DEV_LOCK := packaging/requirements-dev.lock
STAMP := .venv/.installed
VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip --quiet --disable-pip-version-check --no-input
COMPILE := CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/pip-compile --quiet --generate-hashes \
	--strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host $(LOCK_FLAGS)

# What the caller's shell sets for other programs must not change what happens here.
unexport $(filter HOSTPROBE_%,$(.VARIABLES)) PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-engines test-deb bench-peers lint wheel deb lock clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' $(firstword $(MAKEFILE_LIST))

# Only frames go to stdout (from elsewhere: `make -s -C DIR run`, for make itself would write there). The shell waits for the agent's own end at Ctrl-C.
run: $(STAMP) ## run the agent on this host: ten lines, one a second (CYCLES=0: until Ctrl-C)
	@trap : INT; $(VENV_PYTHON) -m agent run --template standard --interval 1s --cycles $(CYCLES) || exit $$?; \
	printf '%s\n' '' \
		'hostprobe: that was this host, one JSON line a second.' \
		'  make run CYCLES=0                   runs until Ctrl-C' \
		'  pip install . && hostprobe run      in an environment of your own: a line every ten seconds' \
		'  README.md and docs/                 configuration, sinks, and what every column means' >&2

test: $(STAMP) ## run the tests (ARGS="-k name" goes to pytest)
	@$(VENV_PYTHON) -m pytest $(ARGS)

# The installer looks each time, and does nothing where all is there.
test-engines: $(STAMP) ## test against real Prometheus, NATS, Kafka and others, installed in build/engines (ARGS as above)
	@tests/engines/install
	@$(VENV_PYTHON) -m pytest tests/engines $(ARGS)

test-deb: $(STAMP) ## test the Debian package on a clean Debian (root; installs lintian and debootstrap; ARGS as above)
	@tests/deb/install
	@$(VENV_PYTHON) -m pytest tests/deb $(ARGS)

bench-peers: $(STAMP) ## measure beside node_exporter, collectd, psutil and Glances, into docs/performance.md (ARGS=--short: a try)
	@tests/engines/install
	@tests/bench/install
	@$(VENV_PYTHON) tests/bench/all.py $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy --strict

# setuptools would pack what an earlier build has left in build/.
wheel: $(STAMP) ## build the wheel into dist/ (DIST=dir: elsewhere)
	@rm -rf build/lib build/bdist.*
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir "$(DIST)" . >&2
	@rm -rf build/lib build/bdist.*; rmdir build 2>/dev/null || true
	@ls "$(DIST)"/hostprobe-*.whl

deb: $(STAMP) ## build the Debian package into dist/ (DIST=dir: elsewhere)
	@packaging/deb/build "$(DIST)"

lock: ## write packaging/*.lock anew from pyproject.toml (LOCK_FLAGS=--upgrade: newest versions)
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip --quiet --disable-pip-version-check install pip-tools
	@build/lock/bin/python -c 'import tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
		print(*t["build-system"]["requires"], *t["dependency-groups"]["dev"], sep="\n")' > build/dev.in
	@$(COMPILE) --output-file $(LOCK) pyproject.toml
	@$(COMPILE) --allow-unsafe --constraint $(LOCK) --output-file $(DEV_LOCK) pyproject.toml build/dev.in

clean: ## remove everything that was made here, .venv too
	@rm -rf .venv build $(DIST) hostprobe.egg-info .coverage \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find agent probes templates tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): $(DEV_LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "hostprobe: needs Python 3.11 or newer with venv (Debian: python3-venv); found: $$($(PYTHON) --version 2>&1 | tail -1)" >&2; \
		exit 1; }
	@echo "hostprobe: making .venv from $(DEV_LOCK)" >&2
	@$(PYTHON) -m venv .venv >&2
	@$(PIP) install --require-hashes --requirement $(DEV_LOCK) >&2
	@$(PIP) install --no-deps --no-build-isolation --editable . >&2
	@touch $@
