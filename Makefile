# labelmill: `make demo` and `make test` need Python 3.11, git, make and a package index; nothing else.
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help env demo test slow lint types fashion-mnist extreme-data gloss-data walkthrough experiments clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

env:  ## the environment in .venv (TORCH=cpu|cuda, TORCH_INDEX=URL)
	@ci/env.sh

demo: env  ## a million classes on this machine: train, evaluate, register, predict
	@ci/demo.sh

test: env  ## lint, types, import contract, unit, distributed and system tests
	@ci/test.sh

lint: env  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: env  ## mypy
	@$(BIN)/mypy

fashion-mnist: env  ## Fashion-MNIST from Debian's package (no root) into data/fashion-mnist
	@ci/fashion_mnist.sh

extreme-data: env  ## Debian's tags and sections and WordNet's glosses (no root) into data/
	@ci/extreme_data.sh

gloss-data: env  ## WordNet's glosses with hypernyms as classes, and a sentence encoder's view of them, into data/
	@ci/gloss_data.sh

slow: env  ## the tests that `make test` leaves out: faults on clusters of several hosts, small trainings
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

walkthrough: env  ## the walk-through of cluster/README.md, on two hosts of this machine (root)
	@$(BIN)/python ci/walkthrough.py

experiments: env fashion-mnist extreme-data gloss-data  ## the recorded experiments (long)
	@ci/experiments.sh

clean:  ## remove the environment and caches; runs and data stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
