PYTHON ?= $(shell command -v python3.11 || command -v python3)
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads that spin slow every other process down; passive waiting costs nothing.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0

.PHONY: setup demo test test-crash test-matrix test-long lint bench clean

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

test-matrix: $(STAMP)
	$(BIN)/python -m pytest -m "not long" tests/engine/test_composition.py

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests/test_long_training.py

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist work_dirs
