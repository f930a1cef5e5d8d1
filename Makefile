# `make demo` and `make test` need Python ≥ 3.11, make and git; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export JAX_PLATFORMS ?= cpu
# Huge pages: XLA's buffers come and go with every step, and zeroing them page by page costs a third of it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-fast lint types format parity clean

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
	@touch $@

demo: $(READY)  ## Distil a streaming student of moving digits; FROM_SCRATCH=1 trains its teacher too.
	$(BIN)/crcm demo --workdir=out/demo $(if $(FROM_SCRATCH),--from-scratch)

test: lint types  ## Lint and types, then every test.
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0

test-fast: lint types  ## What to run before each commit: every test that is not slow.
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Types of what is installed.
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(READY)  ## The optional packages that the parity tests compare with (a CPU build of torch first) and libtpu.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[parity,tpu,text]"

clean:
	rm -rf out build *.egg-info
