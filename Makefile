# Two commands: `make run` shows a live migration, `make test` runs everything that CI runs.
# PYTHON chooses the interpreter (3.11 or newer); everything goes into .venv, nothing needs root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/*.[ch] native/binding/*.[ch])
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: run test lint clean
.DELETE_ON_ERROR:

run: $(VENV)/installed
	@$(BIN)/ramferry demo

test: $(VENV)/installed-dev lint
	@$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: $(PYTHON) is missing or older than 3.11; choose one with PYTHON=..." >&2; exit 1; }
	@command -v gcc >/dev/null || command -v cc >/dev/null || { \
	    echo "make: no C compiler; install gcc (Debian, Ubuntu: apt install gcc)" >&2; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { \
	    echo "make: no Python.h; install Python's headers (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) has no venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) --upgrade pip

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	@echo "make: building the kernels and installing into $(VENV) (once)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(SOURCES) | $(VENV)/bin/python
	@echo "make: building the kernels and installing with the test tools into $(VENV) (once)"
	@$(PIP) --config-settings=cmake.define.RAMFERRY_WERROR=$(if $(CI),ON,OFF) --editable '.[dev,perf]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .vmm build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	rm -rf engine/*.so CMakeFiles .cmake CMakeCache.txt CMakeInit.txt cmake_install.cmake \
	    build.ninja .ninja_deps .ninja_log .skbuild-info.json libramferry_kernels.a
