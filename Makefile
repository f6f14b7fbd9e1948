PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo demo-fsdp2 test check clean

help:  ## Show these lines.
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## Pretrain a small GPT, merge, and compare. ARGS=--decay-branch adds the learning-rate decay.
	$(BIN)/python examples/demo.py $(ARGS)

demo-fsdp2: $(READY)  ## Pretrain a smaller GPT, sharded over two processes.
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain_gpt.py fit --config examples/pretrain_gpt_fsdp2.yaml

test: $(READY)  ## Run the test suite. ARGS="-k buffer" picks a part of it.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## Format, lint, types, layers, public names, and the examples in docstrings.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet lightning_ckmerge tests/test_house.py tests/test_public_names.py

clean:  ## Remove the virtual environment and the caches.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Installed again only when a requirement changed.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[adapters,cli,test,dev,loggers]'
	touch $@
