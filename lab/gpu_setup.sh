# Sourced by the scripts for a machine that has a GPU and no network: what `make gpu-kit` collected is installed beside what
# the machine has. ENC_COMMIT names the commit if .git does not travel.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
site=$(mktemp -d) python=${PYTHON:-python3}
mkdir -p "$out"
if compgen -G ".gpu_kit/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu_kit/*.whl || exit 1
    [ -n "${ENC_COMMIT:-}" ] || ENC_COMMIT=$(cat .gpu_kit/COMMIT)
fi
export ENC_COMMIT=${ENC_COMMIT:-} PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/gpu.txt" 2>&1
"$python" -m pip list > "$out/packages.txt" 2> /dev/null
