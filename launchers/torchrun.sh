#!/usr/bin/env bash
# Train by torchrun in place of accelerate, which need not be asked for anything here; all else is alike. NPROC may
# differ between machines.
#
#   launchers/torchrun.sh CONFIG [FIELD=VALUE ...]
#
# From the environment:
set -euo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/environment.sh"

exec "$python" -m pipeline.runtime.launch torchrun \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$ranks" \
  --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  -m pipeline train "$@"
