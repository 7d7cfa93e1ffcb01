#!/usr/bin/env bash
# One run over all tasks of a SLURM job; requeued, it goes on where it was.
#
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh \
#       --experiment=quickstart --row=hope --workdir=/shared/runs/hope
#   bash launch/slurm.sh --dry_run ...      prints the command, quoted, and runs nothing
#
# One task a GPU. The arguments go to launch.train with --coordinator=auto and --resume;
# the workdir must be on storage that all nodes share. Two minutes before its time is
# over, or when it is preempted, the job saves and is queued again; `scancel` ends it.
#
#SBATCH --job-name=hope_jax
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=hope_jax-%j.log
set -euo pipefail

dry=''
if [[ "${1:-}" == --dry_run ]]; then dry=yes && shift; fi
if (($# == 0)); then
  echo 'error: give the arguments of launch.train' >&2
  exit 1
fi
# SLURM runs a copy of this script: the repository is where it was submitted, unless
# hope_jax is installed.
python="${PYTHON:-python3}"
if [[ -z "${PYTHON:-}" && -x .venv/bin/python ]]; then python="$PWD/.venv/bin/python"; fi
command=(srun --kill-on-bad-exit=1 "$python" -m launch.train "$@" --coordinator=auto --resume)
if [[ -n "$dry" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
status=0
"${command[@]}" || status=$?
# Stopped by SIGTERM, which the tasks alone were sent: SLURM itself queues again what was
# preempted, but not what has used up its time.
if ((status == 143)) && [[ -n "${SLURM_JOB_ID:-}" ]]; then
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
