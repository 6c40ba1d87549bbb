# The image of a cluster without GPUs, and of its MLflow server:
#   docker build -f cluster/docker/cpu.Dockerfile -t labelmill:cpu .
# TORCH_INDEX: an index with the CPU build of torch, which is a tenth of the size of the usual one.
FROM python:3.11-slim-bookworm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget: KubeRay's probes; procps and rsync: Ray's launcher. The image takes the distribution's current security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray \
    && install -d -o ray /shared
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0 DO_NOT_TRACK=1
ARG TORCH_INDEX=""
WORKDIR /opt/labelmill
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md ./
COPY platform platform
COPY workloads workloads
RUN pip install -c constraints.txt ".[examples,server]"
USER 1000
WORKDIR /shared
