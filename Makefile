# Everything runs in .venv, made here on first use from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format bench docs clean
.DEFAULT_GOAL := test

# `make demo` needs only the lab; `make test` and `make check` need the developers' tools.
.venv/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing PyTorch and what polyak needs into .venv: a minute or two, once."
	$(BIN)/pip install $(PIP_FLAGS) -e '.[lab]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(PIP_FLAGS) -e '.[dev]'
	touch $@ .venv/demo.stamp .venv/docs.stamp

.venv/docs.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(PIP_FLAGS) -e '.[docs]'
	touch $@ .venv/demo.stamp

demo: .venv/demo.stamp
	$(BIN)/polyak demo --out demo

# One thread for each of the two workers: on two cores, threads of both would only wait for each other.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/dev.stamp
	$(BIN)/python bench/optim.py

# The notice is about the successors of mkdocs.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation: site/index.html"

clean:
	rm -rf .venv demo site build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
