# make train    from nothing to a trained classifier of handwritten digits, on any laptop;
#               TASK=detection or TASK=segmentation then goes on to scenes of them, from its backbone
# make rehearse a SLURM job's whole life on this machine: submit, preempt, queue again, resume, finish
# make test     lint, types and the default tests
# make results  README's tables and figures anew from benchmarks/results
# make results-run    the benchmarks again on this CPU, in 48 minutes on two cores, and then make results
# make fashion-mnist  fetch and pack Fashion-MNIST into data/, from Debian's archive
# make lint     lint and types alone
# make format   let ruff mend what it can
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TASK ?= classification
CLASSIFIER := runs/digits-classification
RUN_DIR ?= runs/digits-$(TASK)
STAMP := $(VENV)/.installed
SLURM := slurmctld slurmd slurm-client munge
INSTALL_SLURM := apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(SLURM)

.PHONY: train rehearse slurm test test-slow lint format results results-run fashion-mnist help

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
ifneq ($(TASK),classification)
	@test -e $(CLASSIFIER)/checkpoints/LATEST || $(MAKE) --no-print-directory train TASK=classification RUN_DIR=$(CLASSIFIER)
	@$(BIN)/mirrorla fit --config digits/$(TASK) --run_dir $(RUN_DIR) --ckpt_path last --model.backbone.pretrained $(CLASSIFIER)
else
	@$(BIN)/mirrorla fit --config digits/$(TASK) --run_dir $(RUN_DIR) --ckpt_path last
endif

# A real SLURM for tests and rehearsals. The system's services stay as they are: a private cluster starts its own.
slurm:
	@PATH="$$PATH:/usr/sbin:/sbin"; exec > /dev/null; command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged && exit 0; \
		echo "installing $(SLURM) ..." >&2; \
		if [ "$$(id -u)" = 0 ]; then sh -c '$(INSTALL_SLURM)'; else sudo -n sh -c '$(INSTALL_SLURM)'; fi \
		|| { echo "SLURM is needed and could not be installed; as root: apt-get install $(SLURM)" >&2; exit 2; }

rehearse: $(STAMP) slurm
	@$(BIN)/mirrorla rehearse

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: lint slurm
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: lint slurm
	@$(BIN)/python -m pytest -m "slow and not gpu"

results: $(STAMP)
	@$(BIN)/python -m benchmarks.tables

results-run: $(STAMP)
	@$(BIN)/mirrorla bench attention
	@$(BIN)/mirrorla bench attention --over tokens
	@$(BIN)/mirrorla bench backbone
	@$(BIN)/python -m benchmarks.backbone_profile
	@$(BIN)/mirrorla bench loader
	@$(BIN)/mirrorla bench checkpoint
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.maps counting
	@$(BIN)/python -m benchmarks.tables

fashion-mnist: $(STAMP)
	@$(BIN)/python -m benchmarks.fashion_mnist
