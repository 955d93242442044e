"""A streamed transformer equals the resident one bit for bit: in every format, with any slots, residents and policy."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from helpers import Tensors, randomize, tiny_config
from live_bytes import LiveBytes

from fluxq.formats.quantized import QuantizedFile, load_quantized, write_quantized
from fluxq.formats.stream import expect_sampling, expect_training, load_streamed
from fluxq.kernels import FORMATS, POLICIES
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.lora import lora_layers
from fluxq.model.modulation import Lookahead, is_known_ahead
from fluxq.model.units import unit_of
from fluxq.offload import AllResident, HostInputs, Immediate, Late, Staged
from fluxq.offload.arena import Arena
from fluxq.offload.inputs import INPUTS

CPU = torch.device("cpu")
UNITS = ("double_blocks.0.img", "double_blocks.0.txt", "double_blocks.1.img", "double_blocks.1.txt")
UNITS += ("single_blocks.0", "single_blocks.1")
MODULATION = ("double_blocks.0.mod", "double_blocks.1.mod", "single_blocks.0.mod", "single_blocks.1.mod")
RESIDENT = [(), ("double_blocks.0.txt",), ("double_blocks.1.img", "double_blocks.1.txt", "single_blocks.1"), UNITS]
TARGETS = {
    "everything": "all",
    "modulation": [r"double_blocks\.1\.txt_mod\.lin", r"single_blocks\.0\.modulation\.lin"],
    "what makes vec": [r"(time|vector|guidance)_in\..*"],
    "the last rows": [r"final_layer\.adaLN_modulation\.1", r"single_blocks\.1\.linear2"],
    "blocks": "attention+mlp",
    "the last blocks": [r"double_blocks\.1\.img_mlp\.0", r"single_blocks\..*\.linear2"],
    "the last block": [r"single_blocks\.1\.linear1"],
    "nothing after the middle": [r"double_blocks\.0\.txt_attn\.proj"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """format -> the same tiny model written in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    flux = randomize(Flux(tiny_config())).bfloat16()
    source = Tensors(flux.config, {name: t.contiguous() for name, t in flux.state_dict().items()})

    @cache
    def written(format: str) -> QuantizedFile:
        write_quantized(folder / f"{format}.safetensors", source, format, {}, CPU)
        return QuantizedFile.open(folder / f"{format}.safetensors")

    return written


@pytest.fixture(scope="module")
def resident_results(files):
    """(format, targets, policy, compute) -> what `train_sample_train` gives if all weights are resident."""

    @cache
    def made(format: str = "nf4", targets: str = "blocks", policy: str = "recompute", compute: str = "bf16"):
        return train_sample_train(with_lora(load_quantized(files(format), CPU), TARGETS[targets], policy, compute))

    return made


def with_lora(flux: Flux, targets, policy: str, compute: str = "bf16") -> Flux:
    add_lora(flux, 3, 2, targets, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(flux).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.1, generator=generator)
    flux.set_policy(policy)
    flux.set_compute(compute)
    expect_training(flux)
    return flux


def conditioning(flux: Flux, index: int):
    y = torch.randn(2, flux.config.vec_in_dim, generator=torch.Generator().manual_seed(index))
    return torch.tensor([0.3, 0.8]), y, torch.ones(2)


def forward(flux: Flux, seed: int, ahead: Lookahead | None = None) -> torch.Tensor:
    """Micro-step 20 * seed, so that with two examples there are one or two of them in a tile."""
    generator, c, index = torch.Generator().manual_seed(seed), flux.config, 20 * seed
    img = torch.randn(2, 15, c.in_channels, generator=generator)
    txt = torch.randn(2, 7, c.context_in_dim, generator=generator)
    rows = ahead.rows(index) if ahead else None
    return flux(img, image_ids(3, 5), txt, text_ids(7), *conditioning(flux, index), rows)


def lookahead(flux: Flux) -> Lookahead:
    return Lookahead(flux, lambda index: conditioning(flux, index), 2)


