# Every target sets itself up: a .venv, the CPU build of torch first (a plain range would pull CUDA), the rest pinned against it.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
TORCH := torch==2.13.0

.PHONY: demo test test-slow lint type setup bench-accuracy bench-artifacts bench-cost bench-criteria bench-graph clean

demo: .venv/.core  ## the main job on data that ships with the installation, under 3 minutes
	$(BIN)/edgeprune demo

test: lint type  ## what CI runs
	$(BIN)/python -m pytest -m "not slow and not board"

test-slow: .venv/.dev  ## browser, real CIFAR-10 weights, library models
	$(BIN)/python -m pytest -m slow

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/.dev
	$(BIN)/mypy

setup: .venv/.dev  ## everything for development

bench-accuracy: .venv/.dev  ## ResNet-56 on CIFAR-10 to half the MACs (EDGEPRUNE_DATA; half an hour on 2 cores)
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.accuracy --criteria l1 --recover reconstruct

bench-artifacts: .venv/.dev  ## 25 networks as ONNX and TFLite against torch, then latency on this machine (EDGEPRUNE_DATA; goes on where it was; over an hour)
	$(BIN)/python -m benchmarks.artifacts parity
	$(BIN)/python -m benchmarks.artifacts latency

bench-cost: .venv/.dev  ## refit every shipped latency constant from the public tables and print the errors
	$(BIN)/python -m benchmarks.cost_models

bench-criteria: .venv/.dev  ## every criterion on CIFAR-10 ResNets (EDGEPRUNE_DATA; goes on where it was; over an hour on one core)
	$(BIN)/python -m benchmarks.criteria

bench-graph: .venv/.dev  ## trace and slim: the 87 library networks of the list in EDGEPRUNE_DATA, speed beside Torch-Pruning, growth with depth
	$(PIP) --no-deps torch-pruning==1.6.1
	$(BIN)/python -m benchmarks.graph coverage
	$(BIN)/python -m benchmarks.graph speed
	$(BIN)/python -m benchmarks.graph depth

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

.venv/.core: pyproject.toml .ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "edgeprune needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps timm torchvision
	@touch $@
