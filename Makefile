# Commands on a fresh machine (python3, git, make):
#   make demo   sets up .venv and runs the main job: five mixers, one sweep, a comparison
#   make test   sets up .venv and runs the tests
#   make chaos  kills, stops, fills and tears a sweep in every way, 10 minutes at most, and prints what it survived
# and on a machine with an NVIDIA GPU
#   make gpu-check   the contract and the kernels' equality on CUDA, one report: gpu-check.md
#                    (GPU_PYTHON=python3: with an installed Python instead of .venv)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One fixed torch: where none is installed yet, an open range would take whatever is newest.
TORCH := torch==2.13.0

GPU_PYTHON ?= $(BIN)/python
GPU_WORKERS ?= 8

.PHONY: demo test test-failed chaos gpu-check lint format dashboard clean

demo: $(VENV)/.ready
	$(BIN)/mixlab sweep run quickstart
	$(BIN)/mixlab compare quickstart --html runs/quickstart/report.html --png runs/quickstart/report.png
	@echo "Open runs/quickstart/report.html, or see it beside MLflow's pages: $(BIN)/mixlab dashboard"

# One thread per test process: they share the cores.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

# What failed last, one after another; fails when nothing is known to have failed.
test-failed: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --last-failed --last-failed-no-failures none

chaos: $(VENV)/.ready-dev
	$(BIN)/python -m tests.chaos

# The test processes fill the cores: each compiles by itself, without a pool of its own.
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.ready-dev)
	TORCHINDUCTOR_COMPILE_THREADS=1 $(GPU_PYTHON) -m pytest -n $(GPU_WORKERS) --max-worker-restart 100 --timeout-method thread -m cuda \
		--gpu-report gpu-check.md tests/mixers

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dashboard: $(VENV)/.ready
	$(BIN)/mixlab dashboard

# One call of pip for all that is needed: each looks at every package anew.
define INSTALL
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) --editable "$(1)"
	touch $@
endef

$(VENV)/.ready: pyproject.toml
	$(call INSTALL,.)

$(VENV)/.ready-dev: pyproject.toml
	$(call INSTALL,.[dev])
	touch $(VENV)/.ready

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