def gradients(flux: Flux, seed: int, ahead: Lookahead | None = None) -> list[torch.Tensor]:
    out = forward(flux, seed, ahead)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(flux.parameters()), dy)]


def train_sample_train(flux: Flux) -> list[torch.Tensor]:
    """All outputs and gradients of a step, two sampling passes, an abandoned forward pass, and two steps, the last with
    modulation in the step.
    """
    ahead = lookahead(flux)
    found = gradients(flux, 0, ahead)
    with torch.no_grad():
        found += [forward(flux, seed, ahead) for seed in (1, 2)]
    forward(flux, 4, ahead)
    return [*found, *gradients(flux, 5, ahead), *gradients(flux, 6)]


def on_the_host(flux: Flux, streams) -> Flux:
    """With block inputs in host memory; released memory is filled with NaN."""
    flux.inputs = HostInputs(streams, lambda n: Arena({INPUTS: n}, lambda unit, out: None), poison=True)
    return flux


def assert_equal(flux: Flux, expected: list[torch.Tensor]) -> None:
    found = train_sample_train(flux)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "policy"),
    [*(("nf4", policy) for policy in POLICIES), *((format, "recompute") for format in FORMATS if format != "nf4")],
)
def test_streaming_changes_no_bit(format, policy, files, resident_results):
    """With every timing; NF4 recomputed for every number of slots and several resident sets, the others for some."""
    cases = [(units, slots) for units in RESIDENT for slots in range(2, len(UNITS) - len(units) + 1) or (2,)]
    if (format, policy) != ("nf4", "recompute"):
        cases = [(RESIDENT[0], 5), (RESIDENT[0], 2), (RESIDENT[1], 3)]
    for (resident, slots), streams in zip(cases, itertools.cycle((Immediate, Late))):
        flux = load_streamed(files(format), CPU, resident, slots, streams(), poison=True)
        assert_equal(with_lora(flux, "attention+mlp", policy), resident_results(format, policy=policy))


TIMINGS = [  # told, slots, streams, ahead: every two values occur together, and every value in both rows
    [(True, 2, Late, True), (False, 2, Immediate, False), (False, 3, Late, True)],
    [(True, 3, Immediate, False), (True, 5, Late, False), (False, 5, Immediate, True)],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "told", "slots", "streams", "ahead"),
    [(targets, *timing) for targets, row in zip(TARGETS, itertools.cycle(TIMINGS)) for timing in row],
)
def test_streaming_changes_no_bit_if_only_some_blocks_train(
    targets, told, slots, streams, ahead, files, resident_results
):
    flux = load_streamed(files("nf4"), CPU, UNITS[3:4], slots, streams(), poison=True, ahead=ahead)
    with_lora(flux, TARGETS[targets], "keep_attention")
    if not told:
        flux.ring.expect()
    assert_equal(flux, resident_results(targets=targets, policy="keep_attention"))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "compute"), [("int8", "int8_dx"), ("nf4", "int8"), ("fp8", "fp8_dx")])
def test_streaming_changes_no_bit_in_eight_bits(format, compute, files, resident_results):
    for slots in (2, 4):
        flux = load_streamed(files(format), CPU, UNITS[:1], slots, Late(), poison=True)
        with_lora(flux, "attention+mlp", "recompute", compute)
        assert_equal(flux, resident_results(format, compute=compute))


