"""Memory that runs out outside torch's allocator is a repeated step, not a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

import fluxq.train
from fluxq.cli.main import main
from fluxq.errors import WrongRequest, is_out_of_memory
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.memory import share as sharing
from fluxq.memory.retry import repeated_once
from fluxq.memory.share import share, take_share
from fluxq.model import Flux
from fluxq.nano import drawing
from fluxq.offload.gpus import GIB
from fluxq.offload.planner import OUTSIDE

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
TRITON = "Triton Error [CUDA]: out of memory"
CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
CUDNN = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

STRIDE = 17
"""No layer, block or pass makes a multiple of this many products, so those that fail are of every kind."""


def test_what_counts_as_out_of_memory():
    assert all(is_out_of_memory(RuntimeError(text)) for text in (CUBLAS, TRITON, CUDA, CUDNN))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."))
    if hasattr(torch, "AcceleratorError"):
        assert issubclass(torch.AcceleratorError, RuntimeError)
    for other in (RuntimeError("CUDA error: an illegal memory access was encountered"), MemoryError("out of memory")):
        assert not is_out_of_memory(other)
    assert not is_out_of_memory(WrongRequest("out of memory"))


class Products(TorchDispatchMode):
    """In step k a matrix product fails once, the k-th of those STRIDE apart, with each of `texts` in turn.

    last: how many products the last attempt made.
    """

    def __init__(self, *texts: str):
        super().__init__()
        self.texts, self.step, self.made, self.last, self.failed = texts, -1, 0, 0, set[int]()

    def begin(self, step: int) -> None:
        self.last, self.step, self.made = self.made, step, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.step >= 0 and func in PRODUCTS:
            self.made += 1
            if self.texts and self.made == STRIDE * self.step + 1 and self.step not in self.failed:
                self.failed.add(self.step)
                raise RuntimeError(self.texts[self.step % len(self.texts)])
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=2)):
        image.resize((32, 32)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def run(photos: Path, out: Path, steps: int, *more: object):
    arguments = ["train", photos, "--model", "nano", "--steps", steps, "--out", out, "--cache", photos.parent / "cache"]
    arguments += ["--name", "x", "--resolution", 32, "--batch", 1, "--rank", 2, "--sample-every", 0]
    return CliRunner().invoke(main, [str(a) for a in (*arguments, *more)])


def weights(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(out / "x.safetensors")
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


def counted(products: Products, monkeypatch) -> Products:
    real = fluxq.train.optimizer_step

    def step(optimizer, objective, number, *rest):
        products.begin(number)
        try:
            return real(optimizer, objective, number, *rest)
        finally:
            products.begin(-1)

    monkeypatch.setattr(fluxq.train, "optimizer_step", step)
    return products


@pytest.mark.slow
def test_any_product_of_a_step_may_fail_once_and_the_plan_stays(photos, tmp_path, monkeypatch):
    with counted(Products(), monkeypatch) as undisturbed:
        assert run(photos, tmp_path / "short", 2).exit_code == 0
    products = undisturbed.last
    steps = products // STRIDE  # the first step makes more, for modulation that is computed ahead
    assert run(photos, tmp_path / "undisturbed", steps).exit_code == 0
    with counted(Products(CUBLAS, TRITON, CUDA), monkeypatch) as failing:
        result = run(photos, tmp_path / "out", steps)
    assert result.exit_code == 0, result.output
    assert failing.failed == set(range(steps)) and failing.last == products
    assert result.output.count("repeating with the memory that torch did not use") == steps
    assert "units resident" not in result.output, "no smaller plan"
    found, wanted = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


@pytest.mark.slow
def test_the_second_failure_needs_a_smaller_plan_and_other_errors_pass(photos, tmp_path, monkeypatch):
    assert run(photos, tmp_path / "undisturbed", 2).exit_code == 0
    calls, texts, real = [0], {2: TRITON, 3: CUBLAS}, Flux.forward

    def forward(self, *arguments, **options):
        calls[0] += 1
        if calls[0] in texts:
            raise RuntimeError(texts[calls[0]])
        return real(self, *arguments, **options)

    monkeypatch.setattr(Flux, "forward", forward)
    result = run(photos, tmp_path / "out", 2)
    assert result.exit_code == 0, result.output
    assert f"out of memory in step 2 ({TRITON}); repeating with the memory that torch did not use" in result.output
    assert f"out of memory in step 2 ({CUBLAS}); repeating with 6 of 6 units resident; blocks keep" in result.output
    found, wanted = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    calls[0], texts = 0, {1: "CUDA error: an illegal memory access was encountered"}
    result = run(photos, tmp_path / "broken", 2)
    assert result.exit_code == 1 and "the GPU failed after step 0 (CUDA error: an illegal memory" in result.output


def test_torch_leaves_memory_to_what_allocates_outside_it(monkeypatch):
    assert share(free=8 * GIB, total=10 * GIB, reserved=GIB) == pytest.approx((9 * GIB - OUTSIDE) / (10 * GIB))
    assert share(free=0, total=10 * GIB, reserved=0) == 0 and share(20 * GIB, 10 * GIB, 0) == 1
    held, total = [], 12 * GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total // 2, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held.append)
    monkeypatch.setattr(sharing, "warm_up", lambda device: None)
    take_share.cache_clear()
    take_share()
    take_share()
    assert held == [share(total // 2, total, 0)], "once"
    take_share.cache_clear()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_share()
    assert len(held) == 1
    take_share.cache_clear()


def test_torch_is_held_to_its_share_even_if_there_is_no_memory_to_warm_up(monkeypatch):
    def warm_up(device):
        raise RuntimeError(CUBLAS)

    held = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held.append)
    monkeypatch.setattr(sharing, "warm_up", warm_up)
    take_share.cache_clear()
    take_share()
    take_share.cache_clear()
    assert held == [share(8 * GIB, 12 * GIB, 0)]


def test_work_before_the_first_step_is_repeated_once():
    for failures, expected in ((0, 1), (1, 2)):
        errors, calls, notes = [torch.OutOfMemoryError("CUDA out of memory. Tried")] * failures, [], []

        def work(errors=errors, calls=calls):
            calls.append(1)
            if errors:
                raise errors.pop()
            return len(calls)

        assert repeated_once("encoding", notes.append, work) == expected
        assert len(notes) == failures
    assert notes == [
        "out of memory while encoding (CUDA out of memory); repeating with the memory that torch did not use"
    ]
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something else")):

        def fails(error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            repeated_once("encoding", notes.append, fails)
    assert len(notes) == 2, "other errors pass at once"


def test_warming_up_multiplies_in_both_threads():
    sharing.warm_up(torch.device("cpu"))
