#!/usr/bin/env bash
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
# Encode as the tasks of a SLURM array, each a worker with its share, which starts again where that helps.
#
#   sbatch --array=0-15 --gpus=1 launchers/slurm_encode.sh CONFIG [FIELD=VALUE ...]
#
# From the environment:
#   PYTHON              interpreter that has Lathe; default: python
#   LATHE_RETRIES       starts of a task in a row after failures that brought no shard; default: 3
#   LATHE_SRUN_OPTIONS  more options of srun, one a line; such as those of containers
#
# USR1 and TERM, sent to this script, stop the worker at once; then the task is requeued: see docs/operations.md.
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
# shellcheck source=launchers/slurm_step.sh
source "$step"

run_step --ntasks=1 "$PYTHON" -m pipeline encode "$@"
# A worker leaves nothing that another start does not find, however it ended.
((code <= 128)) || [[ -z $asked ]] || set -- --asked "$@"
end_job pipeline.encode.attempts "$@"
