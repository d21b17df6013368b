#!/usr/bin/env bash
# Trains the study's arenas for a GPU on a machine without network, within about MINUTES + 1 minutes.
#   make gpu-kit                                        where there is a network, and data/cifar10
#   bash lab/gpu_study.sh OUT_FOLDER MINUTES [OPTION...]   on the machine; options of `python -m lab.side_by_side`
#   tar -xzf OUT_FOLDER/runs.tar.gz -C lab/results/study/runs   back home, then python -m lab.study --pages --readme README.md
# All results lie in the one file runs.tar.gz, which is renewed every 20 seconds, so that a stop loses unfinished runs alone.
set -uo pipefail
out=$(realpath -m "$1") minutes=$2
shift 2
source "$(dirname "$0")/gpu_setup.sh"
if [ -f .gpu_kit/cifar10.tar.xz ] && [ ! -d data/cifar10 ]; then
    "$python" -m tarfile -e .gpu_kit/cifar10.tar.xz data || exit 1
fi

runs=$site/runs
mkdir -p "$runs"
pack() { tar -czf "$site/runs.tar.gz" --exclude='*.partial' -C "$runs" . && mv "$site/runs.tar.gz" "$out/runs.tar.gz"; }
"$python" -m lab.side_by_side --out "$runs" --minutes "$minutes" "$@" > >(tee "$out/study.log") 2>&1 &
training=$!
trap 'kill $training 2> /dev/null' EXIT # bash starts it deaf to Ctrl-C
while sleep 20 && kill -0 $training 2> /dev/null; do pack; done
wait $training
ended=$?
pack
exit $ended
