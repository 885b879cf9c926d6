# `make quickstart` and `make test` on a machine with nothing but Python 3.11, pip and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# pip brings uv, which takes a third of pip's time for all the rest, and is told where pip would look.
# A program that runs once: compiling it well would take longer than running it.
QUICK_COMPILE := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
UV := $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --python
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
# The TPU compiler runs on any Linux x86-64: programs for TPUs are compiled ahead of time in tests.
LIBTPU := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),libtpu)

.PHONY: setup setup-torch xpk quickstart test drills lint format golden bench soak wheel-test ci clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt uv
	$(UV) $(BIN)/python --editable '.[dev,plot]' $(LIBTPU)
	touch $@

# torch and transformers are oracles of some tests only; tests that need them, or lm-eval, are skipped without.
setup-torch: setup
	$(UV) $(BIN)/python --editable '.[torch,eval]'

# xpk, which sends pod jobs, has an environment of its own: `make xpk`, then `a3 launch xpk --xpk=.xpk/bin/xpk`.
xpk: .xpk/.ready

.xpk/.ready: $(VENV)/.ready
	$(PYTHON) -m venv .xpk
	$(BIN)/uv pip install --quiet --compile-bytecode --python .xpk/bin/python xpk==1.16.0
	touch $@

quickstart: setup
	$(BIN)/a3 quickstart --workdir=runs/quickstart

test: setup
	$(BIN)/python -m pytest -q -n 2

# Faults injected into real runs: killed processes, flipped bits, full disks. Two at a time.
drills: setup
	$(BIN)/python -m pytest -q -m drill -n 2 --dist=worksteal --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m tests.sizes

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Golden files: the resolved configs with their parameter trees. Read the diff before committing it.
golden: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.golden_configs

# What the software costs, as ratios, in some ten minutes; `a3 bench release` needs the authors' code besides.
bench: setup
	for name in attention train memory scaling; do $(BIN)/a3 bench $$name || exit 1; done

# An hour of runs under random faults; FLAGS such as '--minutes=6 --seed=1'.
soak: setup
	$(BIN)/python -m tests.drills.soak $(FLAGS)

# The wheel by itself, away from the source tree, installed as the image and TPU VMs install it; plotting besides.
wheel-test: setup
	rm -rf build/wheel && $(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	cp launch/install.sh constraints.txt build/wheel
	build/wheel/install.sh $(PYTHON) build/wheel/venv plot
	cd build/wheel && XLA_FLAGS="$(QUICK_COMPILE)" venv/bin/a3 quickstart --smoke --workdir=smoke
	cd build/wheel && { venv/bin/a3 bench train; [ $$? -eq 2 ]; }

ci: setup-torch xpk
	$(MAKE) -j2 lint wheel-test
	CI=true $(BIN)/python -m pytest -q -n 2 --durations=15
	CI=true $(MAKE) drills

clean:
	rm -rf $(VENV) .xpk build dist *.egg-info runs
