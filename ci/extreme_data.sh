#!/usr/bin/env bash
# Real sets for extreme classification from Debian's index files and its package `wordnet-base`: data/debian-tags,
# data/debian-sections, data/wordnet-lemmas, data/wordnet-words, each {train,dev,test}. No root needed.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m[extreme-data]\033[0m %s\n' "$*"; }

done=1
for set in debian-tags debian-sections wordnet-lemmas wordnet-words; do [ -e "data/$set/test/manifest.json" ] || done=0; done
if [ "$done" = 1 ]; then
  say "reusing data/debian-tags, data/debian-sections, data/wordnet-lemmas, data/wordnet-words"
  exit 0
fi
command -v apt-get >/dev/null || {
  echo "no apt-get here: these sets are made of Debian's index files" >&2
  exit 2
}
work=data/extreme-sources
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
# lists of our own, in English whatever the system is set to, and not compressed
apt=(apt-get -qq -o "Dir::State::Lists=$PWD/$work/lists" -o "Dir::Cache=$PWD/$work/cache" -o APT::Sandbox::User=
  -o Acquire::Languages=en -o Acquire::GzipIndexes=false)
if ! ls "$work"/lists/*_Packages >/dev/null 2>&1; then
  say "fetching Debian's index files"
  "${apt[@]}" update
fi
if [ ! -e "$work/tree/usr/share/wordnet/data.noun" ]; then
  say "fetching the Debian package wordnet-base"
  (cd "$work" && "${apt[@]}" download wordnet-base && dpkg -x wordnet-base_*.deb tree)
fi
make=(.venv/bin/python -m workloads.extreme.packages)
[ -e data/debian-tags/test/manifest.json ] || "${make[@]}" tags "$work/lists" data/debian-tags
[ -e data/debian-sections/test/manifest.json ] || "${make[@]}" sections "$work/lists" data/debian-sections
[ -e data/wordnet-lemmas/test/manifest.json ] || "${make[@]}" wordnet "$work/tree/usr/share/wordnet" data/wordnet-lemmas
[ -e data/wordnet-words/test/manifest.json ] || "${make[@]}" words "$work/tree/usr/share/wordnet" data/wordnet-words
