# `make` prints what there is. Every target works alone on a fresh clone: it makes .venv, builds what
# is out of date and then does its work; a stamp keeps the second run quick.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CACHE := .cache
SOURCES := $(wildcard fastmesh/_ext/*.pyx fastmesh/_ext/*.pxd fastmesh/_ext/*.h tests/toy/*.pyx tests/toy/*.pxd)

T ?=
P ?= bolt
S ?= 60
SEED ?=
ROUNDS ?= 5
ONLY ?=

export FASTMESH_TESTS := 1

# The checkout, as seen from the environment inside it: `$(PY) examples/...` finds the package from
# whatever folder it is called.
define FOUND_FROM_ANYWHERE
import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "fastmesh-checkout.pth").write_text("../../../..\n")
endef
export FOUND_FROM_ANYWHERE

.PHONY: help
help: ## print this
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

$(VENV)/.installed: requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(CACHE)/built: $(VENV)/.installed setup.py $(SOURCES)
	@mkdir -p $(CACHE)
	$(PY) setup.py -q build_ext --inplace $(if $(filter setup.py,$?),--force)
	@echo "$$FOUND_FROM_ANYWHERE" | $(PY) -
	@touch $@

.PHONY: build
build: $(CACHE)/built ## compile the fast path in place

.PHONY: demo
demo: build ## a broker, two nodes, a weight that moves half-way, a live table, the ledger
	$(PY) -m fastmesh demo

.PHONY: test
test: build ## everything that needs no foreign program (T=tests/file.py::name for one)
	$(PY) -m pytest --timeout=120 $(if $(T),-v $(T),-m "not chaos and not interop" --ignore=tests/packaging)

.PHONY: lint
lint: build ## format, ruff, mypy --strict, cython-lint, import directions
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint fastmesh tests
	$(PY) -m pytest tests/test_tidy.py

.PHONY: packaging
packaging: build ## sdist and wheel, each built and installed into a clean environment
	$(PY) -m pytest tests/packaging

.PHONY: interop
interop: build ## peers that others wrote, unmodified, through one fastmesh
	$(PY) -m tests.interop.setup
	$(PY) -m pytest tests/interop -m interop

.PHONY: chaos
chaos: build ## the fault matrix on real processes and sockets (T= for one)
	$(PY) -m pytest -m "chaos and not full" --timeout=120 --durations=10 $(if $(T),-v $(T),tests/chaos)

.PHONY: chaos-full
chaos-full: build ## the same, and what takes minutes: every cell of the kill table, fifty upgrades (T= for one)
	$(PY) -m pytest -m chaos --timeout=600 --durations=20 $(if $(T),-v $(T),tests/chaos)

.PHONY: sim
sim: build ## seeded runs of the oracle and the state machines (SEED=n repeats one)
	$(if $(SEED),SEED=$(SEED)) $(PY) -m pytest -s tests/sim

.PHONY: bench
bench: build ## every contender side by side (ROUNDS=5 ONLY=c64)
	-$(PY) -m perf.setup
	$(PY) -m perf.run --rounds $(ROUNDS) $(if $(ONLY),--only $(ONLY))
	$(if $(ONLY),,$(PY) -m perf.deliver --rounds $(ROUNDS))
	$(if $(ONLY),,$(PY) -m perf.upgrade)

.PHONY: perf-gate
perf-gate: build ## the figures that must not get worse
	$(PY) -m perf.setup haproxy valgrind
	$(PY) -m perf.gate

.PHONY: asan
asan: $(VENV)/.installed ## codec, buffer and slot tests under the address and undefined-behaviour sanitizers
	.ci/asan

.PHONY: fuzz
fuzz: build ## attack one parser for S seconds (P=bolt S=60)
	$(PY) -m tests.fuzz.fuzz_$(P) --seconds $(S)

.PHONY: clean
clean: ## remove what was built (the environment stays; remove .venv for a fresh one)
	rm -rf build dist *.egg-info $(CACHE)/built .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -f fastmesh/_ext/*.so fastmesh/_ext/*.c fastmesh/_ext/*.html tests/toy/*.so tests/toy/*.c
	find . -name __pycache__ -not -path './.venv/*' -not -path './.cache/*' -prune -exec rm -rf {} +
