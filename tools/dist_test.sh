#!/usr/bin/env bash
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
config=${1:-} checkpoint=${2:-} processes=${3:-}
exec bash "$(dirname "$0")/_dist.sh" test.py "$config" "$processes" "$checkpoint" "${@:4}"
