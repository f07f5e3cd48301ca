# make compare    trains RWKV-4, RWKV-7 and two transformers on Python's own source files, and prints a table
# make reproduce  the paper's experiments at the size of a CPU, under two hours; resumes after an interruption
# make test       the fast tests;  make test-slow the others;  make test-all both
# make lint       ruff, as CI runs it

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN = $(VENV)/bin/python

DURATION ?= 6
SEED ?= 0
TEXT ?= stdlib
WORKERS ?= --numprocesses=logical --maxprocesses=8 --dist=loadfile  # pytest-xdist; a file's tests share programs

.PHONY: compare reproduce sweep speed precision test test-slow test-all lint

compare: $(VENV)/runtime
	$(RUN) -m experiments.compare.run --duration="$(DURATION)" --seed="$(SEED)" --text="$(TEXT)"
	$(RUN) -m experiments.ledger

reproduce: $(VENV)/runtime
	$(RUN) -m experiments.ledger --run

sweep: $(VENV)/runtime
	$(RUN) -m experiments.compare.run --sweep

speed: $(VENV)/live
	$(RUN) -m experiments.speed.run
	$(RUN) -m experiments.speed.plot
	$(RUN) -m experiments.ledger

precision: $(VENV)/live
	$(RUN) -m experiments.precision.run
	$(RUN) -m experiments.ledger

test: $(VENV)/dev
	$(RUN) -m pytest $(WORKERS)

test-all: test test-slow

test-slow: $(VENV)/live $(VENV)/tpu
	library=$(abspath $(VENV))/tpu/libtpu/libtpu.so; test ! -f $$library || export TPU_LIBRARY_PATH=$$library; \
	$(RUN) -m pytest -m "slow or live" $(WORKERS)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/tpu: requirements-tpu.txt | $(VENV)/live
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r $< || mkdir -p $@
	@touch $@

$(VENV)/runtime: requirements.txt
$(VENV)/dev: requirements.txt requirements-dev.txt
$(VENV)/live: requirements.txt requirements-dev.txt requirements-live.txt
$(VENV)/runtime: REQUIREMENTS = requirements.txt
$(VENV)/dev: REQUIREMENTS = requirements-dev.txt
$(VENV)/live: REQUIREMENTS = requirements-live.txt
$(VENV)/runtime $(VENV)/dev $(VENV)/live:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; set PYTHON=" >&2; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@