def test_a_staging_thread_changes_no_bit(files, resident_results):
    buffers = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2)]
    flux = load_streamed(files("nf4"), CPU, (), 3, Staged(Immediate(), buffers), poison=True)
    assert_equal(with_lora(flux, "attention+mlp", "recompute"), resident_results())
    flux.ring.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_inputs_on_the_host_change_no_bit(policy, files, resident_results):
    """With all weights resident and with all streamed. Poison would reveal a reference that something else keeps."""
    resident = load_quantized(files("nf4"), CPU)
    streamed = load_streamed(files("nf4"), CPU, (), 2, Late(), poison=True)
    for flux, streams in ((resident, Immediate()), (streamed, Late())):
        on_the_host(with_lora(flux, "attention+mlp", policy), streams)
        assert_equal(flux, resident_results(policy=policy))


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_inputs_on_the_host_change_no_bit_if_only_some_blocks_train(targets, files, resident_results):
    flux = with_lora(load_quantized(files("nf4"), CPU), TARGETS[targets], "keep_attention")
    assert_equal(on_the_host(flux, Late()), resident_results(targets=targets, policy="keep_attention"))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["forward 1", "forward 3", "backward 3", "backward 0"])
def test_a_failed_step_does_not_change_the_next(at, files, resident_results):
    """Out of memory in a block, forward or backward, with weights and inputs on the host."""
    flux = load_streamed(files("nf4"), CPU, (), 2, Late(), poison=True)
    on_the_host(with_lora(flux, "attention+mlp", "recompute"), Late())
    direction, number = at.split()
    block, calls = flux.blocks[int(number)], []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == (1 if direction == "forward" else 2):  # the second time is the replay
            raise torch.OutOfMemoryError("injected")

    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        gradients(flux, 7)
    hook.remove()
    assert_equal(flux, resident_results())


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_the_model_makes_the_visits_of_the_schedule(targets, files):
    """So no copy is wasted: the copies of a step are those of the schedule."""
    known = is_known_ahead(files("nf4").config, TARGETS[targets])
    flux = with_lora(load_streamed(files("nf4"), CPU, (), 2, Immediate(), ahead=known), TARGETS[targets], "recompute")
    ahead, schedule = lookahead(flux), flux.ring.schedule
    gradients(flux, 0, ahead)
    trained = [i for i, units in enumerate(schedule.blocks) if flux.units_with_backward.issuperset(units)]
    wanted = len(schedule.copies(schedule.step(trained)))
    for _ in range(2):
        before = flux.ring.copies
        gradients(flux, 1, ahead)  # of the same tile
        assert flux.ring.copies - before == wanted
    counts = {"the last blocks": 7 + 1, "the last block": 6, "everything": 16, "what makes vec": 16}
    assert wanted == counts.get(targets, 8 if known else wanted)


@pytest.mark.parametrize("streams", [Immediate, Late])
def test_modulation_can_be_all_that_is_streamed(streams, files, resident_results):
    flux = load_streamed(files("nf4"), CPU, UNITS, 2, streams(), poison=True)
    assert set(flux.ring.schedule.slot) == set(MODULATION)
    assert_equal(with_lora(flux, "attention+mlp", "recompute"), resident_results())


def test_a_tile_copies_each_modulation_weight_once(files):
    """And only as many of the blocks' units as it had to evict."""
    flux = with_lora(load_streamed(files("nf4"), CPU, (), 2, Immediate()), "attention+mlp", "recompute")
    ahead, schedule, asked = lookahead(flux), flux.ring.schedule, []
    gradients(flux, 0, ahead)
    before, resident = flux.ring.copies, flux.ring.resident
    flux.ring.resident = lambda units: asked.append(units) or resident(units)
    gradients(flux, 2, ahead)  # of the next tile
    assert asked[:4] == [(unit,) for unit in MODULATION] and not set(asked[4:]) & set(asked[:4])
    step, passed = schedule.step(), tuple((unit,) for unit in MODULATION)
    assert flux.ring.copies - before == len(schedule.copies(passed + step)) == 4 + 2 + 8


@pytest.mark.parametrize("resident", RESIDENT[:3])
@pytest.mark.parametrize("slots", [2, 3])
def test_sampling_copies_each_unit_once_per_forward_pass(slots, resident, files):
    """And modulation's once in all. A slot that serves only one unit keeps it."""
    flux = load_streamed(files("nf4"), CPU, resident, slots, Immediate(), poison=True)
    expect_sampling(flux)
    ahead, ring, counts = lookahead(flux), flux.ring, []
    with torch.no_grad():
        for _ in range(5):
            before = ring.copies
            forward(flux, 0, ahead)
            counts.append(ring.copies - before)
    streamed = [unit for unit in UNITS if unit not in resident]
    alone = sum(len(streamed[slot::slots]) == 1 for slot in range(slots))
    assert counts[1:] == [len(streamed) - alone] * 4
    assert counts[0] <= len(MODULATION) + len(streamed) + slots


