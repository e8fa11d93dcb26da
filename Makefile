# make demo: install, cut the trained parent in the box, verify the replica, judge it.
# make test: install with the development tools, run the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs docs-check clean

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

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py

docs-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/generate_docs.py --check

clean:
	rm -rf $(VENV) demo out build dist *.egg-info
