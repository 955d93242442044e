# Two commands set everything up: `make demo` and `make test`. Both make their own environment in .venv first.
#   make demo    teach the bundled toy model a new creature, on any machine
#   make test    the whole suite
#   make quick   the tests worth running before each commit
#   make check   formatting, lint, types (make lint), then the whole suite
#   make size    code lines per room, against the budget in pyproject.toml
#   make fullsize   the whole path at full width with random weights, on the CPU (34 GB of disk; DEPTH="1 2")
#   make aot     every kernel compiled for the GPUs in use; writes benchmarks/results/aot.md
#   make plans   what the planner chooses for common GPUs; writes benchmarks/results/plans.md
#   make gpu     GPU tests and measurements with the python3 at hand, the most valuable first, all within $MINUTES (9);
#                one JSON file a part into $OUT_DIR (default benchmarks/results). A part alone: gpu-tests gpu-steps
#                gpu-streaming gpu-peaks gpu-host gpu-kernels gpu-blocks

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A file's tests share fixtures, so a worker takes whole files; tests/conftest.py puts the longest first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
OUT_DIR ?= benchmarks/results
MINUTES ?= 9
GPU_PARTS := gpu-tests gpu-steps gpu-streaming gpu-peaks gpu-host gpu-kernels gpu-blocks

# Ships CLIP's and T5's vocabularies, which tests compare with. It is unpacked beside the environment, not into it.
VOCABULARIES := diffsynth==1.1.7

.PHONY: demo test quick lint check size aot plans gpu $(GPU_PARTS) fullsize vocabularies clean

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(INSTALL) -e '.[test]'
	$(MAKE) vocabularies || echo "tests with the real vocabularies will be skipped"
	touch $@

vocabularies: $(VENV)/installed
	$(INSTALL) --no-deps --upgrade --target $(VENV)/vocabularies $(VOCABULARIES)

demo: $(VENV)/installed
	$(BIN)/fluxq demo

test: $(VENV)/installed-tests
	$(PYTEST)

quick: $(VENV)/installed-tests
	$(PYTEST) -q -m "not slow and not interpreted"

lint: $(VENV)/installed-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test

size: $(VENV)/installed-tests
	$(BIN)/python tests/test_size.py

aot: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.aot --out $(OUT_DIR)/aot.md

plans: $(VENV)/installed
	$(BIN)/python -m benchmarks.plans --out $(OUT_DIR)/plans.md

gpu:
	$(PYTHON) -m benchmarks.session --out $(OUT_DIR) --minutes $(MINUTES)

$(GPU_PARTS): gpu-%:
	$(PYTHON) -m benchmarks.session --out $(OUT_DIR) --minutes $(MINUTES) $*

fullsize: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.fullsize $(if $(DEPTH),--depth $(DEPTH)) --out $(OUT_DIR)

clean:
	rm -rf $(VENV) build dist *.egg-info
