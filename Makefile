# make demo and make test are enough on a fresh machine: each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin

# A GPU machine takes torch as PyPI serves it; a CPU machine the version that was tested, from wherever a CPU build is offered.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.11" || echo "torch==2.13.0")

.PHONY: help install demo test lint docs bench clean

help:
	@echo "make demo      see it work: a real model before and after it was fitted to preferences"
	@echo "make test      every test"
	@echo "make lint      format check, linter, types"
	@echo "make docs      the pages of the catalogue of losses, written anew"
	@echo "make bench     speed and memory beside TRL and generate, forecasts beside the truth: an hour on two idle cores"
	@echo "make install   .venv with the command sartor in it"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/sartor demo

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/make_losses.py

bench: install
	$(BIN)/python benchmarks/preference_step.py --cases full,lora
	$(BIN)/python benchmarks/preference_step.py --cases long,reward,ranking,sft --contenders sartor,trl-tuned
	OMP_PROC_BIND=true $(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/forecast.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
