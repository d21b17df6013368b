#!/usr/bin/env bash
# Usage: bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# For several machines, set NNODES, NODE_RANK, MASTER_ADDR and PORT and run the command on each of them.
exec bash "$(dirname "$0")/_dist.sh" train.py "$@"
