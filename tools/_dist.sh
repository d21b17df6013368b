#!/usr/bin/env bash
# Used by dist_train.sh and dist_test.sh. Arguments: TOOL CONFIG PROCESSES [arguments of the tool]
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash tools/dist_train.sh CONFIG PROCESSES [arguments]" >&2
    echo "       bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments]" >&2
    exit 2
fi
tool=$1 config=$2 processes=$3
here=$(cd "$(dirname "$0")" && pwd)

# torchrun's default is one thread per process; share the cores instead.
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONPATH="$here/..:${PYTHONPATH:-}"

# Use the checkout's environment unless another one is active.
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
    PYTHON=$here/../.venv/bin/python
fi
exec "${PYTHON:-python}" "$here/_torchrun.py" \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$here/$tool" "$config" "${@:4}" --launcher pytorch
