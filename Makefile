# Two commands set everything up: `make demo` and `make test`. Both make their own environment in .venv first.
#   make demo    teach the bundled toy model a new creature, on any machine
#   make test    the whole suite
#   make quick   the tests worth running before each commit
#   make check   formatting, lint, types (make lint), then the whole suite
#   make fullsize   the whole path at full width with random weights, on the processor (34 GB of disk; DEPTH="1 2")
#   make aot     every kernel compiled for the cards in use; writes benchmarks/results/aot.md
#   make plans   what the planner chooses for common cards; writes benchmarks/results/plans.md
#   make gpu     GPU tests and measurements with the python3 at hand; JSON into $OUT_DIR (default benchmarks/results);
#                its four parts, each under 9 minutes: gpu-tests gpu-kernels gpu-blocks gpu-steps

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A file's tests share fixtures, so a worker takes whole files; tests/conftest.py puts the longest first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
OUT_DIR ?= benchmarks/results

# Ships CLIP's and T5's vocabularies, which tests compare with. It is unpacked beside the environment, not into it.
VOCABULARIES := diffsynth==1.1.7

.PHONY: demo test quick lint check aot plans gpu gpu-tests gpu-kernels gpu-blocks gpu-steps fullsize vocabularies clean

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

aot: $(VENV)/installed-tests
	$(BIN)/python benchmarks/aot.py --out $(OUT_DIR)/aot.md

plans: $(VENV)/installed
	$(BIN)/python -m benchmarks.plans --out $(OUT_DIR)/plans.md

gpu:
	$(MAKE) --keep-going -j1 gpu-tests gpu-kernels gpu-blocks gpu-steps

gpu-tests:
	$(PYTHON) -m benchmarks.gpu_tests --out $(OUT_DIR)

gpu-kernels:
	$(PYTHON) -m benchmarks.kernels --out $(OUT_DIR)

gpu-blocks:
	$(PYTHON) -m benchmarks.blocks --out $(OUT_DIR)

gpu-steps:
	$(PYTHON) -m benchmarks.gpu --out $(OUT_DIR)

fullsize: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.fullsize $(if $(DEPTH),--depth $(DEPTH)) --out $(OUT_DIR)

clean:
	rm -rf $(VENV) build dist *.egg-info
