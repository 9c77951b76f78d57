#!/usr/bin/env bash
# Train by accelerate, one rank per GPU, or without GPUs two CPU ranks: on one machine, or on several where it is
# started once on each, by hand or by a scheduler.
#
#   launchers/accelerate.sh CONFIG [FIELD=VALUE ...]
#
# From the environment:
set -euo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/environment.sh"

# `accelerate launch`, through a wrapper that keeps the ranks' exit code. An elastic rendezvous would change the number
# of ranks without a word; here all nodes come, or none starts.
exec "$python" -m pipeline.runtime.launch accelerate \
  --use_deepspeed --deepspeed_multinode_launcher standard --rdzv_backend static --same_network \
  --num_processes "$((NODES * ranks))" --num_machines "$NODES" --machine_rank "$NODE_RANK" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  --mixed_precision no --dynamo_backend no \
  -m pipeline train "$@"
