# Two commands set everything up: `make demo` and `make test`. Both make their own environment in .venv first.
#   make demo    teach the bundled toy model a new creature, on any machine
#   make test    the whole suite
#   make quick   the tests worth running before each commit
#   make check   formatting, lint, types (make lint), then the whole suite
#   make size    code lines per room, against the budget in pyproject.toml
#   make fullsize   the whole path at full width with random weights, on the CPU (34 GB of disk; DEPTH="1 2")
#   make recorded   the losses that tests/recorded compares with, for a commit that changes them on purpose
#   make mutation   200 wrong edits, one by one: do the tests notice? An hour of one core (SECONDS=280 ends early, the
#                next call goes on); writes benchmarks/results/mutation.json
#   make soak    20,000 steps of the toy model, watched for what grows; writes benchmarks/results/soak.json
#   make aot     every kernel compiled for the GPUs in use; writes benchmarks/results/aot.md
#   make plans   what the planner chooses for common GPUs; writes benchmarks/results/plans.md
#   make emulated   the GPU tests, and every Triton kernel once, on an emulated GPU (tests/emulated_gpu/README.md); its
#                PyTorch, built for CUDA, takes 6 GB in .venv-cuda; EMULATED_GPU_PYTHON=... takes another Python's
#   make emulated-ci   three minutes of that, drawn by commit
#   make emulated-refusals   a run of nano for each call that the driver of the emulated GPU can refuse
#   make fuzz    damaged files for every reader, for SECONDS=600; faults are kept in tests/fuzz/corpus
#   make faults  a run of nano for each call by which it changes files, failing or ending there (tests/faults/README.md);
#                with SECONDS=280 it ends early, and the next call goes on; writes benchmarks/results/faults.md
#   make faults-ci   a minute and a half of that, drawn by commit
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

# The emulated GPU needs a PyTorch that is built for CUDA: that of EMULATED_GPU_PYTHON, or an environment of its own.
CUDA_VENV := .venv-cuda
ifeq ($(EMULATED_GPU_PYTHON),)
EMULATED_GPU_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CUDA_INSTALLED := $(CUDA_VENV)/installed
endif
emulated-kernels emulated-host emulated-memory emulated-late emulated-early emulated-refusals emulated-ci: export EMULATED_GPU_PYTHON := $(EMULATED_GPU_PYTHON)
EMULATED := PYTHONPATH=. OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) $(PYTHON) tests/emulated_gpu/run.py
EMULATED_TESTS := python -m pytest -q -m gpu tests/test_gpu.py tests/test_allocator.py

# Ships CLIP's and T5's vocabularies, which tests compare with. It is unpacked beside the environment, not into it.
VOCABULARIES := diffsynth==1.1.7

.PHONY: demo test quick lint check size recorded mutation soak aot plans fuzz gpu $(GPU_PARTS) fullsize vocabularies
.PHONY: faults faults-ci clean
.PHONY: emulated emulated-python emulated-kernels emulated-host emulated-memory emulated-late emulated-early emulated-refusals emulated-ci

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

recorded: $(VENV)/installed-tests
	$(BIN)/python tests/recorded/record.py

MUTATION := $(BIN)/python tests/mutation/run.py --work $(or $(WORK),runs/mutation)
mutation: $(VENV)/installed-tests
	$(MUTATION) map $(if $(SECONDS),--seconds $(SECONDS))
	$(MUTATION) try $(if $(SECONDS),--seconds $(SECONDS))
	$(MUTATION) table

soak: $(VENV)/installed
	$(BIN)/python -m benchmarks.soak --work $(or $(WORK),runs/soak) --out $(OUT_DIR)

aot: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.aot --out $(OUT_DIR)/aot.md

plans: $(VENV)/installed
	$(BIN)/python -m benchmarks.plans --out $(OUT_DIR)/plans.md

fuzz: $(VENV)/installed-tests
	FUZZ_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest -q tests/fuzz

gpu:
	$(PYTHON) -m benchmarks.session --out $(OUT_DIR) --minutes $(MINUTES)

$(GPU_PARTS): gpu-%:
	$(PYTHON) -m benchmarks.session --out $(OUT_DIR) --minutes $(MINUTES) $*

# Only what fluxq needs: fluxq itself is run from here, and nothing is written here while another pip installs it.
$(CUDA_VENV)/installed: pyproject.toml constraints-cuda.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*p['dependencies'], *p['optional-dependencies']['test'], sep='\n')" > $(CUDA_VENV)/requirements.txt
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir -c constraints-cuda.txt \
		-r $(CUDA_VENV)/requirements.txt
	touch $@

emulated-python: $(CUDA_INSTALLED)

emulated: emulated-kernels emulated-host emulated-memory emulated-late emulated-early

emulated-kernels: $(CUDA_INSTALLED)
	for gpu in a100 rtx3060 rtx4090 h100 rtx5090; do \
		$(EMULATED) --gpu $$gpu -- python tests/emulated_gpu/kernels.py || exit 1; \
	done

# Counts what a block launches, which the planner reads, then measures full-size steps beside it.
emulated-host: $(CUDA_INSTALLED)
	for gpu in rtx4090 rtx3060; do \
		$(EMULATED) --gpu $$gpu --skip-copies -- python -m benchmarks.emulated_host --gpu $$gpu \
			--count fluxq/model/launches.json --out $(OUT_DIR)/emulated_host.json || exit 1; \
	done
	$(EMULATED) -- python -m benchmarks.emulated_host --page $(OUT_DIR)/emulated_host.json

# Bytes do not depend on numbers: nothing is computed, and large copies move nothing. With SECONDS=280 the table ends
# early, and the next call goes on.
emulated-memory: $(CUDA_INSTALLED)
	$(EMULATED) --skip-copies -- python -m pytest -q -m gpu tests/bench/test_profile.py
	$(EMULATED_GPU_PYTHON) -m benchmarks.emulated $(if $(SECONDS),--seconds $(SECONDS))

# Copies as late as CUDA allows, then as early: a test that passes both ways waits wherever it has to.
emulated-late: $(CUDA_INSTALLED)
	$(EMULATED) --compute --races --no-triton -- $(EMULATED_TESTS)

emulated-early: $(CUDA_INSTALLED)
	$(EMULATED) --compute --races --no-triton --early -- $(EMULATED_TESTS)

# Three minutes of all of this, drawn by commit.
emulated-ci: $(CUDA_INSTALLED)
	$(PYTHON) tests/emulated_gpu/drawn.py

# A run of nano for each allocation, module and handle that the driver refuses: the LoRA stays the same to the bit.
emulated-refusals: $(CUDA_INSTALLED)
	$(EMULATED) --compute --no-triton -- python tests/emulated_gpu/refusals.py

faults: $(VENV)/installed-tests
	$(BIN)/python tests/faults/run.py --out $(OUT_DIR) $(if $(SECONDS),--seconds $(SECONDS))

faults-ci: $(VENV)/installed-tests
	$(BIN)/python tests/faults/run.py --draw --seconds 90

fullsize: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.fullsize $(if $(DEPTH),--depth $(DEPTH)) --out $(OUT_DIR)

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist *.egg-info
