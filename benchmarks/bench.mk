# The rollout benchmark: the embedded engine beside what a user would pick instead.
# vLLM takes part where its environment is ($(VENV_VLLM), as tests/servers/vllm.mk builds it: make .venv-vllm/.stamp).

VENV_VLLM ?= .venv-vllm
VENV_SGLANG ?= .venv-sglang

.PHONY: bench-rollout

bench-rollout: $(VENV)/.stamp-test ## Measure rollouts beside vLLM and transformers: make bench-rollout ARGS=--quick
	@[ -x $(VENV_VLLM)/bin/python ] || echo "Without vLLM: $(VENV_VLLM) is not there (make $(VENV_VLLM)/.stamp builds it)"
	PEKOE_VLLM_PYTHON=$(abspath $(VENV_VLLM)/bin/python) PEKOE_SGLANG_PYTHON=$(abspath $(VENV_SGLANG)/bin/python) \
	  $(PY) benchmarks/bench_rollout.py $(ARGS)
