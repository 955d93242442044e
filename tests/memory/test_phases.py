"""Sampling within the memory of training: what is on the GPU while sampling, counted at full width."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from helpers import write_hollow
from hollow import hollow
from live_bytes import LiveBytes

from fluxq.caching.store import Text
from fluxq.config import MemoryConfig, TrainConfig
from fluxq.config_files import config_from_dict
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, flux_shapes
from fluxq.formats.load import load_autoencoder
from fluxq.formats.quantized import assign, layout, view
from fluxq.kernels.chunks import CHUNKS
from fluxq.memory import phases
from fluxq.memory.phases import (
    SAMPLING_MARGIN,
    SAMPLING_SLOTS,
    TOKENS_PER_BATCH,
    UNUSED,
    SamplingLimits,
    band_for,
    gpu_budget,
    least_sampling_bytes,
    place_sampling,
    preview_limits,
    sampling_residents,
)
from fluxq.memory.placement import Budget, Placement, placement_of
from fluxq.model import AutoEncoderConfig, Flux, FluxConfig, add_lora
from fluxq.model.blocks import Scale
from fluxq.model.costs import AUTOENCODER, TILES, flux_costs
from fluxq.offload import Immediate, Schedule, Stored, StreamingRing
from fluxq.offload.footprint import fixed
from fluxq.offload.gpus import GPUS
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins
from fluxq.sampling.decoding import decode_images
from fluxq.sampling.denoising import denoise
from fluxq.sampling.requests import Request

GIB = 2**30
DEV = FluxConfig.dev()
META = torch.device("meta")
UNITS = 76


def skeleton() -> Flux:
    with META:
        return Flux(DEV)


def filled(flux: Flux, resident, slots: int, format: str = "nf4") -> Flux:
    """The transformer at full size on `meta`, streamed: residents in their own memory, the rest in slots.
    Nothing is on the host.
    """
    units = layout(flux_shapes(DEV), format)
    if resident is None:
        resident, slots = [unit for unit in units if not unit.endswith(".mod")], 0
    mods = tuple(block.modulation_unit for block in flux.blocks)

    def place(unit: str, flat: torch.Tensor) -> None:
        assign(flux, {p.name: view(flat, p) for p in units[unit][0]})

    stay = units if not slots else [u for u in units if u in set(resident) or u == "rest"]
    for unit in stay:
        place(unit, torch.empty(units[unit][1], dtype=torch.uint8, device=META))
    if slots:
        schedule = Schedule(flux.blocks_units, frozenset(resident), slots, mods)
        host = {unit: Stored(units[unit][1], ()) for unit in schedule.slot}
        flux.ring = StreamingRing(schedule, host, place, META, Immediate())
    for module in flux.modules():
        if isinstance(module, Scale):
            module.__dict__["is_invertible"] = True  # of no values this cannot be asked
    return flux.eval()


@pytest.fixture
def gpus(monkeypatch):
    """Tensors moved from `meta` to the CPU have no values there."""
    cpu = torch.Tensor.cpu
    empty = lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else cpu(t)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "cpu", empty)


@pytest.fixture
def autoencoder(tmp_path):
    shapes = autoencoder_shapes(AutoEncoderConfig())
    path = write_hollow(tmp_path / "ae.safetensors", dict.fromkeys(shapes, torch.float32), shapes)
    return lambda band: load_autoencoder(path, META).in_bands(band)


def texts() -> dict[str, Text]:
    return {"x": Text(torch.zeros(512, 4096, dtype=torch.bfloat16), torch.zeros(768), "x", 5, False)}


@dataclass
class Full:
    """Models of FLUX.1 dev's shape that are never loaded, on a GPU that does not exist."""

    format = "nf4"
    flux_config, compute, is_nano, text_tokens = DEV, "bf16", False, 512
    device = torch.device("cuda")


