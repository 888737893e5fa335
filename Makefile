# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
DATA ?= data

.PHONY: demo test lint types check benchmark gpu notebooks clean

demo: $(VENV)/.installed  ## compare the three bundled networks on the bundled digits
	$(BIN)/cka-probe compare zoo:cnn zoo:vit zoo:mlp --data digits --batch-size 256 --out $(OUT) --overwrite

test: lint types check  ## lint, types and tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

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
