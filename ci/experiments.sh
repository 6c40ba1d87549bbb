#!/usr/bin/env bash
# The recorded experiments: each job with three seeds, then mean and range of its metrics. About two hours on 2 cores.
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
for job in kd dual-head active multi-aspect; do
  $bin/python ci/experiments/distillation.py "workloads/distillation/jobs/$job-fashion.yaml"
done
$bin/python ci/experiments/distillation.py workloads/distillation/jobs/sla-fashion.yaml --metrics test vote told \
  --set 'encoder={kind: mlp, image_size: 28, channels: 1, hidden: [128], dim: 64, batch_norm: true}'
