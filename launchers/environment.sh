# shellcheck shell=bash
# What the launchers take from the environment; they source it with their own arguments.
#
#   NPROC            ranks of this machine; default: the number of its GPUs, or 2
#   NODES            machines; default: 1
#   NODE_RANK        which of them this is, from 0
#   MASTER_ADDR      name or address of machine 0, by which the others reach it
#   MASTER_PORT      port that is free on machine 0, where all meet; on one machine by default any that is free
#   LATHE_INTERFACE  network interface between the machines; default: the one that leads to MASTER_ADDR
#   OMP_NUM_THREADS  CPU threads of each rank; default: cores that it may use / ranks
#   PYTHON           interpreter that has Lathe; default: python
#   LATHE_REQUEUE_FILE  written on machine 0 where the run was asked to stop and wants to be started again
#
# SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 at any of the machines go on to the ranks, which all save and leave: see
# docs/operations.md; docs/several-machines.md says how to start on several.

refuse() {
  printf 'error: %s\n  %s\n' "$1" "$2" >&2
  exit "${3:-2}"
}

# Usage: the comment at the head of the script, and the one above.
if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^[^#]/s/^#\( \{0,1\}\|$\)//p' "$0"
  sed -n '4,/^$/s/^#\( \{0,1\}\|$\)//p' "${BASH_SOURCE[0]}"
  exit $(($# < 1 ? 2 : 0))
fi

[[ $(pwd -P 2>/dev/null) == /* ]] || refuse 'the current folder is not there any more' 'go to one that is: cd ~' 5

python=${PYTHON:-python}

[[ ${NPROC:-1} =~ ^[1-9][0-9]{0,3}$ ]] || refuse "NPROC=$NPROC is not a number of ranks" 'set NPROC=2, or leave it out'
export NODES=${NODES:-1} NODE_RANK=${NODE_RANK:-0}
[[ $NODES =~ ^[1-9][0-9]{0,4}$ ]] || refuse "NODES=$NODES is not a number of machines" 'set NODES=2, or leave it out for one'
[[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,4})$ ]] ||
  refuse "NODE_RANK=$NODE_RANK is not the number of a machine" "set NODE_RANK=0 to $((NODES - 1)), another one on each"
((NODE_RANK < NODES)) ||
  refuse "NODE_RANK=$NODE_RANK, but machines are counted from 0 to NODES - 1 = $((NODES - 1))" \
    'set NODES to their number, and another NODE_RANK on each'
if ((NODES > 1)); then
  [[ -n ${MASTER_ADDR:-} ]] ||
    refuse "NODES=$NODES needs MASTER_ADDR" 'set it to the name or address of machine 0, the same on all'
  [[ -n ${MASTER_PORT:-} ]] ||
    refuse "NODES=$NODES needs MASTER_PORT" 'set it to a port that is free on machine 0 (29500), the same on all'
  MASTER_ADDR=${MASTER_ADDR#[} MASTER_ADDR=${MASTER_ADDR%]}
  [[ $MASTER_ADDR =~ ^[[:alnum:]_.:][[:alnum:]_.:%-]*$ ]] ||
    refuse "MASTER_ADDR=$MASTER_ADDR is no name or address of a machine" 'give it as node0, 10.0.0.1 or fd00::1'
else
  MASTER_ADDR=127.0.0.1
fi
if [[ -n ${MASTER_PORT:-} ]] && { [[ ! $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((MASTER_PORT > 65535)); }; then
  refuse "MASTER_PORT=$MASTER_PORT is no port" 'set a number from 1024 to 65535, such as 29500'
fi

command -v "$python" >/dev/null ||
  refuse "PYTHON=$python is no program here" 'set PYTHON to the interpreter that has Lathe, alone' 5
"$python" -c 'import importlib.util; raise SystemExit(importlib.util.find_spec("pipeline.cli") is None)' 2>/dev/null ||
  refuse "PYTHON=$python has no Lathe" 'set PYTHON to the interpreter that has it, or install it there' 5
# A mistake in the run file is told once, before any rank starts.
"$python" -m pipeline config "$@" >/dev/null

gpus=0
if compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
if ((gpus == 0)); then
  export DS_ACCELERATOR=cpu
fi
ranks=${NPROC:-$((gpus > 0 ? gpus : 2))}
if [[ -z ${MASTER_PORT:-} ]]; then
  MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
fi
export MASTER_ADDR MASTER_PORT
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$("$python" -c 'from pipeline.cores import available_cores; print(available_cores())')
  OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi
export OMP_NUM_THREADS
