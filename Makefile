# On a fresh machine `make demo` or `make test` alone does everything; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Of what is installed most is never imported: Python compiles what is, once, and may keep it whatever the environment says.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-all bench bench-all inspect lint clean

setup: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt $(shell find csrc ras_fast/build.py -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[triton,calibrate,test,lint]"
	touch $@

demo: setup
	$(BIN)/ras-fast demo

# Files in turn to as many workers as there are processors, up to four. Their threads sleep while they wait for each other.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m ""

# The headline figures, and at the end what the compilers made of the kernels and one table of all.
bench: setup
	for name in norm rotary linear attention engine; do $(BIN)/python bench/bench_$$name.py --quick || exit 1; done
	$(BIN)/ras-fast inspect
	$(BIN)/python bench/headline.py

bench-all: setup
	for name in norm rotary linear attention image_masks towers engine patch decode; do $(BIN)/python bench/bench_$$name.py || exit 1; done

inspect: setup
	$(BIN)/ras-fast inspect

lint: setup
	$(BIN)/ruff check .

clean:
	rm -rf build ras_fast/_lib ras_fast/_C*.so
