# Needs make and Python 3.11 or newer; everything else is installed into .venv on first use.
PYTHON  ?= python3
VENV    ?= .venv
TESTS   ?= tests
SEED    ?= 1
MINUTES ?= 240
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
SPEED   := throughput serving slicing latency_predictor sparse_attention data_preparation memory
TORCH   := $(shell grep '^torch==' constraints.txt)
EXTRAS  := dev,onnx,cluster,dedup,wikipedia,sweeps
PIP     := $(BIN)/python -m pip --no-input --disable-pip-version-check install --progress-bar off -c constraints.txt
LOG     := $(VENV)/pip.log
PYTEST  := $(BIN)/python -m pytest --quiet -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help quickstart test check lint torture bench docs install clean

help: ## This list
	@echo "frugalbert: from a corpus to a deployed encoder. The first command installs into $(VENV) (some minutes)."
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Another Python: make test PYTHON=python3.12"

quickstart: $(STAMP) ## Real text to a trained, fine-tuned, exported encoder and a report (about 15 minutes on 2 cores)
	@$(BIN)/frugalbert run configs/quickstart.yaml

test: lint ## Lint, types and all tests: exactly what CI runs
	@$(PYTEST) $(if $(filter tests,$(TESTS)),--faults) $(TESTS)

check: test ## The same under its other name

lint: $(STAMP) ## ruff, its formatter and pyright alone
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

torture: $(STAMP) ## Faults, damage and hostile input at length, to docs/reliability.md: make torture SEED=1 MINUTES=60
	@$(PIP) -e '.[fuzz]' >> $(LOG) 2>&1 || echo "atheris cannot be installed here: coverage-guided fuzzing is left out"
	@$(PYTEST) --dist worksteal -m "slow or fault" --torture $(SEED) --hypothesis-seed $(SEED) --minutes $(MINUTES) \
	  --faults --faults-json benchmarks/results/reliability.json $(TESTS); \
	  status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench: $(STAMP) ## The speed figures of the README, to benchmarks/results (hours; on an idle machine)
	@set -e; for name in $(SPEED); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

docs: $(STAMP) ## Write docs/config.md from the configuration, the tables of docs from benchmarks/results
	@$(BIN)/python benchmarks/config_page.py
	@$(BIN)/python benchmarks/tables.py

install: $(STAMP) ## Only the environment

clean: ## Remove the environment (runs stay)
	@rm -rf $(VENV)

# torch goes first and alone: a bare range would replace the CPU build that is at hand by the newest CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "frugalbert needs Python 3.11 or newer, and $(PYTHON) is not; write for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make environments; install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV): $(TORCH)"
	@$(PIP) $(TORCH) > $(LOG) 2>&1 || { tail -n 15 $(LOG); echo "the installation failed; $(LOG) has the details" >&2; exit 1; }
	@echo "installing into $(VENV): frugalbert[$(EXTRAS)] with the versions of constraints.txt"
	@$(PIP) -e '.[$(EXTRAS)]' >> $(LOG) 2>&1 || { tail -n 15 $(LOG); echo "the installation failed; $(LOG) has the details" >&2; exit 1; }
	@touch $(STAMP)
	@echo "installed; 'make help' lists what can be done, '$(BIN)/frugalbert --help' what the program can"
