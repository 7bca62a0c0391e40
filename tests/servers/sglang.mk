# SGLang's real server on a CPU, for the tests: an environment of its own in $(VENV_SGLANG) (about 2.5 GB, some minutes).
# A stamp says that it is done; changed requirements, a dead Python or a move undo it.

VENV_SGLANG ?= .venv-sglang
SGLANG_CPU  := tests/servers/sglang_cpu
SGLANG_PIP   = $(VENV_SGLANG)/bin/python -m pip --disable-pip-version-check install $(if $(CI),--quiet --progress-bar off)
SGLANG_SOUND := $(shell [ "$$(cat $(VENV_SGLANG)/.stamp 2>/dev/null)" = "$(CURDIR)" ] && \
                  $(VENV_SGLANG)/bin/python -c '' 2>/dev/null && echo yes)

$(VENV_SGLANG)/.stamp: $(SGLANG_CPU)/requirements.txt $(if $(SGLANG_SOUND),,FORCE)
	@echo "Installing SGLang for CPU in $(VENV_SGLANG) (minutes, the first time)"
	@[ "$(VENV_SGLANG)" = .venv-sglang ] || [ -e $@ ] || [ ! -e $(VENV_SGLANG) ] || \
	  { echo "$(VENV_SGLANG) is there and was not made here: name another, or remove it yourself" >&2; exit 1; }
	@rm -rf $(VENV_SGLANG)
	@$(PYTHON) -m venv $(VENV_SGLANG)
	@$(SGLANG_PIP) torch==2.13.0 numpy==2.4.6
	@$(SGLANG_PIP) --no-deps -r $(SGLANG_CPU)/requirements.txt
	@printf '%s' "$(CURDIR)" > $@
