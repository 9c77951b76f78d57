#!/usr/bin/env bash
# Train on one machine, one rank per GPU; without GPUs, as two CPU ranks.
#
#   launchers/accelerate.sh CONFIG [FIELD=VALUE ...]
#
# From the environment:
#   NPROC            ranks; default: the number of GPUs, or 2
#   MASTER_PORT      port the ranks meet at; default: one that is free
#   OMP_NUM_THREADS  CPU threads of each rank; default: cores / ranks
#   PYTHON           interpreter that has Lathe; default: python
#   LATHE_REQUEUE_FILE  written where the run was asked to stop and wants to be started again
#
# SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 go on to the ranks, which save and leave: see docs/operations.md.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit $(($# < 1 ? 2 : 0))
fi

python=${PYTHON:-python}

# A mistake in the run file is told once, before any rank starts.
"$python" -m pipeline config "$@" >/dev/null

gpus=0
if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
ranks=${NPROC:-$((gpus > 0 ? gpus : 2))}
if [[ ! $ranks =~ ^[1-9][0-9]*$ ]]; then
  printf 'error: NPROC=%s is not a number of ranks\n  set NPROC=2, or leave it out\n' "$ranks" >&2
  exit 2
fi
if ((gpus == 0)); then
  export DS_ACCELERATOR=cpu
fi
if [[ -z ${MASTER_PORT:-} ]]; then
  MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# `accelerate launch`, through a wrapper that keeps the ranks' exit code.
exec "$python" -m pipeline.runtime.launch \
  --use_deepspeed --num_processes "$ranks" --num_machines 1 --main_process_port "$MASTER_PORT" \
  --mixed_precision no --dynamo_backend no \
  -m pipeline train "$@"
