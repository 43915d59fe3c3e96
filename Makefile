# Two commands do all the set-up: `make demo` and `make test`. Both use the environment .venv, made here once.
PYTHON ?= python3
BIN := .venv/bin

# learn2learn 0.2.0 ships C from an old Cython; build_ext generates it anew. From Python 3.13 on one of its
# dependencies (qpth) makes pip compile NumPy 1.26: there the library uses its built-in clone and update instead.
# It is named again beside the rest, which would otherwise bring a NumPy that it does not take.
LEARN2LEARN := $(shell $(PYTHON) -c 'import sys; print("" if sys.version_info >= (3, 13) else "learn2learn==0.2.0")')

.PHONY: demo test slow oldest lint docs audit gpu clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

test: lint docs
	$(BIN)/python -m pytest -m "not slow" --numprocesses=logical --maxprocesses=4 --dist=worksteal --cov --cov-report=term:skip-covered

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# The oldest versions that pyproject.toml allows, on Python 3.10: make oldest PYTHON=python3.10
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip compile --quiet --resolution lowest-direct --extra timm pyproject.toml \
		--python .venv-oldest/bin/python --output-file .venv-oldest/lowest.txt
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --constraint .venv-oldest/lowest.txt \
		--editable ".[timm]" hypothesis pytest pytest-xdist learn2learn==0.2.0
	.venv-oldest/bin/python -m pytest -m "not slow" --numprocesses=logical --maxprocesses=4 --dist=worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/prose.py

docs: .venv/installed
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

audit: .venv/installed
	$(BIN)/python .ci/audit.py

# Needs no installation: where .venv was not made, the machine's own Python, with PyTorch, runs it.
gpu:
	$(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON)) .ci/gpu.py --out '$(or $(OUT),gpu-results)' $(if $(CPU),--cpu) $(if $(ONLY),--only $(patsubst %,'%',$(ONLY)))

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
ifneq ($(LEARN2LEARN),)
	$(BIN)/python -m pip install --quiet --config-settings=--build-option=build_ext $(LEARN2LEARN)
endif
	$(BIN)/python -m pip install --quiet --editable ".[dev]" $(LEARN2LEARN)
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info docs/_build
