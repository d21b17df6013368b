PYTHON ?= $(shell command -v python3.11 || command -v python3)
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads that spin slow every other process down; passive waiting costs nothing.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: setup demo test test-ecosystem lint bench clean

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

# The slow tests, and those of Weights & Biases, MLflow and mim, in an environment of their own on top of .venv: what these
# require does not fit constraints.txt.
test-ecosystem: $(STAMP)
	$(BIN)/python -m venv .venv-ecosystem
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > "$$(.venv-ecosystem/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
	.venv-ecosystem/bin/pip install --quiet -r requirements/ecosystem.txt
	.venv-ecosystem/bin/pip install --quiet --no-deps openmim==0.3.9
	PYTHONPATH=. .venv-ecosystem/bin/python -m pytest -rs -m "slow or not slow" tests/test_visualizers.py tests/test_mim.py \
	    tests/test_doctor.py tests/test_start.py tests/test_readme.py

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-ecosystem build dist work_dirs
