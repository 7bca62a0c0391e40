# The library `verifiers`, for the tests of its environments: in $(VENV_VERIFIERS) (about 2 GB, minutes), since it needs
# an older `openai` than the other tests. A stamp says that it is done; a dead Python or a move undo it.

VENV_VERIFIERS ?= .venv-verifiers
VERIFIERS_QUIET = $(if $(CI),--quiet --progress-bar off)
VERIFIERS_SOUND := $(shell [ "$$(cat $(VENV_VERIFIERS)/.stamp 2>/dev/null)" = "$(CURDIR)" ] && \
                     $(VENV_VERIFIERS)/bin/python -c '' 2>/dev/null && echo yes)

test-verifiers: $(VENV_VERIFIERS)/.stamp ## Run the tests with environments of the library `verifiers` (2 GB more)
	$(VENV_VERIFIERS)/bin/python -m pytest tests/run/test_verifiers.py $(ARGS)

$(VENV_VERIFIERS)/.stamp: pyproject.toml $(if $(VERIFIERS_SOUND),,FORCE)
	@echo "Installing verifiers in $(VENV_VERIFIERS) (minutes, the first time)"
	@[ "$(VENV_VERIFIERS)" = .venv-verifiers ] || [ -e $@ ] || [ ! -e $(VENV_VERIFIERS) ] || \
	  { echo "$(VENV_VERIFIERS) is there and was not made here: name another, or remove it yourself" >&2; exit 1; }
	@rm -rf $(VENV_VERIFIERS)
	@$(PYTHON) -m venv $(VENV_VERIFIERS)
	@$(VENV_VERIFIERS)/bin/python -m pip --disable-pip-version-check install $(VERIFIERS_QUIET) "$(TORCH)" -e ".[test,verifiers]"
	@printf '%s' "$(CURDIR)" > $@
