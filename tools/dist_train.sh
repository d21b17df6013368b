#!/usr/bin/env bash
# Usage: bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# More machines: NNODES, NODE_RANK, MASTER_ADDR and PORT, the same way on each.
exec bash "$(dirname "$0")/_dist.sh" train.py "$@"
