#!/usr/bin/env bash
# Runs a verb as a Slurm job, one process per node, each with all GPUs of its node.
# Usage, in the clone, on a file system that the nodes share:
#   sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 launch/slurm.sh VERB ARGUMENTS...
# Training that is preempted or out of time saves a checkpoint, and is requeued until it is done.
#SBATCH --job-name=sqa_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=launch/environment.sh
. launch/environment.sh

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a Slurm job: sbatch launch/slurm.sh VERB ARGUMENTS..."
[ $# -gt 0 ] || fail "name a verb, such as: sbatch launch/slurm.sh train --config configs/scienceqa.py --workdir runs/slurm"
prepare_environment gpu --editable '.[gpu,gcs]'

# By default, JAX gives a Slurm task a single GPU.
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS
srun --kill-on-bad-exit=1 "$VENV/bin/python" -m "sqa_jax.$1" "${@:2}" --coordinator auto

# Training that is stopped saves and exits with 0; a finished one has left train.json.
[ "$1" = train ] || exit 0
workdir=''
for ((i = 2; i <= $#; i++)); do
  case ${!i} in
    --workdir) next=$((i + 1)) && workdir=${!next} ;;
    --workdir=*) workdir=${!i#*=} ;;
  esac
done
"$VENV/bin/python" -c 'import sys; from etils import epath; sys.exit(0 if (epath.Path(sys.argv[1]) / "train.json").exists() else 3)' "$workdir" || {
  [ $? -eq 3 ] && scontrol requeue "$SLURM_JOB_ID"
}
