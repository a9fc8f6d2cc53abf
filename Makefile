# Every target makes its own environment first: `make test` is all a fresh clone needs.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install vqa retrieval test lint format floors clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## make .venv with the versions of constraints.txt

# The stamp is the last step, so a broken install is tried again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

.venv-floor/.installed: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv --clear .venv-floor
	.venv-floor/bin/python -m pip install -q -c constraints-floor.txt -e '.[dev]'
	@touch $@

vqa: .venv/.installed  ## question answering: make vqa ARGS="--do_train --output_dir outputs/vqa"
	$(BIN)/python run_vqa.py $(ARGS)

retrieval: .venv/.installed  ## image-text retrieval: make retrieval ARGS="..."
	$(BIN)/python run_retrieval.py $(ARGS)

# Small models run fastest on one thread, and no test may need the network or a screen.
test floors: export OMP_NUM_THREADS = 1
test floors: export HF_HUB_OFFLINE = 1
test floors: export HF_DATASETS_OFFLINE = 1
test floors: export TOKENIZERS_PARALLELISM = false
test floors: export MPLBACKEND = Agg

test: .venv/.installed  ## run the tests: make test ARGS="-k retrieval"
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.installed  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed  ## mend style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

floors: .venv-floor/.installed  ## run the tests on the lowest versions that pyproject.toml allows
	.venv-floor/bin/python -m pytest $(ARGS)

clean:  ## remove environments, builds and caches; outputs/ stays
	rm -rf .venv .venv-floor build hivilt.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
