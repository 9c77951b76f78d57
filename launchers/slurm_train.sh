#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
# Train on the nodes of a SLURM job, and start again where that helps: see docs/operations.md.
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=96 launchers/slurm_train.sh CONFIG [FIELD=VALUE ...]
#
# From the environment:
#   NPROC               ranks of a node; default: its GPUs, or 2
#   PYTHON              interpreter that has Lathe; default: python
#   MASTER_ADDR         where the ranks meet; default: the job's first node
#   MASTER_PORT         port they meet at; default: made of the job's id and how often it was started
#   LATHE_INTERFACE     network interface; default: the one that routes to MASTER_ADDR
#   LATHE_RETRIES       starts in a row after failures that brought no newer checkpoint; default: 3
#   LATHE_REQUEUE_FILE  default: lathe-JOB.requeue.json in the job's folder, which all nodes see
#   LATHE_SRUN_OPTIONS  more options of srun, one a line; such as those of containers
#
# USR1 and TERM, sent to this script, ask the ranks to save and leave; then the job is requeued.
asked=''
trap 'asked=1' USR1 TERM
set -euo pipefail

# SLURM runs a copy of this script, which has nothing beside it.
step=$(dirname "${BASH_SOURCE[0]}")/slurm_step.sh
find='from pipeline.runfile import bundled; print(bundled("launchers/slurm_step.sh"))'
[[ -e $step ]] || step=$("${PYTHON:-python}" -c "$find") || {
  printf 'error: %s has no Lathe\n  set PYTHON to the interpreter that has it\n' "${PYTHON:-python}" >&2
  exit 5
}
LATHE_LAUNCHERS=$(cd "$(dirname "$step")" && pwd)
export LATHE_LAUNCHERS
# shellcheck source=launchers/slurm_step.sh
source "$step"

export NODES=${SLURM_JOB_NUM_NODES:-1}
export LATHE_REQUEUE_FILE=${LATHE_REQUEUE_FILE:-$PWD/lathe-$job.requeue.json}
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# below the ports that systems give out by themselves; another one for each start, since the last may be in use still
export MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 20000))}
rm -f "$LATHE_REQUEUE_FILE"

# In a container the launcher lies elsewhere; where the interpreter alone is in one (Apptainer), it is not to be seen.
read -r -d '' node <<'NODE' || true
launcher=$("$PYTHON" -c 'from pipeline.runfile import bundled; print(bundled("launchers/accelerate.sh"))') || {
  code=$?
  exit $((code > 128 ? code : 5)) # ended by a signal, it lacks nothing
}
[[ -e $launcher ]] || launcher=$LATHE_LAUNCHERS/accelerate.sh
NODE_RANK=$SLURM_NODEID exec bash "$launcher" "$@"
NODE
run_step --ntasks="$NODES" --ntasks-per-node=1 bash -c "$node" lathe "$@"
# Killed by what it was sent, it had nothing to save yet, and no requeue file says so.
((code != 138 && code != 143)) || [[ -z $asked ]] || set -- --asked "$@"
end_job pipeline.train.attempts "$@"
