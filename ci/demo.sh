#!/usr/bin/env bash
# The demo: a million classes on this machine, from word lists to a registered model that answers.
set -euo pipefail
cd "$(dirname "$0")/.."
job=workloads/discrimination/jobs/spelling-1m.yaml
printf '\033[1m[demo]\033[0m %s\n' "labelmill run $job"
.venv/bin/labelmill run "$job"
ask=(.venv/bin/labelmill models predict spelling-1m@candidate --text pronounciaton --text embarassmnet --text langwage --text rechtschreibnug --text conocimineto)
printf '\033[1m[demo]\033[0m %s\n' "${ask[*]#.venv/bin/}"
"${ask[@]}"
