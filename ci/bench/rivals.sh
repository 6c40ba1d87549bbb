#!/usr/bin/env bash
# The environment of the other loaders that ci/bench/stream.py measures. Usage: ci/bench/rivals.sh [FOLDER]
#
# FOLDER is $LABELMILL_BENCH_DATA/rivals (default /tmp/labelmill-bench/rivals). torch, simplejpeg and Pillow are those of
# .venv. mosaicml-streaming imports torchvision for data sets that aren't used here; the build on a package index may not
# load beside a CPU build of torch, so a stub of two names takes its place, in this environment only.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-${LABELMILL_BENCH_DATA:-/tmp/labelmill-bench}/rivals}
[ -x .venv/bin/python ] || { echo "no .venv here: run make env first" >&2; exit 2; }
version() { .venv/bin/python -c "import importlib.metadata as m; print(m.version('$1'))"; }

stamp=$folder/.ready-$(cat ci/bench/rivals.sh ci/bench/requirements-rivals.txt | sha256sum | cut -c1-16)
[ -e "$stamp" ] && { echo "reusing $folder"; exit 0; }
[ -x "$folder/bin/python" ] || .venv/bin/python -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check install -q)
torch=$(version torch)
"${pip[@]}" "torch==$torch" 2>/dev/null || "${pip[@]}" "torch==${torch%%+*}"

stub=$(mktemp -d)
trap 'rm -rf "$stub"' EXIT
mkdir -p "$stub/torchvision/datasets" "$stub/torchvision/transforms"
touch "$stub/torchvision/__init__.py" "$stub/torchvision/transforms/__init__.py"
printf 'class VisionDataset: ...\nclass CIFAR10: ...\n' > "$stub/torchvision/datasets/__init__.py"
printf 'def to_tensor(image):\n    raise NotImplementedError("a stub, see ci/bench/rivals.sh")\n' \
  > "$stub/torchvision/transforms/functional.py"
cat > "$stub/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "torchvision"
version = "0.28.0+stub"
[tool.setuptools]
packages = ["torchvision", "torchvision.datasets", "torchvision.transforms"]
TOML
"${pip[@]}" "$stub"
"${pip[@]}" -r ci/bench/requirements-rivals.txt "simplejpeg==$(version simplejpeg)" "pillow==$(version pillow)"
"$folder/bin/python" -c 'import litdata, streaming, torch, webdataset; print("ready: torch", torch.__version__)'
touch "$stamp"
