# make train    from nothing to a trained classifier of handwritten digits, on any laptop
# make test     lint, types and the default tests
# make bench    the benchmarks that run on a CPU
# make lint     lint and types alone
# make format   let ruff mend what it can
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits-classification
STAMP := $(VENV)/.installed

.PHONY: train test test-slow lint format bench help

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (about 6 GB, most of it torch) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(STAMP)
	@$(BIN)/mirrorla fit --config digits/classification --run_dir $(RUN_DIR) --ckpt_path last

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: lint
	@$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.attention
	@$(BIN)/python -m benchmarks.loader
