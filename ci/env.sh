#!/usr/bin/env bash
# Builds (or reuses) the environment in .venv. Usage: ci/env.sh
#
#   TORCH=auto|cpu|cuda   which build of torch to expect (auto: cuda where nvidia-smi answers, else cpu)
#   TORCH_INDEX=URL       an index to take torch from, e.g. the PyTorch project's CPU index
#   PYTHON=python3.11     the interpreter to build with
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m[env]\033[0m %s\n' "$*"; }

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "labelmill needs Python 3.11; found $("$python" -V). Set PYTHON=/path/to/python3.11." >&2
  exit 2
}

torch=${TORCH:-auto}
if [ "$torch" = auto ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then torch=cuda; else torch=cpu; fi
fi

stamp=.venv/.labelmill-$(cat ci/env.sh pyproject.toml constraints.txt | sha256sum | cut -c1-16)-$torch
if [ -e "$stamp" ]; then
  say "reusing .venv ($torch build of torch)"
  exit 0
fi

[ -x .venv/bin/python ] || { say "creating .venv with $("$python" -V)"; "$python" -m venv .venv; }
pip=(.venv/bin/python -m pip --disable-pip-version-check)
version=$(sed -n 's/^torch==//p' constraints.txt)
say "installing torch $version ($torch)"
index=()
[ -n "${TORCH_INDEX:-}" ] && index=(--index-url "$TORCH_INDEX")
if [ "$torch" = cpu ] && [ -z "${TORCH_INDEX:-}" ]; then
  # a package index may carry the CPU build under its local version; the plain one may be the (larger) CUDA build
  "${pip[@]}" install -q "torch==$version+cpu" 2>/dev/null || "${pip[@]}" install -q "torch==$version"
else
  "${pip[@]}" install -q "${index[@]}" "torch==$version"
fi
say "installing the pinned packages (constraints.txt)"
"${pip[@]}" install -q -c constraints.txt -e '.[examples,dev]'
rm -f .venv/.labelmill-*
touch "$stamp"
say "ready: $(.venv/bin/python -c 'import torch; print("torch", torch.__version__, "cuda" if torch.cuda.is_available() else "cpu")')"
