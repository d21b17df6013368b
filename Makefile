PYTHON ?= $(shell command -v python3.11 || command -v python3)
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads that spin slow every other process down; passive waiting costs nothing.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

# Environments of test-compat, 6 GB each.
OLDEST_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
COMPAT := oldest onedl

.PHONY: setup demo test test-crash test-slow test-matrix test-architectures test-long test-cuda test-compat test-ecosystem lint bench gpu-kit study zoo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements/peers.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[lite,dev]'
	$(BIN)/pip install --quiet --no-deps -r requirements/peers.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

# Kills training runs and resumes them, KILLS times (30) for each number of data loading workers.
test-crash: $(STAMP)
	$(BIN)/python -m pytest -m crash tests/crash

# Tests that are marked slow; those of Weights & Biases, MLflow and mim skip here (test-ecosystem).
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -rs -m "slow and not architectures"

test-matrix: $(STAMP)
	$(BIN)/python -m pytest -m "not long" tests/engine/test_composition.py

# What ENC promises of any network, on a hundred architectures; tests/architectures/print_table.py prints it as a table.
test-architectures: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m "architectures or not architectures" tests/architectures

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests/test_long_training.py

# What a CUDA device computes and how training runs on it; where there is none, every test skips and says so.
test-cuda: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -rs tests/cuda

# The suite on the oldest versions that pyproject.toml admits, and on the maintained forks of the OpenMMLab stack.
test-compat: $(COMPAT:%=test-%)

test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -p no:cacheprovider

.venv-oldest/.installed: pyproject.toml requirements/compat-oldest.txt requirements/peers.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet -c requirements/compat-oldest.txt -e '.[lite,dev]'
	.venv-oldest/bin/pip install --quiet --no-deps -r requirements/peers.txt
	touch $@

.venv-onedl/.installed: pyproject.toml constraints.txt requirements/compat-onedl.txt requirements/peers.txt
	$(PYTHON) -m venv .venv-onedl
	grep -vE '^(mmengine|mmpretrain|mmcv-lite)==' constraints.txt > .venv-onedl/constraints.txt
	.venv-onedl/bin/pip install --quiet -c .venv-onedl/constraints.txt -c requirements/compat-onedl.txt -e '.[onedl,dev]'
	.venv-onedl/bin/pip install --quiet --no-deps -r requirements/peers.txt
	touch $@

# The slow tests, and those of Weights & Biases, MLflow and mim, in an environment of their own on top of .venv: what these
# require does not fit constraints.txt.
test-ecosystem: $(STAMP)
	$(BIN)/python -m venv .venv-ecosystem
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > "$$(.venv-ecosystem/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	.venv-ecosystem/bin/pip install --quiet -r requirements/ecosystem.txt
	.venv-ecosystem/bin/pip install --quiet --no-deps openmim==0.3.9
	PYTHONPATH=. .venv-ecosystem/bin/python -m pytest -rs -m "slow or not slow" tests/test_visualizers.py tests/test_package.py \
	    tests/test_doctor.py tests/test_start.py tests/test_readme.py

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m lab.bench

study: $(STAMP)
	$(BIN)/python -m lab.study

# Sizes of the configs' networks, measured and written into the READMEs of configs/.
zoo: $(STAMP)
	$(BIN)/python -m lab.zoo

# Collects what lab/gpu_check.sh and lab/gpu_study.sh need on a machine with a GPU and without network, about 25 MB. Pictures
# are the same, file by file: they share most of their headers, so that together they compress to a third.
gpu-kit: $(STAMP)
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest .gpu_kit \
	    -c constraints.txt -r requirements/gpu-kit.txt
	git rev-parse HEAD > .gpu_kit/COMMIT
	test -d data/cifar10 || { echo "gpu-kit: lab/gpu_study.sh needs data/cifar10 as well: tools/prepare_cifar10.py"; exit 1; }
	tar --sort=name --owner=0 --group=0 -C data -cJf .gpu_kit/cifar10.tar.xz cifar10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(COMPAT:%=.venv-%) .venv-ecosystem build dist work_dirs
