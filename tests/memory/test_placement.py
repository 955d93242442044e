"""The memory of a run: amounts are parsed, units are pinned or streamed, and a GPU gets a plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fluxq import nano
from fluxq.cli.main import main
from fluxq.config import MemoryConfig, ModelConfig, TrainConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.memory import placement as memory
from fluxq.memory.placement import Placement, costs_of, largest_batch, parse_bytes, pinned_residents, place
from fluxq.model import FluxConfig
from fluxq.models.parts import Models
from fluxq.nano import drawing
from fluxq.offload.gpus import GPUS
from fluxq.training.defaults import resolve_format

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 * GIB), ("12", 12 * GIB), ("1.5 gib", 3 * GIB // 2), ("12GB", 12 * 10**9), ("500MiB", 500 * 2**20)],
)
def test_amounts_of_memory_are_parsed(text, expected):
    assert parse_bytes(text, "--vram") == expected


@pytest.mark.parametrize("text", ["", "much", "12 potatoes", "-3", "GiB"])
def test_other_amounts_are_refused_by_name(text):
    with pytest.raises(WrongRequest, match="--vram must be an amount of memory like 12GiB"):
        parse_bytes(text, "--vram")


class Full:
    """Models of FLUX.1 dev's shape that are never loaded, on a GPU that does not exist."""

    flux_config, format, compute, is_nano, text_tokens = FluxConfig.dev(), "nf4", "bf16", False, 512
    device, quantized, format_is_open, disk = torch.device("cuda"), None, True, ("nf4", "int8", "fp8", "bf16")

    def fits_on_disk(self, format: str) -> bool:
        return format in self.disk

    def use_format(self, format: str) -> None:
        self.format, self.format_is_open = format, False


def test_pinned_units_stay_and_the_others_stream():
    models = Models(ModelConfig(name="nano"), torch.device("cpu"))
    total = 2 * models.flux_config.depth + models.flux_config.depth_single_blocks
    assert pinned_residents(MemoryConfig(), models) is None
    assert pinned_residents(MemoryConfig(resident_units=total), models) is None
    assert len(pinned_residents(MemoryConfig(resident_units=1), models)) == 1
    assert len(pinned_residents(MemoryConfig(blocks_to_swap=16), Full())) == 76 - 32
    with pytest.raises(WrongRequest, match="must be 0 to 38, not 39: this model has 76 units"):
        pinned_residents(MemoryConfig(blocks_to_swap=39), Full())
    with pytest.raises(WrongRequest, match="set the same thing"):
        pinned_residents(MemoryConfig(blocks_to_swap=1, resident_units=1), Full())


@pytest.fixture
def a_4060ti(monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda folder: GPUS["rtx4060ti"])
    monkeypatch.setattr(memory, "free_gpu_bytes", lambda: GPUS["rtx4060ti"].vram)
    monkeypatch.setattr(memory, "ram_bytes", lambda: (32 * GIB, 28 * GIB))


def planned(**settings) -> Placement:
    values = {"data": {"resolution": 1024, "folders": ["x"]}, "memory": settings}
    return place(config_from_dict(values, "a test"), Full(), lambda line: None)


def chosen_format(size: int = 1024, models: Full | None = None, **settings) -> str:
    models = models or Full()
    values = {"data": {"resolution": size, "folders": ["x"]}, "memory": settings}
    resolve_format(config_from_dict(values, "a test"), models, lambda line: None)
    return models.format


@pytest.mark.slow
def test_an_unset_format_is_the_most_accurate_of_the_fastest(a_4060ti):
    """The bus of a 4060 Ti hides int8 behind 1,024 px; what is pinned, or read from a quantized file, stays."""
    assert chosen_format(1024) == "int8"
    pinned = Full()
    pinned.format_is_open = False
    assert chosen_format(1024, pinned) == "nf4"


@pytest.mark.slow
def test_gpu_ram_and_disk_have_to_hold_the_format(a_4060ti, monkeypatch):
    assert chosen_format(512, slots=4, policy="keep_all") == "nf4", "the bus does not hide int8"
    assert chosen_format(1024, ram="10GiB") == "nf4"
    full = Full()
    full.disk = ("nf4",)
    assert chosen_format(1024, full) == "nf4"
    monkeypatch.setattr(memory, "measure", lambda folder: GPUS["h200"])
    assert chosen_format(1024, vram="130GiB") == "bf16"
    eight = Full()
    eight.compute, eight.disk = "fp8", ("nf4", "fp8")
    assert chosen_format(1024, eight, vram="20GiB") == "fp8"


def test_a_plan_knows_how_much_this_gpu_dequantizes_at_a_time(a_4060ti, monkeypatch):
    config = config_from_dict({"data": {"folders": ["x"]}}, "a test")
    geforce = costs_of(config, Full(), 1024).scratch
    monkeypatch.setattr(memory, "measure", lambda folder: GPUS["h100"])
    assert costs_of(config, Full(), 1024).scratch - geforce > 30e6


