# Needs Python 3.11, pip, a C++ compiler and make; everything else goes into .venv.
#
#   make demo              train a tiny Qwen2-VL on digits with two processes, stop, resume, and print the proof
#   make demo DEMO=short   the same with fewer steps;   make demo ZERO=3   the same under ZeRO-3
#   make test              all tests but the opt-in ones
#   make check             format, lint, types, import contracts
#   make chaos             the fault campaign, an hour;   make chaos ONLY="disk full" SEED=3

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   ?= full
ZERO   ?= 2
BENCH  ?= full
PYTEST_ARGS ?=
SEED   ?= 7
ONLY   ?=
# test processes: most tests wait for processes that they started; a file stays in one, as its tests share what is slow to make
JOBS   ?= 2

# two processes share the cores: one thread each, unless the caller knows better
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format clean bench-scale bench-data bench-checkpoint bench-nodes bench bench-flops bench-loop bench-lora bench-packing bench-ranks chaos cluster
.PHONY: gpu-wheels gpu-tests gpu-2b gpu-7b

help:  ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*##/  make \1  /p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the exact versions of constraints.txt

# DeepSpeed comes as a source distribution whose setup.py imports torch, so torch must be there before it and its build
# must see this environment. Our package comes last: its `deepspeed` command replaces DeepSpeed's own (and adds -m).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy ninja
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the main job on the embedded data set, and its proof (DEMO=short, ZERO=3)
	$(BIN)/python -m vlm_dist.demo --zero $(ZERO) $(if $(filter short,$(DEMO)),--short)

test: $(STAMP)  ## all tests but the opt-in ones (JOBS=2, PYTEST_ARGS=...)
	$(BIN)/python -m pytest -m "not gpu and not long" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(STAMP)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-data: $(STAMP)  ## the loader and its peers on the same pictures (BENCH=quick: ours alone, under a minute)
	$(BIN)/python -m tests.bench.data $(if $(filter quick,$(BENCH)),--quick)

bench-scale: $(STAMP)  ## the planner with 10^9 samples and 1024 ranks; padding and balance of the batching modes
	$(BIN)/python -m tests.bench.scale

chaos: $(STAMP)  ## every fault of the campaign, through whole runs (SEED=7, ONLY=kind)
	$(BIN)/python -m tests.chaos --seed $(SEED) $(if $(ONLY),--only "$(ONLY)")

cluster: $(STAMP)  ## all tests on a Slurm and ssh cluster of this machine, failing nodes included (root, a quarter of an hour)
	VLM_DIST_REQUIRE_CLUSTER=1 $(BIN)/python -m pytest tests/cluster -m cluster $(PYTEST_ARGS)

bench-checkpoint: $(STAMP)  ## bytes, stall and time to resume of checkpoints, beside DeepSpeed's own (BENCH=quick: under a minute)
	$(BIN)/python -m tests.bench.checkpoint $(if $(filter quick,$(BENCH)),--quick)

bench-nodes: $(STAMP)  ## bytes on the wire for each stage of ZeRO, and what slow links cost (root; BENCH=quick: two minutes)
	$(BIN)/python -m tests.bench.nodes $(if $(filter quick,$(BENCH)),--quick)

bench-flops: $(STAMP)  ## operations as MFU counts them, beside torch's own count, family by family (BENCH=quick: seconds)
	$(BIN)/python -m tests.bench.flops $(if $(filter quick,$(BENCH)),--quick)

bench-lora: $(STAMP)  ## a LoRA layer beside PEFT's own (BENCH=quick: seconds)
	$(BIN)/python -m tests.bench.lora $(if $(filter quick,$(BENCH)),--quick)

bench-packing: $(STAMP)  ## a step over packs: attention without a mask, with one, and padded rows (BENCH=quick: under a minute)
	$(BIN)/python -m tests.bench.packing $(if $(filter quick,$(BENCH)),--quick)

bench-ranks: $(STAMP)  ## how long ranks wait for each other, by batching mode, beside Trainer's samplers (BENCH=quick: a minute)
	$(BIN)/python -m tests.bench.ranks $(if $(filter quick,$(BENCH)),--quick)

# What GPU machines without a network need beside PyTorch and transformers (docs/gpu.md): for their Python and their glibc.
WHEELS       := .gpu/wheels
WHEEL_TARGET := --python-version 3.12 --implementation cp $(addprefix --platform ,$(addsuffix _x86_64,\
	manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux2010 manylinux1))
# .venv if it is there, else one that is made of the wheels and a Python with PyTorch (PYTHON=...)
GPU_PYTHON = "$$($(firstword $(shell command -v python3 python)) -m tests.gpu.environment)"

gpu-wheels: $(STAMP)  ## wheels for GPU machines without a network, into .gpu/wheels
	rm -rf $(WHEELS) && mkdir -p $(WHEELS)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: $(WHEEL_TARGET) \
	    --dest $(WHEELS) --requirement tests/gpu/wheels.txt
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
	    --no-build-isolation --wheel-dir $(WHEELS) deepspeed
	$(BIN)/python -m tests.gpu.carried

gpu-tests:  ## what only a GPU can show (docs/gpu.md), below 10 minutes
	python=$(GPU_PYTHON) && "$$python" -m pytest tests/gpu tests/engine/test_memory_check.py -m gpu -v $(PYTEST_ARGS)

gpu-2b:  ## Qwen2-VL-2B at true size on a GPU beside TRL and the Hugging Face Trainer, below 10 minutes
	python=$(GPU_PYTHON) && "$$python" -m tests.bench.gpu 2b

gpu-7b:  ## the same with Qwen2.5-VL-7B
	python=$(GPU_PYTHON) && "$$python" -m tests.bench.gpu 7b

bench-loop: $(STAMP)  ## what our loop costs beside DeepSpeed's own three calls (BENCH=quick: under a minute)
	$(BIN)/python -m tests.bench.loop $(if $(filter quick,$(BENCH)),--quick)

bench: $(STAMP)  ## whole training runs beside the peers, half an hour, environments apart (BENCH=quick: ours and Trainer)
	$(BIN)/python -m tests.bench.training $(if $(filter quick,$(BENCH)),--quick)

format: $(STAMP)  ## format and sort imports in place
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean:  ## remove what was built (not .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
