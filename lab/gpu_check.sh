#!/usr/bin/env bash
# Runs the CUDA suite and the benchmark for a GPU on a machine without network, within about MINUTES + 5 minutes.
#   make gpu-kit                                  where there is a network: collects .gpu_kit, which travels with the checkout
#   bash lab/gpu_check.sh OUT_FOLDER [MINUTES]    on the machine: every step writes to OUT_FOLDER at once; MINUTES (6) of bench
# ENC_COMMIT names the commit if .git does not travel.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1 minutes=${2:-6} site=$(mktemp -d) python=${PYTHON:-python3}
mkdir -p "$out"
if compgen -G ".gpu_kit/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu_kit/*.whl || exit 1
    [ -n "${ENC_COMMIT:-}" ] || ENC_COMMIT=$(cat .gpu_kit/COMMIT)
fi
export ENC_COMMIT=${ENC_COMMIT:-} PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/gpu.txt" 2>&1
"$python" -m pip list > "$out/packages.txt" 2> /dev/null

# Several processes share the GPU: most of a short run is Python.
timeout --signal=INT 270 "$python" -m pytest -rs --durations=15 -p no:cacheprovider -n 8 tests/cuda 2>&1 |
    tee "$out/suite.log"
suite=$?
timeout --signal=INT $((minutes * 60 + 90)) "$python" -m lab.bench --only gpu --minutes "$minutes" --results "$out/bench" 2>&1 |
    tee "$out/bench.log"
exit $((suite || $?))
