# make demo     90 s on two cores: real images cached, a real teacher distilled, a table and a report
# make test     lint and all tests (set up the same way)
# make gpu      on a machine with CUDA: its tests, then nine minutes of measurements into gpu.json and a table (docs/gpu.md)
# make schemas  after a change of distillery/config/keys_*.py: schemas/, the YAML files' comments, docs/configuration.md
# make pictures RUN=DIR   docs/pca.png from that run folder, docs/report.png from the demo's (needs Chromium)
# All make .venv and install requirements on the first call. PYTHON chooses the interpreter, VENV the folder.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := examples/demo
DEMO_CONFIG := --data_config $(DEMO)/data_config.yaml --train_config $(DEMO)/train_config_kd.yaml --model_config $(DEMO)/model_config_kd.yaml

.PHONY: install schemas pictures test test-slurm test-filesystems lint demo gpu soak clean

install: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@

demo: install
	$(BIN)/python $(DEMO)/make_data.py $(DEMO)/out/data
	$(BIN)/python precompute_cache.py --data_config $(DEMO)/data_config.yaml
	$(BIN)/python distill_trainer.py $(DEMO_CONFIG)

schemas: install
	$(BIN)/python -m distillery.config.generate

pictures: install
	$(BIN)/python -m benchmarks.pictures --pca $(RUN) --report $(DEMO)/out/run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# these fork the process they run in, which torch allows only before its first backward pass: one process for each file,
# those that take longest first
FORKING := tests/system/test_distributed.py $(wildcard tests/faults/test_training_*.py) tests/test_teacher_trainer.py \
           tests/test_encoded_trainer.py tests/test_embed.py

# tests/conftest.py puts the files that take longest first, which xdist must not undo
test: install lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(FORKING:%=--ignore=%)
	printf '%s\n' $(FORKING) | xargs -P 2 -n 1 $(BIN)/python -m pytest

# without CUDA the tests marked gpu are skipped, and the benchmark says that there is nothing to measure; a test that
# fails does not keep the others from running
gpu: install
	status=0; \
	$(BIN)/python -m pytest -m gpu -rs || status=1; \
	$(BIN)/python -m pytest tests/gpu || status=1; \
	$(BIN)/python -m benchmarks.gpu --minutes 9 --out gpu.json || status=1; \
	exit $$status

# hours of bad luck at ten times the scale of make test: kills, flipped bits, full disks, writers stopped and killed beside each other;
# the seed is printed, FAULTS_SEED repeats it, FAULTS_SCALE=100 goes on for the night
soak: install
	FAULTS_SCALE=$${FAULTS_SCALE:-10} FAULTS_SEED=$${FAULTS_SEED:-$$(date +%s)} $(BIN)/python -m pytest tests/faults --durations=10

# the batch scripts under slurm/ on a real Slurm of one node, which is installed where it is missing: as root, on Debian
# or Ubuntu, some three minutes; anywhere else it says why not
test-slurm: install
	TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm -rs --durations=0

# both commands on XFS and btrfs in a file and on sshfs from this machine, mounted for the test: as root, on Debian or
# Ubuntu, some minutes; programs that are missing are installed; anywhere else it says why not
test-filesystems: install
	TEST_FILESYSTEMS=1 $(BIN)/python -m pytest tests/filesystems -rs --durations=0

clean:
	rm -rf $(DEMO)/out .pytest_cache .ruff_cache