def a_plan(pixels: int, resident: int, **pins):
    costs = flux_costs(DEV, "nf4", img_tokens=(pixels // 16) ** 2, chunk=CHUNKS[86])
    pins = Pins(resident_units=resident, policy="recompute", slots=pins.get("slots", 2 if resident < UNITS else None))
    return costs, plan([costs], GPUS["h200"], pins=pins)


@pytest.mark.slow
@pytest.mark.parametrize(("pixels", "resident"), [(512, UNITS), (1024, UNITS // 2), (512, 0)])
def test_previews_take_no_more_than_the_step_of_their_plan(pixels, resident, gpus, autoencoder):
    """With all that stays between steps, including optimizer state and LoRA in bf16. The leanest policy leaves least
    memory: plans that keep more have a higher peak.
    """
    costs, made = a_plan(pixels, resident)
    config = config_from_dict({"data": {"resolution": pixels}}, "a test")
    own = preview_limits(config, Full(), placement_of(made, Budget(costs, GPUS["h200"], None, Pins())))
    shots = [Request("x", seed, pixels, pixels, steps=1, cfg=2.0, negative="x") for seed in (1, 2)]
    flux = skeleton()
    with hollow(), LiveBytes(device="meta") as live:
        filled(flux, made.resident, made.slots)
        add_lora(flux, 16, 16, "attention+mlp")
        state = torch.empty(made.peak["optimizer"] + costs.lora // 3, dtype=torch.uint8, device=META)
        latents = denoise(flux, texts(), shots, tokens=own.tokens)
        gc.collect()
        assert live.live == pytest.approx(fixed(costs, made.residency), rel=0.01)
        sampling_peak, copies = live.peak, getattr(flux.ring, "copies", 0)
        live.reset_peak()
        with patch("fluxq.sampling.decoding.to_image", lambda x: x):
            images = decode_images(autoencoder, latents, own.decoding_bytes, print)
    names = {k: round(v / GIB, 2) for k, v in dict(sampling=sampling_peak, autoencoder=live.peak).items()}
    print(f"{pixels} px, {resident} resident: {names} of {made.peak_bytes / GIB:.2f} GiB that a step is predicted")
    assert state.nbytes and copies > 0 and images[0].shape == (3, pixels, pixels)
    assert max(sampling_peak, live.peak) <= made.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("gib", [2, 4, 8, 24])
def test_sampling_keeps_to_its_budget(gib, gpus):
    """And leaves less than two units of it unused, unless everything is resident."""
    costs = flux_costs(DEV, "nf4", targets=(), chunk=CHUNKS[86])
    budget = int(gib * GIB)
    resident, slots = sampling_residents(costs, 0, budget)
    flux = skeleton()
    with hollow(), LiveBytes(device="meta") as live:
        filled(flux, resident, slots)
        denoise(flux, texts(), [Request("x", 1, 1024, 1024, steps=2)])
    print(f"{gib} GiB: {len(resident) if resident else resident} resident, {live.peak / GIB:.2f} GiB")
    assert live.peak <= budget
    assert resident is None or len(resident) == UNITS or live.peak > budget - 2 * costs.slot - 0.05 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("run", ["moments", "decode"])
def test_the_autoencoder_takes_what_its_band_predicts(run, autoencoder):
    """Weights and maps; the input and a convolution's workspace come on top."""
    pixels = 1024 * 768
    for band, maps in TILES:
        claimed = AUTOENCODER + int(maps * pixels * 128 * 4)
        assert band_for(pixels, claimed) == band
        shape = (1, 3, 1024, 768) if run == "moments" else (1, 16, 128, 96)
        with LiveBytes(device="meta") as live, torch.no_grad():
            loaded, x = autoencoder(band), torch.zeros(shape, device=META)
            getattr(loaded, run)(x)
        print(f"{run} in bands of {band}: {live.peak / GIB:.2f} GiB of {claimed / GIB:.2f}")
        assert live.peak <= claimed + 2 * x.nbytes


def test_the_band_is_the_largest_that_fits_else_the_smallest():
    assert band_for(1 << 20, None) is None
    assert [band_for(1 << 20, gib * GIB) for gib in (8, 4, 2, 1)] == [None, None, 32, 32]
    assert band_for(4 << 20, 8 * GIB) == 32


def memory_config(**values) -> TrainConfig:
    return config_from_dict({"memory": values}, "a test")


def place_at(pixels: int, images: int = 1, lora: int = 0, **values) -> tuple[Placement, SamplingLimits]:
    return place_sampling(memory_config(**values), Full(), [(pixels, pixels)] * images, [16] if lora else [], lora)


@pytest.fixture(autouse=True)
def a_4060ti(monkeypatch):
    monkeypatch.setattr(phases, "measure", lambda folder: GPUS["rtx4060ti"])


def test_a_budget_decides_what_stays_and_how_many_are_sampled_at_once():
    assert place_at(1024, vram="24GiB")[0].resident is None
    few, more = place_at(1024, vram="4GiB")[0], place_at(1024, vram="6GiB")[0]
    assert 0 < len(few.resident) < len(more.resident) < UNITS and few.slots == more.slots == SAMPLING_SLOTS
    assert len(place_at(1024, vram="4GiB", lora=GIB)[0].resident) < len(few.resident)
    assert len(place_at(512, 3, vram="4GiB")[0].resident) < len(place_at(512, vram="4GiB")[0].resident)


def test_images_that_do_not_fit_together_are_sampled_one_by_one():
    costs = flux_costs(DEV, "nf4", targets=(), img_tokens=32 * 32, chunk=CHUNKS[86])
    least = least_sampling_bytes(costs, 0, None) + SAMPLING_MARGIN
    placement, own = place_at(512, 3, vram=f"{least // 2**20 + 1}MiB")
    assert (own.tokens, placement.resident, placement.slots) == (0, (), 2)
    assert place_at(512, 3, vram="4GiB")[1].tokens == TOKENS_PER_BATCH


def test_images_beyond_one_batch_leave_more_to_the_allocator(monkeypatch):
    assert phases.unused_beyond(TOKENS_PER_BATCH) == 0 and phases.unused_beyond(3 * TOKENS_PER_BATCH) == 2 * UNUSED
    placed = len(place_at(1536, vram="5GiB")[0].resident)
    monkeypatch.setattr(phases, "unused_beyond", lambda tokens: 0)
    assert placed < len(place_at(1536, vram="5GiB")[0].resident)


def test_an_image_that_does_not_fit_gives_an_error_with_a_remedy():
    with pytest.raises(
        WrongRequest, match=r"sampling needs at least .* GiB of GPU memory, but only 1.0 GiB may be used"
    ) as told:
        place_at(1024, vram="1GiB")
    enough = re.search(r"--vram (\S+),", str(told.value))[1]
    assert place_at(1024, vram=enough)[0].slots == 2


def test_pins_are_kept_while_sampling():
    assert len(place_at(1024, vram="8GiB", resident_units=10)[0].resident) == 10
    assert len(place_at(1024, vram="8GiB", blocks_to_swap=30, slots=3)[0].resident) == 16
    assert place_at(1024, vram="8GiB", slots=3)[0].slots == 3
    with pytest.raises(WrongRequest, match="sampling needs at least"):
        place_at(1024, vram="4GiB", resident_units=70)


def test_without_vram_the_free_memory_counts(monkeypatch):
    monkeypatch.setattr(phases, "free_gpu_bytes", lambda: 9 * GIB)
    assert gpu_budget(MemoryConfig(), Full.device) == 9 * GIB - SAMPLING_MARGIN
    assert gpu_budget(MemoryConfig(vram="3GiB"), Full.device) == 3 * GIB - SAMPLING_MARGIN
    assert gpu_budget(MemoryConfig(), torch.device("cpu")) is None
    with pytest.raises(WrongRequest, match="--vram is for a CUDA GPU"):
        gpu_budget(MemoryConfig(vram="3GiB"), torch.device("cpu"))


def test_previews_of_a_run_without_a_plan_have_the_default_limits():
    assert preview_limits(TrainConfig(), Full(), Placement()) == SamplingLimits()
