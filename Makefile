# `make test` on a fresh machine makes the environment, installs and runs the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# PyTorch without CUDA, for Linux without an NVIDIA driver. Where this index is out of reach, PyTorch comes from PyPI.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# `make install CONSTRAINTS=constraints.txt` installs the versions that the suite was last run with.
CONSTRAINTS ?=

.PHONY: install test nightly lint types demo docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ] && \
		$(BIN)/python -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2> /dev/null; \
	then $(BIN)/pip install --quiet --index-url $(CPU_INDEX) 'torch>=2.6,<3' 'torchvision>=0.21,<1' || true; fi
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	touch $@

# Every behaviour once, within CI's time.
test: install
	$(BIN)/pytest --numprocesses auto --dist worksteal -m "not nightly"

# Every test, the costly cases as well.
nightly: install
	$(BIN)/pytest --numprocesses auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

demo: install
	$(BIN)/finealign demo --out runs/demo --overwrite

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) artefacts build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
