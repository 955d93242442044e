"""The room that a run needs: what it really takes, a line for each disk, and what of it is required."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from fluxq import nano
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.model import FluxConfig
from fluxq.model.costs import tensors
from fluxq.models import Models
from fluxq.training import disk
from fluxq.training.defaults import resolve
from fluxq.training.disk import Need, lora_tensors, needs_of, require_room, state_bytes
from fluxq.training.run import Run

ROOM = 10 << 20


@pytest.fixture
def free(monkeypatch):
    """Sets how much every disk has free."""
    usage = SimpleNamespace(total=1 << 40, free=ROOM)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    return usage


def needs(tmp_path: Path, run: list[Run] | None = None, **sections) -> dict[str, int]:
    (tmp_path / "photos").mkdir(exist_ok=True)
    Image.new("RGB", (96, 96)).save(tmp_path / "photos" / "0.png")
    values = {"model": {"name": "nano"}, "data": {"folders": [str(tmp_path / "photos")], "resolution": 96}}
    values |= {"output": {"out": str(tmp_path / "run"), "name": "x"}, "training": {"steps": 10}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    config = config_from_dict(values, "a test")
    models = Models(config.model)
    own = Run(resolve(config, models, silent)[0])
    return {need.what: need.nbytes for need in needs_of(own, models, previews=2)}


def test_a_line_for_each_disk_and_a_refusal_that_names_the_users_folder(tmp_path, free, monkeypatch):
    disks = {"LoRAs": "a", "state": "a", "cache": "b"}
    monkeypatch.setattr(disk, "by_disk", lambda places: {Path("/a"): ["LoRAs", "state"], Path("/b"): ["cache"]})
    lines: list[str] = []
    wanted = [Need(what, tmp_path / disks[what], 3 << 20, "another --out") for what in disks]
    require_room(wanted, lines.append)
    assert lines == [
        "disk: /a needs up to 6.0 MiB (LoRAs 3.0 MiB, state 3.0 MiB) and has 10.0 MiB free",
        "disk: /b needs up to 3.0 MiB (cache 3.0 MiB) and has 10.0 MiB free",
    ]
    free.free = 5 << 20
    with pytest.raises(
        WrongRequest, match="a has 5.0 MiB free, and 6.0 MiB are needed .*; free some space, or use ano"
    ):
        require_room(wanted, silent)


def test_what_a_run_can_do_without_is_only_a_warning(tmp_path, free):
    lines: list[str] = []
    require_room(
        [Need("previews", tmp_path, 2 * ROOM, "", certain=False), Need("state", tmp_path, 1, "")], lines.append
    )
    assert len(lines) == 2 and lines[1].startswith("warning: previews and log may not fit")


def test_a_disk_that_tells_nothing_is_no_full_disk(tmp_path, free):
    free.total = free.free = 0
    lines: list[str] = []
    require_room([Need("state", tmp_path, ROOM, "")], lines.append)
    assert lines[0].endswith("how much is free is not known")


def test_the_tensors_of_a_lora_are_those_of_its_layers(tmp_path):
    models = Models(config_from_dict({"model": {"name": "nano"}}, "a test").model)
    for text_encoder in (None, "clip_l"):
        lora = {"rank": 4, "targets": ["all"], "text_encoder": text_encoder}
        found = lora_tensors(config_from_dict({"lora": lora}, "a test"), models)
        clip = [s for n, s in models.open("clip_l").shapes.items() if n.startswith("encoder.") and len(s) == 2]
        matrices = [s for n, s in tensors(FluxConfig.nano()).items() if len(s) == 2 and not n.startswith("final_")]
        assert sum(found) == 4 * sum(n + k for n, k in matrices + (clip if text_encoder else []))


def test_kept_loras_count_once_and_previews_by_their_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "quantized"))
    one = needs(tmp_path, output={"save_every": 0})
    every = needs(tmp_path, output={"save_every": 3}, samples={"every": 4})
    kept = needs(tmp_path, output={"save_every": 3, "keep": 2})
    held = {"path": str(tmp_path / "photos"), "resolution": 96}
    (tmp_path / "held").mkdir()
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "held")
    best = needs(tmp_path, output={"save_every": 0}, data={"validation": [held | {"path": str(tmp_path / "held")}]})
    assert best["LoRAs"] == 2 * one["LoRAs"]
    assert [every["LoRAs"], kept["LoRAs"]] == [4 * one["LoRAs"], 3 * one["LoRAs"]]  # at 3, 6, 9 and 10
    assert every["previews"] == 3 * 2 * 3 * 96 * 96 and one["previews"] == 0
    assert one["quantized weights"] > nano.FLUX.stat().st_size // 8


def test_what_the_run_replaces_does_not_count(tmp_path):
    before = needs(tmp_path)
    for name, nbytes in (("state/state.safetensors", 1000), ("x.safetensors", 200), (".x.tmp-00.safetensors", 30)):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(bytes(nbytes))
    after = needs(tmp_path)
    assert (before["state twice"] - after["state twice"], before["LoRAs"] - after["LoRAs"]) == (1000, 230)


def test_a_state_in_8_bits_is_about_half():
    sizes = [1 << 20] * 8
    assert state_bytes(sizes, "adamw", 16) == pytest.approx(2 * state_bytes(sizes, "adamw8bit", 16), rel=0.02)
    assert state_bytes([100], "adamw", 16) == state_bytes([100], "adamw8bit", 16), "small tensors stay in fp32"
