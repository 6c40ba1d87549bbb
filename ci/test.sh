#!/usr/bin/env bash
# Everything that must hold: lint, types, the import contract, then the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
step() { printf '\033[1m[test]\033[0m %s\n' "$*"; }
step "ruff check and format"
$bin/ruff check .
$bin/ruff format --check .
step "mypy"
$bin/mypy
step "import contract"
PYTHONPATH=platform:. $bin/lint-imports --config ci/importlinter.ini
step "data for the tests"
ci/fashion_mnist.sh || step "no Fashion-MNIST here; the tests that need it say so"
step "pytest"
# two processes, a file each at a time: much of a test's time is the start of other processes
OMP_NUM_THREADS=1 $bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
if [ $# = 0 ]; then
  step "the walk-through of cluster/README.md"
  $bin/python ci/walkthrough.py
fi
