PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready-docs

.DEFAULT_GOAL := help
.PHONY: help demo demo-fsdp2 examples test crash check docs clean

help:  ## Show these lines.
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## Pretrain a small GPT, merge, and compare. ARGS=--decay-branch adds the learning-rate decay.
	$(BIN)/python examples/demo.py $(ARGS)

demo-fsdp2: $(READY)  ## Pretrain a smaller GPT, sharded over two processes.
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain_gpt.py fit --config examples/pretrain_gpt_fsdp2.yaml

examples: $(READY)  ## Run the examples beyond language models, a minute or two each: images, diffusion, a GAN, an encoder, speech.
	for task in classify_digits diffuse_digits gan_digits masked_encoder spoken_words; do \
		$(BIN)/python examples/$$task.py || exit 1; \
	done

test: $(READY)  ## Run the test suite. ARGS="-k buffer" picks a part of it.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

crash: $(READY)  ## Kill runs at more than 200 points, single ones and one of two ranks, and write docs/crashes.json (half an hour).
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash --points 204 --again 0.7 --rank-points 22 --stops 2 --out docs/crashes.json

check: $(READY)  ## Format, lint, types, layers, public names, and the examples in docstrings.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet lightning_ckmerge tests/test_house.py tests/test_public_names.py

docs: $(READY_DOCS)  ## Build the documentation into site/; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:  ## Remove the virtual environment, the caches and the built documentation.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Installed again only when a requirement changed.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[adapters,cli,examples,test,dev,loggers,referees]'
	touch $@

# On its own, so that tests need no MkDocs.
$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[cli,docs]'
	touch $@
