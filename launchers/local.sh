#!/usr/bin/env bash
# Train on this machine alone, whatever a scheduler has left in the environment; NPROC ranks, as launchers/accelerate.sh.
#
#   launchers/local.sh CONFIG [FIELD=VALUE ...]
set -euo pipefail
unset NODES NODE_RANK MASTER_ADDR MASTER_PORT
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/accelerate.sh" "$@"