def test_a_trained_text_encoder_is_part_of_the_costs(a_4060ti):
    """Here of nano's size, which is read from its file."""

    class WithClip(Full):
        def open(self, part: str):
            return Models(ModelConfig(name="nano")).open(part)

    plain, more = ({"data": {"folders": ["x"]}, "lora": {"text_encoder": e}} for e in (None, "clip_l"))
    plain, more = (costs_of(config_from_dict(values, "a test"), WithClip(), 512) for values in (plain, more))
    assert more.stays - plain.stays == 2 * sum(math.prod(s) for s in WithClip().open("clip_l").shapes.values())
    assert plain.ahead and not more.ahead


@pytest.mark.slow
def test_a_gpu_gets_a_plan_within_its_budget(a_4060ti):
    small, large = planned(vram="6GiB"), planned(vram="16GiB")
    assert small.plan.peak_bytes < 6 * GIB < large.plan.peak_bytes < 16 * GIB
    assert large.plan.seconds < small.plan.seconds
    assert len(small.policies) == 57 and len(small.resident) < 76


def test_pins_are_kept(a_4060ti):
    pinned = planned(policy="recompute", blocks_to_swap=20, slots=4)
    assert (set(pinned.policies), len(pinned.resident), pinned.slots) == ({"recompute"}, 36, 4)


def test_what_is_preserved_takes_time_and_the_memory_of_gradients_that_wait(a_4060ti):
    said: dict[str | None, str] = {}
    for name in (None, "dog"):
        training, memory = {"steps": 9000, "preserve_class": name}, {"policy": "recompute", "resident_units": 9}
        values = {"data": {"resolution": 512, "folders": ["x"]}, "training": training, "memory": memory}
        lines: list[str] = []
        placed = place(config_from_dict(values, "a test"), Full(), lines.append)
        assert placed.budget is not None and placed.budget.costs.accumulates == (name is not None)
        said[name] = lines[-1]
    assert said["dog"].endswith("; without --preserve-class it would be 2.4 times as fast")
    plain, dog = (re.search(r"to take (\d+)h(\d+)m", said[name]).groups() for name in (None, "dog"))
    assert 60 * int(dog[0]) + int(dog[1]) == pytest.approx(2.4 * (60 * int(plain[0]) + int(plain[1])), rel=0.02)


@pytest.mark.slow
def test_if_nothing_fits_the_error_names_what_would(a_4060ti):
    with pytest.raises(WrongRequest, match=r"needs at least .* try --vram"):
        planned(vram="2GiB")


def test_vram_and_ram_are_refused_on_a_cpu():
    models = Models(ModelConfig(name="nano"), torch.device("cpu"))
    with pytest.raises(WrongRequest, match="this machine has none"):
        place(TrainConfig(memory=MemoryConfig(vram="12GiB")), models, print)
    assert place(TrainConfig(), models, print).policies == "keep_all"


@pytest.mark.slow
@pytest.mark.parametrize("what", [(), ("--set", "lora.targets=all"), ("--text-encoder", "clip_l")])
def test_a_streamed_run_gives_exactly_the_same_lora(what, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=2)):
        image.save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(caption)
    loras = {}
    for name, more in (("resident", []), ("streamed", ["--resident-units", "1", "--slots", "2"])):
        out = tmp_path / name
        arguments = ["train", photos, "--model", "nano", "--steps", 3, "--out", out, "--cache", tmp_path / "cache"]
        arguments += ["--name", "x", "--resolution", nano.SIZE, "--sample-every", 3, "--sample-steps", 2]
        arguments += [*what, *more]
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        loras[name] = (out / "x.safetensors").read_bytes()
        picked = json.loads((out / "plan.json").read_text())
        assert picked["resident"] is None if name == "resident" else len(picked["resident"]) == 1
    header = {name: int.from_bytes(data[:8], "little") for name, data in loras.items()}
    assert loras["resident"][8 + header["resident"] :] == loras["streamed"][8 + header["streamed"] :]


def test_a_step_is_planned_for_the_batch_with_the_most_tokens(tmp_path):
    """Many small images bring more text than one large image has pixels."""
    folders = [{"path": "large", "resolution": 1024}, {"path": "small", "resolution": 256, "batch": 15}]
    config = config_from_dict({"model": {"name": "nano", "t5_length": 512}, "data": {"folders": folders}}, "a test")
    assert largest_batch(config, Models(config.model)) == (15, 256)
    fewer = replace(config, model=replace(config.model, t5_length=2))
    assert largest_batch(fewer, Models(fewer.model)) == (1, 1024)
