# `make demo`: train stage 1 in the small world and generate from it.  `make test`: the default suite.
# Both make .venv on first use.  PYTHON chooses the interpreter it is made from (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile pip byte-compiles all of TensorFlow; Python does that for what is imported.
PIP := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
# Two processes: one alone keeps one of two cores busy.  A file stays with one, which shares its fixtures.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.stamp-run
	$(BIN)/python -m minigpt5_jax.demo --config configs/shapes_stage1.py --workdir runs/demo

test: $(VENV)/.stamp-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.stamp-test
	$(PYTEST) -m slow

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), sys.version' || \
	    { echo "minigpt5_jax needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is written when its installation is complete, and is older than setup.py when that changes.
$(VENV)/.stamp-run: setup.py | $(BIN)/python
	@echo "installing into $(VENV) (about a minute)"
	@$(PIP) -e ".[metrics,serve]"
	@touch $@

$(VENV)/.stamp-test: setup.py | $(BIN)/python
	@echo "installing into $(VENV) (about two minutes)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.stamp-run

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
