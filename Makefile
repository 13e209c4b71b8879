# Every target uses .venv, which it makes when it is missing or its inputs changed.
#   PYTHON=/path/to/python   uses that interpreter as it is instead
#   CONFIG=configs/NAME.yaml the recipe of shards, train, samples and evaluate
#   FLAGS="--seed 1"         more flags for them

CONFIG ?= configs/scenes.yaml
FLAGS ?=
# Without CONFIG, `make samples` uses the shipped bundle, so that it works before any training.
SHIPPED := $(if $(filter file,$(origin CONFIG)),--name samples --bundle scenes/bundle)
NUM_PROCESSES ?= 1
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
THREADS ?= $(shell echo $$((($(CORES) + $(NUM_PROCESSES) - 1) / $(NUM_PROCESSES))))
BASE_PYTHON ?= python3
PYTEST_FLAGS ?= -n $(CORES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

SHELL := bash
.DEFAULT_GOAL := help

ifdef PYTHON
SETUP :=
else
PYTHON := $(CURDIR)/.venv/bin/python
SETUP := .venv/.installed
endif

# All of it is said, so that accelerate neither guesses nor warns: left to itself it gives a process
# one CPU thread. The precision is the recipe's, whatever stands here.
LAUNCH = $(PYTHON) -m accelerate.commands.launch --quiet --num_machines 1 \
  --num_processes $(NUM_PROCESSES) --num_cpu_threads_per_process $(THREADS) \
  --mixed_precision no --dynamo_backend no

# The shortened demo: every step of the real one, with too little training to show anything.
QUICK ?=
ifneq ($(QUICK),)
DEMO_NAME := demo-quick
QUICK_SHARDS := --source.num-images 512
QUICK_TRAIN := --num-steps 60 --log-every-steps 20 --checkpoint-every-steps 40 --validation.every-steps 30
QUICK_EVALUATE := --num-prompts 16
else
DEMO_NAME := demo
QUICK_SHARDS :=
QUICK_TRAIN :=
QUICK_EVALUATE :=
endif
DEMO_FLAGS ?=
DEMO = --config configs/demo.yaml --name $(DEMO_NAME) $(DEMO_FLAGS)
DEMO_VALIDATION = --validation.shards shards/data/$(DEMO_NAME)/val --validation.every-steps 300

.PHONY: help setup demo test lint format types coco2014 shards train samples evaluate bench clean

help:  ## list the targets
	@sed -n -E 's/^([a-z0-9]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@sed -n -E '/^#   /s/^#   /  /p' $(MAKEFILE_LIST)

setup: $(SETUP)  ## make .venv with the versions in constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(BASE_PYTHON) is older than Python 3.11; give another with BASE_PYTHON="; exit 1; }
	@echo "installing into .venv: a few minutes the first time"
	@test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[eval,track,dev]'
	@touch $@

demo: $(SETUP)  ## scenes -> shards -> train -> samples -> report on the CPU, offline; QUICK=1 shortens
	@export HF_HUB_OFFLINE=1; started=$$(date +%s); \
	$(PYTHON) -m pipeline.run $(DEMO) $(QUICK_SHARDS) && \
	$(PYTHON) -m pipeline.run $(DEMO) --split val --source.num-images 256 && \
	$(LAUNCH) train/run.py $(DEMO) $(DEMO_VALIDATION) $(QUICK_TRAIN) && \
	$(PYTHON) -m sample.run $(DEMO) && \
	$(PYTHON) -m evaluation.run $(DEMO) $(QUICK_EVALUATE) --started-at $$started

test: $(SETUP)  ## run the tests; PYTEST_FLAGS="-m slow" runs the slow ones
	$(PYTHON) -m pytest $(PYTEST_FLAGS)

lint: $(SETUP)  ## check style, change nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(SETUP)  ## put style right
	$(PYTHON) -m ruff check --fix --exit-zero --quiet .
	$(PYTHON) -m ruff format .

types: $(SETUP)  ## check types
	$(PYTHON) -m mypy

coco2014: $(SETUP)  ## COCO 2014 into data/coco: fetches 20 GB; FLAGS="--images val" is less
	$(PYTHON) -m pipeline.download coco2014 $(FLAGS)

shards: $(SETUP)  ## stage one of CONFIG: images and captions -> shards
	$(PYTHON) -m pipeline.run --config $(CONFIG) $(FLAGS)

train: $(SETUP)  ## stage two of CONFIG: shards -> bundle; NUM_PROCESSES=8 for eight GPUs
	$(LAUNCH) train/run.py --config $(CONFIG) $(FLAGS)

samples: $(SETUP)  ## generate images with the bundle of CONFIG, or with the shipped one
	$(PYTHON) -m sample.run --config $(CONFIG) $(SHIPPED) $(FLAGS)

evaluate: $(SETUP)  ## metrics and report of CONFIG
	$(PYTHON) -m evaluation.run --config $(CONFIG) $(FLAGS)

bench: $(SETUP)  ## every benchmark in bench/; FLAGS=--quick for under a minute each
	@test -n "$(wildcard bench/*.py)" || { echo "error: no benchmark in bench/"; exit 2; }
	@for script in $(wildcard bench/*.py); do echo "== $$script"; $(PYTHON) $$script $(FLAGS) || exit; done

clean:  ## remove caches and builds; runs/, shards/data/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
