#!/usr/bin/env bash
# Runs the CUDA suite and the benchmark for a GPU on a machine without network, within about MINUTES + 5 minutes.
#   make gpu-kit                                  where there is a network: collects .gpu_kit, which travels with the checkout
#   bash lab/gpu_check.sh OUT_FOLDER [MINUTES]    on the machine: every step writes to OUT_FOLDER at once; MINUTES (6) of bench
set -uo pipefail
out=$(realpath -m "$1") minutes=${2:-6}
source "$(dirname "$0")/gpu_setup.sh"

# Several processes share the GPU: most of a short run is Python.
timeout --signal=INT 270 "$python" -m pytest -rfs --tb=short --durations=15 -p no:cacheprovider -n 12 --dist worksteal tests/cuda 2>&1 |
    tee "$out/suite.log"
suite=$?
timeout --signal=INT $((minutes * 60 + 90)) "$python" -m lab.bench --only gpu --minutes "$minutes" --results "$out/bench" 2>&1 |
    tee "$out/bench.log"
exit $((suite || $?))
