#!/usr/bin/env bash
# Train on the machines of a DeepSpeed hostfile (a line for each: NAME slots=RANKS).
#
#   HOSTFILE=FILE launchers/deepspeed.sh CONFIG [FIELD=VALUE ...]
#
# With NODE_RANK it starts the ranks of one machine, and has to be started on each, by hand or by a scheduler. Without,
# DeepSpeed's runner starts those of all machines, by pdsh and ssh that ask for no password; Lathe, the run file and this
# folder must be at the same places everywhere. LAUNCHER names another way (openmpi, mpich, impi, slurm, mvapich).
# To stop what the runner has started, signal one of its ranks; variables for them stand in .deepspeed_env.
#
# From the environment, but NPROC and NODES are the hostfile's, MASTER_ADDR is its first machine where it is not set, and
# MASTER_PORT 29500:
set -euo pipefail
if [[ $# -gt 0 && $1 != -h && $1 != --help ]]; then
  if [[ ! -f ${HOSTFILE:-} || ! -r $HOSTFILE ]]; then
    printf 'error: HOSTFILE=%s is no file that can be read\n  a line for each machine: NAME slots=RANKS\n' "${HOSTFILE:-}" >&2
    exit 2
  fi
  mapfile -t machines < <(grep -vE '^[[:space:]]*(#|$)' "$HOSTFILE")
  if ((${#machines[@]} == 0)); then
    printf 'error: HOSTFILE=%s names no machine\n  a line for each machine: NAME slots=RANKS\n' "$HOSTFILE" >&2
    exit 2
  fi
  by_runner=0
  if ((${#machines[@]} > 1)) && [[ -z ${NODE_RANK:-} ]]; then
    by_runner=1
  fi
  read -r first _ <<<"${machines[0]}"
  NODES=${#machines[@]} MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-29500} NPROC=''
  if [[ ${NODE_RANK:-0} =~ ^[0-9]{1,5}$ && ${machines[10#${NODE_RANK:-0}]:-} =~ slots=([0-9]+) ]]; then
    NPROC=${BASH_REMATCH[1]}
  fi
fi
# shellcheck source=launchers/environment.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/environment.sh"

if ((! by_runner)); then
  exec "$python" -m pipeline.runtime.launch deepspeed "$HOSTFILE" pipeline train "$@"
fi
# The runner puts these into the command line of a shell on each machine.
for word in "$PWD" "$python" "$@"; do
  [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] ||
    refuse "$word: DeepSpeed gives it to a shell on each machine, which would change it" \
      'put the value into the run file, or start each machine with its NODE_RANK'
done
exec "$python" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --launcher "${LAUNCHER:-pdsh}" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_local_rank --module pipeline train "$@"
