#!/usr/bin/env bash
# Runs a verb on the GPUs of this machine: one process for all of them, with the mesh of config.mesh.
# Usage: [CUDA_VISIBLE_DEVICES=0,1] bash launch/gpu.sh VERB ARGUMENTS...     such as: train --config configs/scienceqa.py
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh

[ $# -gt 0 ] || fail "name a verb, such as: bash launch/gpu.sh train --config configs/scienceqa.py --workdir runs/gpu"
nvidia-smi --list-gpus 2>/dev/null | grep -q GPU || fail "nvidia-smi shows no GPU here; install NVIDIA's driver, or use launch/quickstart.sh on the CPU"
prepare_environment gpu --editable '.[gpu,gcs]'
exec "$VENV/bin/python" -m "sqa_jax.$1" "${@:2}"
