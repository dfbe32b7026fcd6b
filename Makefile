# Every target sets itself up: a .venv, the CPU build of torch first (a plain range would pull CUDA), the rest pinned against it.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
TORCH := torch==2.13.0

.PHONY: demo test test-slow test-board lint type setup bench-accuracy bench-allocation bench-artifacts bench-board bench-cost bench-criteria bench-graph bench-instructions bench-regression bench-robustness bench-staircase bench-training bench-whole clean package style

demo: .venv/.core  ## the main job on data that ships with the installation, three to four minutes
	$(BIN)/edgeprune demo

test: lint type  ## what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not board"  # two workers of one thread each

test-slow: .venv/.dev  ## browser, real CIFAR-10 weights, library models
	$(BIN)/python -m pytest -m slow

test-board: .venv/.dev  ## an emulated ARM board: sshd, aarch64 onnxruntime and LiteRT (installs qemu and others by apt where it may; 1 GB)
	$(BIN)/python -m pytest -m board -rs

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/.dev
	$(BIN)/mypy

setup: .venv/.dev  ## everything for development

bench-accuracy: .venv/.dev  ## ResNet-56 and ResNet-20 on CIFAR-10 without training, Torch-Pruning beside (EDGEPRUNE_DATA; goes on where it was)
	$(PIP) --no-deps torch-pruning==1.6.1
	$(BIN)/python -m benchmarks.accuracy

bench-allocation: .venv/.dev  ## every allocator on CIFAR-10 ResNets (EDGEPRUNE_DATA; goes on where it was; some hours on one core)
	$(BIN)/python -m benchmarks.allocation_speed
	$(BIN)/python -m benchmarks.allocation

bench-artifacts: .venv/.dev  ## 25 networks as ONNX and TFLite against torch, then latency on this machine (EDGEPRUNE_DATA; goes on where it was; over an hour)
	$(BIN)/python -m benchmarks.artifacts parity
	$(BIN)/python -m benchmarks.artifacts latency

bench-cost: .venv/.dev  ## refit every shipped latency constant from the public tables, print the errors; speed of predictions; memory against what runtimes use
	$(BIN)/python -m benchmarks.cost_models
	$(BIN)/python -m benchmarks.cost_speed
	$(BIN)/python -m benchmarks.cost_memory

bench-staircase: .venv/.dev  ## calibrate this machine (10 minutes, wants it idle), then widths by its staircase against multiples of 8
	$(BIN)/edgeprune device calibrate host
	$(BIN)/python -m benchmarks.cost_staircase

bench-criteria: .venv/.dev  ## every criterion on CIFAR-10 ResNets (EDGEPRUNE_DATA; goes on where it was; over an hour on one core)
	$(BIN)/python -m benchmarks.criteria

bench-instructions: .venv/.dev  ## ARM instructions of reference networks on the emulated board, the baseline of the gate in test-board
	$(BIN)/python -m benchmarks.instructions

bench-graph: .venv/.dev  ## trace and slim: the 87 library networks of the list in EDGEPRUNE_DATA, speed beside Torch-Pruning, growth with depth
	$(PIP) --no-deps torch-pruning==1.6.1
	$(BIN)/python -m benchmarks.graph coverage
	$(BIN)/python -m benchmarks.graph speed
	$(BIN)/python -m benchmarks.graph depth
	$(BIN)/python -m benchmarks.graph_start

bench-training: .venv/.dev  ## images per second of fine-tuning beside bare forward + backward
	$(BIN)/python -m benchmarks.training

bench-robustness: .venv/.dev  ## damaged files, kills, full disks (root), memory limits, 200 runs in one process; goes on where it was; ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.robustness

bench-whole: .venv/.dev  ## seconds and memory of compress on MobileNetV2 224x224, and of the light commands (EDGEPRUNE_DATA; wants an idle machine)
	$(BIN)/python -m benchmarks.whole

package: .venv/.dev  ## sdist and wheel, installed where nothing is with and without each extra, and the demo from it; downloads 1.5 GB
	$(BIN)/python -m benchmarks.packages

style: .venv/.dev  ## the shape of the code in one row, also in benchmarks/results
	@$(BIN)/python -m benchmarks.style | tee benchmarks/results/style.md

bench-regression: .venv/.dev  ## this revision beside BASE on this machine; fails where something is worse by more than MAX_REGRESSION percent
	$(BIN)/edgeprune bench --against $(or $(BASE),HEAD^) --max-regression $(or $(MAX_REGRESSION),10)

bench-board: .venv/.dev  ## the reference networks on an attached board: BOARD=rpi4 HOST=pi@board
	$(BIN)/edgeprune bench --no-latency --artifacts runs/nightly --out runs/nightly/bench.json
	for n in digits residual mobile; do \
	  $(BIN)/edgeprune profile runs/nightly/$$n.onnx --device $(BOARD) --host $(HOST) --json > runs/nightly/$$n.json || exit $$?; done

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