def test_poison_reveals_weights_that_are_read_outside_resident(files):
    flux = load_streamed(files("nf4"), CPU, (), 2, Late(), poison=True)
    with_lora(flux, "attention+mlp", "recompute")
    flux.ring, ring = AllResident(), flux.ring
    with torch.no_grad():
        assert not forward(flux, 0).isfinite().any()
    flux.ring = ring
    with torch.no_grad():
        assert forward(flux, 0).isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_loading_takes_arena_slots_and_residents_only(format, files):
    """In addition, one resident unit at a time; no streamed unit is ever in memory twice."""
    file = files(format)
    length = {unit: file.checkpoint.shape(unit)[0] for unit in file.units}
    with LiveBytes(device="cpu") as counted:
        flux = load_streamed(file, CPU, UNITS[:1], 2, Immediate())
    streamed = flux.ring.schedule.slot
    wanted = sum(length.values()) + 2 * max(length[unit] for unit in streamed)
    assert wanted <= counted.live <= wanted + 4096 + 256 * len(streamed)  # the arena begins at a page
    assert counted.peak <= counted.live + max(n for unit, n in length.items() if unit not in streamed)


@pytest.mark.parametrize("format", FORMATS)
def test_resident_units_have_memory_of_their_own(format, files):
    flux = load_streamed(files(format), CPU, UNITS[:2], 2, Immediate())
    slots = {flux.ring.memory(unit).untyped_storage().data_ptr() for unit in flux.ring.schedule.slot}
    assert len(slots) == 2
    for name, buffer in flux.named_buffers():
        streamed = unit_of(name) in UNITS[2:] + MODULATION
        assert (buffer.untyped_storage().data_ptr() in slots) == streamed, name
    assert sum(p.numel() for p in flux.parameters()) == 0


@pytest.mark.slow
def test_units_are_moved_in_a_model_that_trains(files, resident_results):
    """From all resident to all streamed and back, LoRA and its optimizer unchanged; and with one failure half-way."""
    file, expected = files("nf4"), resident_results(policy="keep_qkv")
    flux = with_lora(load_quantized(file, CPU), "attention+mlp", "keep_qkv")
    parameters = list(flux.parameters())
    for resident, slots in ((UNITS[2:], 3), (UNITS[:1], 2), ((), 4), (UNITS[3:5], 2), (UNITS, 2)):
        load_streamed(file, CPU, resident, slots, Late(), poison=True, into=flux)
        expect_training(flux)
        assert_equal(flux, expected)

    class Failing:
        def __getattr__(self, name):
            return getattr(file, name)

        def read_into(self, unit, out):
            raise torch.OutOfMemoryError(unit)

    with pytest.raises(torch.OutOfMemoryError):
        load_streamed(Failing(), CPU, UNITS[:2], 2, into=flux)
    load_streamed(file, CPU, (), 2, Late(), poison=True, into=flux)
    assert_equal(flux, expected)
    assert all(a is b for a, b in zip(flux.parameters(), parameters, strict=True))


def test_moving_units_never_takes_more_than_before_or_after(files):
    file = files("nf4")
    flux = load_streamed(file, CPU, UNITS[:3], 3, Immediate())
    held = [*flux.buffers(), flux.ring.host._memory, *(slot.memory for slot in flux.ring._slots)]
    live = LiveBytes(held, "cpu")
    held.clear()
    with live:
        before = live.live
        load_streamed(file, CPU, UNITS[:1], 2, Immediate(), into=flux)
        assert live.live < before and live.peak <= before
