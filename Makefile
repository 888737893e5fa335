# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Tests come in three tiers: `make quick` runs the first, `make test` the first and the second, `make full` the third.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DATA ?= data
TESTS ?= not full
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo quick test full lint types benchmark gpu notebooks clean

demo: $(VENV)/.installed  ## compare the three bundled networks on the bundled digits
	$(BIN)/cka-probe compare zoo:cnn zoo:vit zoo:mlp --data digits --batch-size 256 --out $(OUT) --overwrite

quick: $(VENV)/.installed-dev  ## the fast tests
	$(PYTEST) -m "not slow and not full"

test: lint types  ## lint, types, and all tests but those of `make full`
	$(PYTEST) -m "$(TESTS)"

full: $(VENV)/.installed-dev  ## the notebooks, whole runs, many processes, other libraries
	$(PYTEST) -m full

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

benchmark: $(VENV)/.installed-dev  ## the scoreboard: benchmarks/RESULTS.md
	$(BIN)/python -m pip install --quiet -e '.[benchmark]'
	$(BIN)/python benchmarks/scoreboard.py

gpu: $(VENV)/.installed-dev  ## on a machine with a GPU: its tests, its controls, what it costs there; CIFAR-100's folder in DATA
	PYTHON=$(BIN)/python benchmarks/on_gpu.sh runs/gpu $(DATA)

notebooks: $(VENV)/.installed-dev  ## run the notebooks and keep their outputs
	$(BIN)/python notebooks/run.py

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
