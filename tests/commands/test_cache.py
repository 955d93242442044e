"""`fluxq cache` within a memory budget: fewer captions at once, images in bands, the same dataset."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from live_bytes import LiveBytes

from fluxq import nano
from fluxq.caching.folders import cache_folders, scan_data
from fluxq.caching.store import Store
from fluxq.cli.main import main
from fluxq.commands.cache import cache_command
from fluxq.config import ModelConfig
from fluxq.config_files import config_from_dict
from fluxq.models.parts import Models
from fluxq.nano import drawing
from fluxq.training.defaults import resolve_data


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=3)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_both_encoders_get_the_budget_and_the_dataset_is_the_same(photos, tmp_path, monkeypatch):
    models, asked = Models(ModelConfig(name="nano"), torch.device("cpu"), notify=lambda line: None), []
    autoencoder, text = models.load_autoencoder, models.load_text_encoders
    monkeypatch.setattr(models, "load_autoencoder", lambda band: asked.append(band) or autoencoder(band))
    monkeypatch.setattr(
        models, "load_text_encoders", lambda budget: asked.append((loaded := text(budget)).group) or loaded
    )
    found = {}
    for budget in (None, 1):
        values = {"folders": [str(photos)], "resolution": nano.SIZE, "cache": str(tmp_path / f"cache {budget}")}
        data = resolve_data(config_from_dict({"data": values}, "a test").data, models, lambda line: None)
        dataset, store = (
            cache_folders(data, scan_data(data), models, (), lambda *progress: None, budget),
            Store(data.cache),
        )
        found[budget] = dataset, [store.text(key) for _, key in sorted(dataset.prompts.items())]
        latents = [store.latents(example.latents[0])[0] for example in dataset.examples]
        found[budget] += (latents,)
    assert asked[0] is None and asked[1] > 3 and asked[2:] == [32, 1]
    assert found[None][0] == found[1][0]
    assert torch.equal(found[None][1][0].t5, found[1][1][0].t5)
    for whole, banded in zip(found[None][2], found[1][2], strict=True):
        torch.testing.assert_close(banded, whole, rtol=1e-4, atol=1e-4)


def test_the_autoencoder_is_gone_before_the_text_encoders_load(photos, tmp_path, monkeypatch):
    load, live = Models.load_text_encoders, []
    monkeypatch.setattr(
        Models, "load_text_encoders", lambda models, *budget: live.append((counted.live, counted.peak)) or load(models)
    )
    values = {"model": {"name": "nano"}, "data": {"folders": [str(photos)], "cache": str(tmp_path / "cache")}}
    with LiveBytes() as counted:
        cache_command(config_from_dict(values, "a test"))
    ((left, peak),) = live
    assert left < 1 << 20 < peak


def test_vram_without_a_gpu_is_refused_before_anything_is_written(photos, tmp_path):
    arguments = ["cache", photos, "--model", "nano", "--vram", "8GiB", "--cache", tmp_path / "cache"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2 and "--vram is for a CUDA GPU, and this machine has none" in result.output
    assert not (tmp_path / "cache").exists()
