"""What makes a run slower than it could be is said, and only that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fluxq.config import DataConfig
from fluxq.data import Folder
from fluxq.offload import AllResident, StreamingRing
from fluxq.offload.arena import Arena
from fluxq.training import summary as module
from fluxq.training.defaults import Epoch, epoch_of, not_full
from fluxq.training.run import Result
from fluxq.training.summary import slower


def flux(ring=None, inputs=None, device: str = "cuda"):
    buffer = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(buffers=lambda: iter([buffer]), ring=ring or AllResident(), inputs=inputs)


def streaming(refused: str | None) -> StreamingRing:
    ring = object.__new__(StreamingRing)
    ring.host = Arena({}, lambda unit, out: None)
    ring.host.refused = refused
    return ring


@pytest.fixture(autouse=True)
def _a_good_machine(monkeypatch):
    monkeypatch.setattr(module, "has_expandable_segments", lambda: True)
    monkeypatch.setattr(module, "notes", lambda machine: [])


def test_a_run_as_fast_as_it_can_be_says_nothing():
    assert slower(flux(streaming(None), SimpleNamespace(refused=None))) == slower(flux()) == []


def test_each_reason_is_a_line(monkeypatch):
    monkeypatch.setattr(module, "has_expandable_segments", lambda: False)
    monkeypatch.setattr(module, "notes", lambda machine: ["Triton is not installed"])
    lines = slower(flux(streaming("the driver pinned 1.0 of 6.0 GB"), SimpleNamespace(refused="the driver pinned 0.0")))
    parts = ("Triton", "expandable segments", "pinned 1.0 of 6.0 GB", "block inputs .* pinned 0.0")
    assert len(lines) == 4 and all(part.split(" .* ")[-1] in line for part, line in zip(parts, lines, strict=True))
    assert slower(flux(device="cpu")) == ["Triton is not installed"], "a CPU has no segments"


def test_batches_that_no_bucket_can_fill_are_said():
    folder = Folder(Path("photos"))
    examples = [
        SimpleNamespace(bucket=bucket, repeats=2, folder=folder, path=bucket, held_out=False)
        for bucket in ((96, 96), (96, 96), (64, 128))
    ]
    scanned, data = SimpleNamespace(examples=examples), DataConfig(folders=(folder,))
    assert [epoch_of(data, scanned, batch) for batch in (2, 4)] == [Epoch(2, 6, 3, 3, 4), Epoch(2, 6, 2, 1, 4)]
    assert not_full(epoch_of(data, scanned, 2)) == []
    assert not_full(epoch_of(data, scanned, 4)) == ["1 of 2 batches per epoch is not full: a batch is of one bucket"]
    assert not_full(epoch_of(data, scanned, 5)) == [
        "warning: no batch is full: a batch is of one bucket, and the largest has 4 images"
    ]


def test_the_end_of_a_run_says_it_again():
    result = Result(1, 1.0, 1.0, 1.0, None, "a.safetensors", None, None, ["no Triton"], None)
    assert result.summary() == ["slower than it could be: no Triton", "LoRA: a.safetensors"]
