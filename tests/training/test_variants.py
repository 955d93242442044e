"""Variants of LoRA end to end on nano: a resumed run is the same run, and files are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxq.config import config_from_dict
from fluxq.console import silent
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.nano import drawing
from fluxq.train import train

EVERYTHING = {
    "lora": {"rank": 4, "dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.1},
    "training": {"batch": 2, "accumulate": 2, "learning_rate": 1e-3, "optimizer": "adamw"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("variants") / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=3)):
        image.resize((64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def configured(photos: Path, out: Path, steps: int, **sections):
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "trigger": "zqx", "resolution": 64, "cache": str(photos.parent / "cache")},
        "training": {"steps": steps},
        "output": {"out": str(out), "name": "test", "plot_seconds": 1e9, "save_every": 0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return config_from_dict(values, "a test")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


def assert_same(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.slow
def test_three_steps_and_three_more_are_six_to_the_bit(tmp_path, photos):
    def run(out: str, steps: int, **more) -> Path:
        train(configured(photos, tmp_path / out, steps, **EVERYTHING), notify=silent, **more)
        return tmp_path / out

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6, resume=True)
    for name in ("test.safetensors", "state/state.safetensors"):
        assert_same(whole / name, parts / name)
