# The rollout benchmark: the embedded engine beside what a user would pick instead.
# vLLM takes part where its environment is ($(VENV_VLLM), as tests/servers/vllm.mk builds it: make .venv-vllm/.stamp).

VENV_VLLM ?= .venv-vllm
VENV_SGLANG ?= .venv-sglang

.PHONY: bench-endpoint bench-plan bench-rollout bench-train bench-verify bench-sync kill-matrix hosts chain bench-async learn-async families-rl

bench-rollout: $(VENV)/.stamp-test ## Measure rollouts beside vLLM and transformers: make bench-rollout ARGS=--quick
	@[ -x $(VENV_VLLM)/bin/python ] || echo "Without vLLM: $(VENV_VLLM) is not there (make $(VENV_VLLM)/.stamp builds it)"
	PEKOE_VLLM_PYTHON=$(abspath $(VENV_VLLM)/bin/python) PEKOE_SGLANG_PYTHON=$(abspath $(VENV_SGLANG)/bin/python) \
	  $(PY) benchmarks/bench_rollout.py $(ARGS)

# The training benchmark: the trainer beside a padded one and trl's, which has an environment of its own in $(VENV_TRL)
# (about 1.5 GB, some minutes). A stamp says that it is done; changed requirements, a dead Python or a move undo it.

VENV_TRL ?= .venv-trl
TRL_PIP   = $(VENV_TRL)/bin/python -m pip --disable-pip-version-check install $(if $(CI),--quiet --progress-bar off)
TRL_SOUND := $(shell [ "$$(cat $(VENV_TRL)/.stamp 2>/dev/null)" = "$(CURDIR)" ] && \
               $(VENV_TRL)/bin/python -c '' 2>/dev/null && echo yes)

bench-train: $(VENV)/.stamp-test $(VENV_TRL)/.stamp ## Measure training beside trl's: make bench-train ARGS=--quick
	PEKOE_TRL_PYTHON=$(abspath $(VENV_TRL)/bin/python) $(PY) benchmarks/bench_train.py $(ARGS)

$(VENV_TRL)/.stamp: benchmarks/trl.txt $(if $(TRL_SOUND),,FORCE)
	@echo "Installing trl in $(VENV_TRL) (minutes, the first time)"
	@[ "$(VENV_TRL)" = .venv-trl ] || [ -e $@ ] || [ ! -e $(VENV_TRL) ] || \
	  { echo "$(VENV_TRL) is there and was not made here: name another, or remove it yourself" >&2; exit 1; }
	@rm -rf $(VENV_TRL)
	@$(PYTHON) -m venv $(VENV_TRL)
	@$(TRL_PIP) $$(grep ^torch $<)
	@$(TRL_PIP) -r $<
	@printf '%s' "$(CURDIR)" > $@

# The judge beside graders of the field, which have an environment of their own in $(VENV_GRADERS) (200 MB).

VENV_GRADERS ?= .venv-graders
GRADERS_PIP   = $(VENV_GRADERS)/bin/python -m pip --disable-pip-version-check install $(if $(CI),--quiet --progress-bar off)
GRADERS_SOUND := $(shell [ "$$(cat $(VENV_GRADERS)/.stamp 2>/dev/null)" = "$(CURDIR)" ] && \
                   $(VENV_GRADERS)/bin/python -c '' 2>/dev/null && echo yes)

bench-verify: $(VENV)/.stamp-test $(VENV_GRADERS)/.stamp ## Measure the judge beside other graders: needs ../shared/data
	PEKOE_GRADERS_PYTHON=$(abspath $(VENV_GRADERS)/bin/python) $(PY) benchmarks/bench_verify.py $(ARGS)

$(VENV_GRADERS)/.stamp: benchmarks/graders.txt benchmarks/graders-alone.txt $(if $(GRADERS_SOUND),,FORCE)
	@echo "Installing graders in $(VENV_GRADERS)"
	@[ "$(VENV_GRADERS)" = .venv-graders ] || [ -e $@ ] || [ ! -e $(VENV_GRADERS) ] || \
	  { echo "$(VENV_GRADERS) is there and was not made here: name another, or remove it yourself" >&2; exit 1; }
	@rm -rf $(VENV_GRADERS)
	@$(PYTHON) -m venv $(VENV_GRADERS)
	@$(GRADERS_PIP) -r benchmarks/graders.txt
	@$(GRADERS_PIP) --no-deps -r benchmarks/graders-alone.txt
	@printf '%s' "$(CURDIR)" > $@

bench-sync: $(VENV)/.stamp-test ## Measure a cluster's weight sync beside a plain broadcast
	$(PY) benchmarks/bench_sync.py $(ARGS)

kill-matrix: $(VENV)/.stamp-test ## Kill each kind of process of a cluster in each phase of a step (20 minutes)
	$(PY) benchmarks/kill_matrix.py $(ARGS)

hosts: $(VENV)/.stamp-test ## Run a cluster of several hosts (network namespaces) and cut one off; needs root
	$(PY) benchmarks/hosts.py $(ARGS)

chain: $(VENV)/.stamp-test ## Run curate, sft, rl, eval, each killed once and gone on with, on two tasks
	$(PY) benchmarks/chain.py $(ARGS)

bench-async: $(VENV)/.stamp-test ## Measure training while sampling, by schedule (25 minutes): make bench-async ARGS=--quick
	$(PY) benchmarks/bench_async.py $(ARGS)

learn-async: $(VENV)/.stamp-test ## Whether RL learns with lag: the demo's RL stage at lags 0, 1, 2, 4 (an hour; needs a finished demo)
	$(PY) benchmarks/learn_async.py $(ARGS)

families-rl: $(VENV)/.stamp-test ## Whether RL teaches families of transformers: the demo's task from nothing (half an hour on one core)
	$(PY) benchmarks/families_rl.py $(ARGS)

# vLLM's own server stands beside it where its environment is.
bench-endpoint: $(VENV)/.stamp-test ## Load on the HTTP endpoint: 256 sessions for ten minutes: make bench-endpoint ARGS="--seconds 40"
	$(PY) benchmarks/bench_endpoint.py $(if $(wildcard $(VENV_VLLM)/bin/python),--vllm $(abspath $(VENV_VLLM))/bin/python) $(ARGS)

# The planner against published figures, which a file of yours has: --fit fits its constants; beside each error stands that
# with the constants of the other groups alone.
bench-plan: $(VENV)/.stamp-test ## Score the planner: make bench-plan ARGS="--figures FILE.json --json OUT.json"
	$(PY) benchmarks/bench_plan.py --leave-out $(ARGS)
