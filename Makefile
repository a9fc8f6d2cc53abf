# Every target makes its own environment first: `make test` is all a fresh clone needs.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install vqa retrieval grounding reasoning weights app test test-all stress browser versions lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## make .venv with the versions of constraints.txt

# The stamp is the last step, so a broken install is tried again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.browser: .venv/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,browser]'
	@touch $@

vqa: .venv/.installed  ## question answering: make vqa ARGS="--do_train --output_dir outputs/vqa"
	$(BIN)/python run_vqa.py $(ARGS)

retrieval: .venv/.installed  ## image-text retrieval: make retrieval ARGS="..."
	$(BIN)/python run_retrieval.py $(ARGS)

grounding: .venv/.installed  ## boxes of what a text means: make grounding ARGS="--train_file train.jsonl"
	$(BIN)/python run_grounding.py $(ARGS)

reasoning: .venv/.installed  ## statements about several images: make reasoning ARGS="--train_file train.jsonl"
	$(BIN)/python run_reasoning.py $(ARGS)

CHECKPOINT := config.json model.safetensors processor_config.json tokenizer.json tokenizer_config.json results.json

# Of the runs of benchmarks/photographs.py the best on validation.
BEST := outputs/photographs/flickr8k-fusion-1

weights: .venv/.installed  ## make what benchmarks/photographs.py, captions.py, `make vqa`, `make grounding` and `make reasoning` left the models of this folder
	cp $(addprefix $(BEST)/,$(CHECKPOINT)) .
	$(BIN)/python runs/halve.py .
	sed -i 's/"contrastive_loss_weight": 0.0/"contrastive_loss_weight": 1.0/' config.json  # who trains it further trains embeddings, too
	cp $(addprefix outputs/vqa/,$(CHECKPOINT)) vqa
	cp $(addprefix outputs/captions/rewards/,$(CHECKPOINT) generation_config.json) captioning
	$(BIN)/python runs/halve.py captioning
	cp $(addprefix outputs/grounding/,$(CHECKPOINT)) grounding
	cp $(addprefix outputs/reasoning/,$(CHECKPOINT)) reasoning
	chmod 644 *.safetensors */*.safetensors

# A file is tested by one of two processes, so that its fixtures are made once, in the order of tests/conftest.py;
# ARGS="-n 0" tests all in this one.
test test-all versions: export PYTEST_ADDOPTS = -n 2 --dist loadfile --no-loadscope-reorder --durations 10 --max-worker-restart 0

app: .venv/.installed  ## a page to try it, in the browser: make app ARGS="--model outputs/vqa"
	$(BIN)/python app.py $(ARGS)

test: .venv/.installed  ## run the tests: make test ARGS="-k retrieval"
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/.installed  ## those that take long, too, and random examples, others in every run
	$(BIN)/python -m pytest --hypothesis-profile random $(ARGS)

stress: .venv/.installed  ## the long tests of what can go wrong, about ten minutes: kills, bad images, memory
	$(BIN)/python -m pytest tests/stress $(ARGS)

browser: .venv/.browser  ## test that page in Debian's Chromium (packages chromium and chromium-driver)
	$(BIN)/python -m pytest tests/browser $(ARGS)

lint: .venv/.installed  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed  ## mend style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

versions:  ## run the tests on the lowest and the newest versions that pyproject.toml allows
	PYTHON=$(PYTHON) .ci/versions $(ARGS)

clean:  ## remove environments, builds and caches; outputs/ stays
	rm -rf .venv .venv-newest .venv-lowest .venv-crossed .venv-refused build hivilt.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
