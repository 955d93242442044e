"""What every test shares: a fixed seed, and uninitialized memory that shows."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, in the processes that tests start too
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest

import fluxq  # noqa: F401 - before torch, whose allocator it sets up

import torch  # isort: skip

if not torch.cuda.is_available():  # read when triton is imported: kernels are interpreted where there is no GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

VOCABULARIES = Path(__file__).parent.parent / ".venv" / "vocabularies" / "diffsynth" / "tokenizer_configs" / "flux"


LONGEST = (  # files, by their CPU seconds; they are begun first, so that no worker is left alone with one at the end
    "commands/test_demo.py",
    "benchmarks/test_fullsize.py",
    "test_train.py",
    "benchmarks/test_scripts.py",
    "recorded/test_losses.py",
    "offload/test_streamed_flux.py",
    "training/test_train_clip.py",
    "memory/test_retry.py",
    "memory/test_phases.py",
    "model/test_byte_ring.py",
    "formats/lora/test_in_diffusers.py",
    "caching/test_memory.py",
    "kernels/test_whole_model.py",
    "fuzz/test_fuzz.py",
)
LAST = "kernels/test_aot.py"
"""It compiles in two processes, which need the core of a worker that has nothing left."""


def pytest_collection_modifyitems(items):
    """Tests whose kernels run in Triton's interpreter are many and slow: `make quick` leaves them out."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    places[Path(__file__).parent / LAST] = len(LONGEST) + 1
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        triton = "triton_ops" in item.fixturenames or (parameters or {}).get("either_backend") == "triton"
        if triton and os.environ.get("TRITON_INTERPRET") == "1":
            item.add_marker(pytest.mark.interpreted)


@pytest.fixture(autouse=True, scope="module")
def _older_objects_are_never_garbage():
    """What libraries and earlier files have made is left out of gc.collect: searching all of it takes half a second,
    each time that a run frees memory.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache_of_quantized_models(tmp_path_factory):
    """Tests, and the processes that they start, leave the user's cache alone."""
    os.environ["FLUXQ_CACHE"] = str(tmp_path_factory.mktemp("quantized"))


@pytest.fixture(autouse=True, scope="session")
def _no_plots():
    """Drawing loss.png takes as long as two steps of nano, at the end of each run. `plots` has it drawn."""
    from fluxq.training.report import Report

    plot = Report.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "plot", lambda report: None)
        yield plot


@pytest.fixture
def plots(_no_plots, monkeypatch):
    from fluxq.training.report import Report

    monkeypatch.setattr(Report, "plot", _no_plots)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """torch.empty returns NaN, so that an output nobody wrote cannot pass for a result."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler, for 2 seconds


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """The real vocabularies: CLIP's in tokenizer_1, T5's in tokenizer_2. A package has them, the repository has not."""
    if not VOCABULARIES.is_dir():
        pytest.skip("the real vocabularies are not installed; `make vocabularies` does it")
    return VOCABULARIES
