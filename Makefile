PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready-docs
OLDEST ?= python3.10
NEWEST ?= python3.13
# Environments of other packages, a gigabyte or two each.
CLIENTS ?= .cache/clients
# What meets Lightning, torch, Optuna and the other dependencies.
VERSION_TESTS := tests/plugin/test_private_names.py tests/plugin/test_lifecycle.py tests/plugin/test_bitwise.py \
	tests/plugin/test_resume.py tests/plugin/test_leftovers.py tests/search tests/artifact tests/buffer \
	tests/checkpoints tests/cli/test_verify.py tests/cli/test_merge.py tests/fuzz tests/test_public_names.py

LIGHTNING ?= .cache/lightning
# 2.6.6 has no tag; its package differs from 2.6.5 in one file.
LIGHTNING_TAG ?= 2.6.5

.DEFAULT_GOAL := help
.PHONY: help demo demo-follow demo-fsdp2 examples test test-oldest test-newest crash fuzz soak determinism clients lightning-suite release-check check docs clean

help:  ## Show these lines.
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## Pretrain a small GPT, merge, and compare. ARGS=--decay-branch adds the learning-rate decay.
	$(BIN)/python examples/demo.py $(ARGS)

demo-follow: $(READY)  ## The same with followers, which search in processes of their own; its table is the same.
	$(BIN)/python examples/demo.py --follow $(ARGS)

demo-fsdp2: $(READY)  ## Pretrain a smaller GPT, sharded over two processes.
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrain_gpt.py fit --config examples/pretrain_gpt_fsdp2.yaml

examples: $(READY)  ## Run the examples beyond language models, a minute or two each: images, diffusion, a GAN, an encoder, speech.
	for task in classify_digits diffuse_digits gan_digits masked_encoder spoken_words; do \
		$(BIN)/python examples/$$task.py || exit 1; \
	done

test: $(READY)  ## Run the test suite. ARGS="-k buffer" picks a part of it.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-oldest: .venv-oldest/.ready  ## The tests that meet other packages, on the oldest Python and releases that pyproject.toml allows.
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -W default $(VERSION_TESTS) $(ARGS)

test-newest: .venv-newest/.ready  ## The same on the newest.
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -W default $(VERSION_TESTS) $(ARGS)

fuzz: $(READY)  ## Fuzz the readers: by atheris, 10 million headers and 200,000 manifests, and longer by hypothesis.
	$(BIN)/python -m pip install --quiet atheris==3.1.0
	$(BIN)/python -m tests.fuzz.guided --out tests/fuzz/results.json
	OMP_NUM_THREADS=1 CKMERGE_EXAMPLES=500 $(BIN)/python -m pytest --timeout 7200 tests/fuzz

soak: $(READY)  ## 2,000 searches in one process: whether memory, files, threads or time grow; half an hour on an idle core.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --out benchmarks/soak.json

determinism: $(READY)  ## Equal runs on one rank and on two, compared by hashes; PYTHON=python3.12 with a clean .venv for another.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.determinism --out benchmarks/determinism.json

crash: $(READY)  ## Kill runs at more than 200 points, single ones and one of two ranks, and write docs/crashes.json (half an hour).
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash --points 204 --again 0.7 --rank-points 22 --stops 2 --out docs/crashes.json

clients: $(READY)  ## Train models of other packages, each in an environment of its own; ARGS=darts_model for one. Writes docs/clients.json.
	$(BIN)/python -m tests.clients --venvs $(CLIENTS) --out docs/clients.json $(ARGS)

lightning-suite: $(READY)  ## Run Lightning's own tests without and with the callback in every Trainer; ARGS=loops for a part.
	test -d $(LIGHTNING) || git clone --quiet --depth 1 --branch $(LIGHTNING_TAG) https://github.com/Lightning-AI/pytorch-lightning $(LIGHTNING)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.lightning_suite $(LIGHTNING) --tag $(LIGHTNING_TAG) --out docs/lightning_suite.json $(ARGS)

release-check: $(READY)  ## Build the wheel and the sdist, check them, install the wheel into a clean environment, and train there.
	$(BIN)/python -m pip install --quiet build==1.6.1 twine==7.0.0
	$(BIN)/python -m tests.release_check --out .cache/release $(ARGS)

check: $(READY)  ## Format, lint, types, layers, public names, and the examples in docstrings.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet lightning_ckmerge tests/test_house.py tests/test_public_names.py

docs: $(READY_DOCS)  ## Build the documentation into site/; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:  ## Remove the virtual environment, the caches and the built documentation.
	rm -rf $(VENV) .venv-oldest .venv-newest site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Installed again only when a requirement changed.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[adapters,cli,examples,test,dev,loggers,referees]'
	touch $@

.venv-oldest/.ready: pyproject.toml tests/constraints-oldest.txt
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint tests/constraints-oldest.txt --editable '.[adapters,cli,test]'
	touch $@

# Without constraints: whatever there is today.
.venv-newest/.ready: pyproject.toml
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[adapters,cli,test]'
	touch $@

# On its own, so that tests need no MkDocs.
$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[cli,docs]'
	touch $@
