# make demo: install, cut the trained parent in the box, verify the replica, judge it.
# make test: install with the development tools, run the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-minimal lint audit docs docs-check clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/v4surgery slice --recipe python-8m --out demo/replica
	$(BIN)/v4surgery verify demo/replica
	head -n 4 v4surgery/parents/python-14m/heldout.jsonl > demo/prompts.jsonl
	$(BIN)/v4surgery validate demo/replica --prompts demo/prompts.jsonl --tokens 192 --report demo/report
	$(BIN)/v4surgery generate demo/replica --prompt "import numpy as np" --max-new-tokens 12
	@echo
	@echo "The replica is in demo/replica: config.json, safetensors, recipe.yaml, v4surgery.json."
	@echo "How close it is to its parent, layer by layer: demo/report/report.html"
	@echo "Next: $(BIN)/v4surgery inspect demo/replica"
	@echo "      $(BIN)/v4surgery recipes list"
	@echo "      $(BIN)/v4surgery slice --recipe mini3b --parent path/to/DeepSeek-V4-Flash"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The oldest versions that pyproject.toml promises, in an environment of their own.
MINIMAL := $(VENV)-minimal
MINIMAL_TESTS := tests/cli/test_verbs.py tests/cli/test_errors.py tests/recipes/test_recipe_loader.py \
  tests/recipes/test_recipe_schema.py tests/hub/test_push.py tests/hub/test_remote.py \
  tests/slicers/test_storage.py tests/kernels/test_rms_norm.py tests/robustness/test_oldest.py

$(MINIMAL)/.installed: pyproject.toml constraints-minimal.txt
	$(PYTHON) -m venv $(MINIMAL)
	$(MINIMAL)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-minimal.txt -e .
	touch $@

# Old versions warn of their own age.
test-minimal: $(MINIMAL)/.installed
	$(MINIMAL)/bin/python -m pytest -q -n 2 --dist loadfile -W ignore::DeprecationWarning $(MINIMAL_TESTS)

# Offline; known vulnerabilities are looked up by `pip-audit -r constraints.txt`, with a network.
audit: $(VENV)/.installed-dev
	$(BIN)/python scripts/audit_dependencies.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py

docs-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py --check

clean:
	rm -rf $(VENV) $(MINIMAL) demo out build dist *.egg-info
