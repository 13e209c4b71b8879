# Targets run in .venv, which `make setup` creates and updates.
#   PYTHON=/path/to/python   use this interpreter instead of .venv
#   CONFIG=configs/NAME.yaml preset for shards, train, samples and evaluate
#   FLAGS="--seed 1"         more flags for these targets

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

# Without these flags accelerate guesses them, warns, and uses one CPU thread per process. The
# preset sets the precision, not --mixed_precision.
LAUNCH = $(PYTHON) -m accelerate.commands.launch --quiet --num_machines 1 \
  --num_processes $(NUM_PROCESSES) --num_cpu_threads_per_process $(THREADS) \
  --mixed_precision no --dynamo_backend no

# QUICK=1 runs every step of the demo with too little training for good images.
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

.PHONY: help setup demo test lint format types docs walkthrough coco2014 shards train samples app evaluate bench clean

help:  ## list the targets
	@sed -n -E 's/^([a-z0-9]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo
	@sed -n -E '/^#   /s/^#   /  /p' $(MAKEFILE_LIST)

setup: $(SETUP)  ## create .venv with the versions in constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(BASE_PYTHON) is older than Python 3.11. Set BASE_PYTHON to a newer interpreter"; exit 1; }
	@echo "installing into .venv: a few minutes the first time"
	@test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[eval,track,dev,docs]'
	@touch $@

demo: $(SETUP)  ## run every stage on the CPU, offline; QUICK=1 for a short run
	@export HF_HUB_OFFLINE=1; started=$$(date +%s); \
	$(PYTHON) -m pipeline.run $(DEMO) $(QUICK_SHARDS) && \
	$(PYTHON) -m pipeline.run $(DEMO) --split val --source.num-images 256 && \
	$(LAUNCH) train/run.py $(DEMO) $(DEMO_VALIDATION) $(QUICK_TRAIN) && \
	$(PYTHON) -m sample.run $(DEMO) --overwrite && \
	$(PYTHON) -m evaluation.run $(DEMO) $(QUICK_EVALUATE) --started-at $$started

test: $(SETUP)  ## run the tests; PYTEST_FLAGS="-m slow" runs the slow ones
	$(PYTHON) -m pytest $(PYTEST_FLAGS)

lint: $(SETUP)  ## check style
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(SETUP)  ## fix style
	$(PYTHON) -m ruff check --fix --exit-zero --quiet .
	$(PYTHON) -m ruff format .

types: $(SETUP)  ## check types
	$(PYTHON) -m mypy

docs: $(SETUP)  ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

walkthrough: $(SETUP)  ## run docs/walkthrough.ipynb and store its outputs, under ten minutes
	$(PYTHON) -m jupyter execute --inplace --NotebookClient.record_timing=False docs/walkthrough.ipynb

coco2014: $(SETUP)  ## download COCO 2014 into data/coco, 20 GB; FLAGS="--images val" for less
	$(PYTHON) -m pipeline.download coco2014 $(FLAGS)

shards: $(SETUP)  ## encode images and captions of CONFIG into shards (stage one)
	$(PYTHON) -m pipeline.run --config $(CONFIG) $(FLAGS)

train: $(SETUP)  ## train CONFIG (stage two); NUM_PROCESSES=8 for eight GPUs
	$(LAUNCH) train/run.py --config $(CONFIG) $(FLAGS)

samples: $(SETUP)  ## generate images with the bundle of CONFIG, or with the shipped one
	$(PYTHON) -m sample.run --config $(CONFIG) $(SHIPPED) --overwrite $(FLAGS)

app: $(SETUP)  ## serve a page that generates images, on http://127.0.0.1:7860
	@$(PYTHON) -c 'import gradio' 2>/dev/null || { echo "installing gradio, which needs Pillow 12"; \
	  $(PYTHON) -m pip install --quiet --editable '.[app]'; }
	$(PYTHON) -m sample.app $(FLAGS)

evaluate: $(SETUP)  ## compute metrics of CONFIG and write a report
	$(PYTHON) -m evaluation.run --config $(CONFIG) $(FLAGS)

bench: $(SETUP)  ## run the benchmarks; FLAGS=--quick takes under a minute each
	@test -n "$(wildcard bench/*.py)" || { echo "error: bench/ has no benchmark"; exit 2; }
	@for script in $(wildcard bench/*.py); do echo "== $$script"; $(PYTHON) $$script $(FLAGS) || exit; done

clean:  ## remove caches and builds; keep runs/, shards/data/ and .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
