#!/usr/bin/env bash
# The recorded experiments: each job with three seeds, then mean and range of its metrics. About 25 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
for seed in 0 1 2; do
  $bin/labelmill run workloads/discrimination/jobs/mlcd-fashion.yaml --set "name=mlcd-fashion-s$seed" --set "seed=$seed"
done
$bin/python ci/summarize.py runs/mlcd-fashion-s{0,1,2}
for experiment in losses parametric negatives spherical tables; do
  PYTHONPATH=platform:. $bin/python ci/experiments/extreme.py "$experiment"
done
