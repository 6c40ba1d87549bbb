#!/usr/bin/env bash
# Fashion-MNIST from Debian's package `dataset-fashion-mnist` (MIT) into data/fashion-mnist/{train,test}. No root needed.
#
#   IDX=/path   use IDX files that are already there (train-images-idx3-ubyte.gz, ...) instead of the package
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m[fashion-mnist]\033[0m %s\n' "$*"; }

out=data/fashion-mnist
if [ -e "$out/train/manifest.json" ] && [ -e "$out/test/manifest.json" ]; then
  say "reusing $out"
  exit 0
fi

idx=${IDX:-}
for place in /usr/share/datasets/fashion-mnist data/fashion-mnist-idx; do
  [ -z "$idx" ] && [ -e "$place/train-images-idx3-ubyte.gz" ] && idx=$place
done
if [ -z "$idx" ]; then
  command -v apt-get >/dev/null || {
    echo "no apt-get here: download the four IDX files and run IDX=/path/to/them make fashion-mnist" >&2
    exit 2
  }
  say "fetching the Debian package dataset-fashion-mnist"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  # lists of our own: works without root and leaves the system's alone
  apt=(apt-get -qq -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User= -o Acquire::Languages=none)
  "${apt[@]}" update
  (cd "$work" && "${apt[@]}" download dataset-fashion-mnist)
  dpkg -x "$work"/dataset-fashion-mnist_*.deb "$work/tree"
  idx=data/fashion-mnist-idx
  mkdir -p "$idx"
  cp "$work"/tree/usr/share/datasets/fashion-mnist/*ubyte* "$idx/"
fi

say "importing $idx"
names=(--class t-shirt --class trouser --class pullover --class dress --class coat --class sandal --class shirt --class sneaker --class bag --class boot)
for split in train t10k; do
  folder=$out/${split/t10k/test}
  images=$(ls "$idx/$split"-images* | head -n 1)
  labels=$(ls "$idx/$split"-labels* | head -n 1)
  .venv/bin/labelmill data import idx --images "$images" --labels "$labels" --out "$folder" --shard-mb 2 --name "fashion-mnist-${split/t10k/test}" "${names[@]}"
done
