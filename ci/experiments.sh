#!/usr/bin/env bash
# The recorded experiments: each job with three seeds, then mean and range of its metrics. About three hours on 2 cores.
# Parts of it alone: .venv/bin/python ci/experiments/noisy.py ldr. What has finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
for seed in 0 1 2; do
  $bin/labelmill run workloads/discrimination/jobs/mlcd-fashion.yaml --set "name=mlcd-fashion-s$seed" --set "seed=$seed"
done
$bin/python ci/summarize.py runs/mlcd-fashion-s{0,1,2}
OMP_NUM_THREADS=1 $bin/python ci/experiments/noisy.py
for experiment in losses parametric negatives spherical tables; do
  $bin/python ci/experiments/extreme.py "$experiment"
done
OMP_NUM_THREADS=1 $bin/python ci/experiments/unlearning.py
OMP_NUM_THREADS=1 $bin/python ci/experiments/distillation.py
