"""A run that is out of memory continues with smaller plans, and ends with exactly the LoRA of an undisturbed run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.quantized import QuantizedFile
from fluxq.kernels.chunks import CHUNKS
from fluxq.memory.placement import Budget, Placement, placement_of
from fluxq.memory.retry import describe_placement, smaller_placement
from fluxq.model import Flux, FluxConfig
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxq.model.costs import flux_costs
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.offload import HostInputs
from fluxq.offload.gpus import GPUS
from fluxq.offload.planner import GRAIN, plan
from fluxq.offload.plans import Pins
from fluxq.training import previews
from fluxq.training.libraries import import_bitsandbytes

BLOCKS = (("d0.img", "d0.txt"), ("d1.img", "d1.txt"), ("s0",), ("s1",))
SHORT = replace(FluxConfig.dev(), depth=4, depth_single_blocks=8)


@pytest.fixture(scope="module")
def short_blocks():
    with torch.device("meta"):
        return Flux(SHORT).blocks_units


# --- the next smaller placement


def rungs(placement: Placement, training: bool = True, streams: bool = True) -> list[Placement]:
    found = []
    while (following := smaller_placement(placement, BLOCKS, training, streams)) is not None:
        found.append(placement := following)
        assert len(found) < 20
    return found


def test_pinned_policies_go_first_then_inputs_then_units_then_slots():
    found = rungs(Placement(policies="keep_all"))
    assert [p.policies for p in found[:3]] == [(name,) * 4 for name in ("keep_qkv", "keep_attention", "recompute")]
    assert [p.offload for p in found] == [False] * 3 + [True] * (len(found) - 3)
    assert [6 if p.resident is None else len(p.resident) for p in found[3:]] == [6, 3, 1, 0, 0, 0]
    assert [p.slots for p in found[3:]] == [8, 8, 8, 8, 4, 2]
    mixed = smaller_placement(Placement(policies=("", "recompute", "keep_all8", "keep_qkv")), BLOCKS, True, True)
    assert mixed.policies == ("", "recompute", "keep_qkv", "keep_attention"), "none begins to round"
    assert [p.offload for p in rungs(Placement(policies="recompute"), streams=False)] == [True]


def test_without_a_backward_pass_policies_stay():
    found = rungs(Placement(policies="keep_all"), training=False)
    assert {p.policies for p in found} == {"keep_all"}
    assert [len(p.resident or ()) for p in found] == [3, 1, 0, 0, 0]


def test_a_placement_is_described_in_one_line():
    assert describe_placement(Placement(policies="keep_all"), BLOCKS) == (
        "6 of 6 units resident; blocks keep 4 x keep_all, their inputs on the GPU"
    )
    last = Placement((), 2, ("", "recompute", "keep_qkv", "recompute"), True)
    assert describe_placement(last, BLOCKS) == (
        "0 of 6 units resident and 2 slots; blocks keep 2 x recompute, 1 x keep_qkv, their inputs in RAM"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format", "vram"), [("rtx4090", "nf4", 8), ("rtx3060", "nf4", 4), ("rtx4090", "int8", 5)]
)
def test_on_a_gpu_each_new_plan_is_smaller_than_the_last(name, format, vram, short_blocks):
    costs = flux_costs(SHORT, format, img_tokens=1024, chunk=CHUNKS[86])
    budget = Budget(costs, GPUS[name], 64 << 30, Pins(format=format, compute="bf16"))
    placement = placement_of(plan([costs], budget.gpu, vram << 30, budget.ram, budget.pins), budget)
    rounds, made = "keep_all8" in placement.plan.policies, []
    while placement is not None:
        made.append(placement.plan)
        assert (placement.plan.format, placement.plan.compute) == (format, "bf16")
        assert rounds or "keep_all8" not in placement.plan.policies
        placement = smaller_placement(placement, short_blocks, True, True)
    peaks = [p.reserved for p in made]
    assert len(peaks) > 5 and all(b <= 0.95 * a for a, b in zip(peaks, peaks[1:], strict=False))
    assert made[-1].offload and not made[-1].resident, "at last, nothing stays that need not"
    assert rounds or all(a.seconds <= GRAIN * b.seconds for a, b in zip(made, made[1:], strict=False))


@pytest.mark.slow
def test_pins_hold_as_long_as_possible(short_blocks):
    costs = flux_costs(SHORT, "nf4", img_tokens=1024, chunk=CHUNKS[86])
    pins = Pins(format="nf4", compute="bf16", policy="keep_qkv")
    budget = Budget(costs, GPUS["rtx4090"], 64 << 30, pins)
    placement = placement_of(plan([costs], budget.gpu, 5 << 30, budget.ram, pins), budget)
    kept = []
    while (placement := smaller_placement(placement, short_blocks, True, True)) is not None:
        kept.append(set(placement.plan.policies) == {"keep_qkv"})
    assert kept[0] and not kept[-1] and kept == sorted(kept, reverse=True)


def test_what_cannot_be_streamed_stays(short_blocks):
    costs = flux_costs(SHORT, "bf16", img_tokens=1024, chunk=CHUNKS[86])
    pins = Pins(format="bf16", compute="bf16", resident_units=16)
    budget = Budget(costs, GPUS["h200"], None, pins)
    placement = placement_of(plan([costs], budget.gpu, 20 << 30, None, pins), budget)
    while placement is not None:
        assert placement.plan.streamed == 0
        placement = smaller_placement(placement, short_blocks, True, can_stream=False)


# --- runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("room") / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=4)):
        image.resize((96, 96) if i % 3 else (128, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def run(photos: Path, out: Path, *more: object):
    arguments = ["train", photos, "--model", "nano", "--steps", 3, "--out", out, "--cache", photos.parent / "cache"]
    arguments += ["--name", "x", "--resolution", 96, "--batch", 2, "--rank", 4, "--set", "training.accumulate=2"]
    return CliRunner().invoke(main, [str(a) for a in (*arguments, *more)])


def weights(out: Path, name: str = "x.safetensors") -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(out / name)
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


@pytest.fixture(scope="module")
def undisturbed(photos):
    assert run(photos, out := photos.parent / "undisturbed").exit_code == 0
    return weights(out)


class Shortage:
    """Run out of memory at these calls of a function, counted from 1; `before` or after it does its work."""

    def __init__(self, monkeypatch, owner: object, name: str, calls: set[int], after: bool = False):
        self.made, real = 0, getattr(owner, name)

        def function(*arguments, **options):
            self.made += 1
            result = real(*arguments, **options) if self.made not in calls or after else None
            if self.made in calls:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {self.made} GiB. More.")
            return result

        monkeypatch.setattr(owner, name, function)


def assert_undisturbed(result, out: Path, undisturbed, times: int = 1) -> None:
    assert result.exit_code == 0, result.output
    assert result.output.count("out of memory in ") == times, result.output
    found = weights(out)
    assert found.keys() == undisturbed.keys()
    assert all(torch.equal(found[key], undisturbed[key]) for key in found)


@pytest.mark.slow
# A micro-step runs each of nano's two double and two single blocks forward, and replays it on the way back: 8 calls a
# kind in an optimizer step of two micro-steps.
@pytest.mark.parametrize(("kind", "call", "more"), [
    (DoubleStreamBlock, 1, ()),  # forward, the very first
    (SingleStreamBlock, 2 * 4 + 4, ("--policy", "keep_attention")),  # back, in the second step's first micro-step
    (DoubleStreamBlock, 16 + 6, ("--policy", "recompute")),  # forward, in the third step's second one
    (DoubleStreamBlock, 8 + 7, ("--policy", "recompute", "--offload")),  # back; then units are streamed
    (SingleStreamBlock, 8 + 7, ("--policy", "recompute", "--offload", "--resident-units", "3", "--slots", "2")),
])  # fmt: skip
def test_a_step_that_runs_out_of_memory_is_repeated(kind, call, more, photos, undisturbed, tmp_path, monkeypatch):
    Shortage(monkeypatch, kind, "forward", {call})
    result = run(photos, tmp_path, *more)
    assert_undisturbed(result, tmp_path, undisturbed)
    assert f"out of memory in step {1 + (call - 1) // 8} (CUDA out of memory); repeating with" in result.output


@pytest.mark.slow
def test_shortage_after_shortage_goes_down_the_whole_ladder(photos, undisturbed, tmp_path, monkeypatch):
    """If placing the weights again runs out of memory too, that is one more shortage."""
    Shortage(monkeypatch, SingleStreamBlock, "forward", {3, 8, 10, 15, 20, 21})
    Shortage(monkeypatch, QuantizedFile, "read_into", {2})
    result = run(photos, tmp_path)
    assert_undisturbed(result, tmp_path, undisturbed, 7)
    for words in ("4 x keep_qkv", "4 x keep_attention", "4 x recompute", "inputs in RAM", "0 of 6 units"):
        assert words in result.output
    assert '"offload": true' in (tmp_path / "plan.json").read_text()


@pytest.mark.slow
def test_a_step_that_runs_out_just_before_its_update_is_made_once(photos, undisturbed, tmp_path, monkeypatch):
    Shortage(monkeypatch, torch.nn.utils, "clip_grad_norm_", {2})
    assert_undisturbed(run(photos, tmp_path), tmp_path, undisturbed)


@pytest.mark.slow
def test_half_an_update_cannot_be_repeated_and_the_last_save_is_good(photos, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        updates = import_bitsandbytes().optim.optimizer.Optimizer2State
        Shortage(patch, updates, "update_step", {5}, after=True)  # the first of two in step 3
        result = run(photos, tmp_path, "--save-every", 1)
    assert result.exit_code == 2 and "memory ran out while weights were being updated" in result.output
    resumed = CliRunner().invoke(main, ["train", "--resume", str(tmp_path)])
    assert_undisturbed(resumed, tmp_path, undisturbed, 0)


@pytest.mark.slow
def test_no_smaller_plan_gives_an_error_and_the_last_save_is_good(photos, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Shortage(patch, SingleStreamBlock, "forward", set(range(9, 1000)))
        least = ("--policy", "recompute", "--resident-units", 0, "--slots", 4)
        result = run(photos, tmp_path, *least, "--save-every", 1)
    assert result.output.count("out of memory in step 2") == 3  # the smallest plan gets a second try
    assert result.exit_code == 1 and "Traceback" not in result.output
    error = result.output.strip().splitlines()[-1]
    assert error.startswith("error: the GPU ran out of memory; lower --resolution, --batch or --t5-length")
    assert "in step 2 even the smallest plan needs too much memory" in error and "--resume" in error
    resumed = CliRunner().invoke(main, ["train", "--resume", str(tmp_path)])
    assert_undisturbed(resumed, tmp_path, undisturbed, 0)


@pytest.mark.slow
def test_validation_and_previews_are_repeated_too(photos, undisturbed, tmp_path, monkeypatch):
    """Units move to RAM; what blocks keep does not matter here and stays."""
    Shortage(monkeypatch, Flux, "forward", {2})  # in the validation before
    Shortage(monkeypatch, AutoEncoder, "decode", {1, 2, 3, 4})  # whole, again, on 32 rows at a time, and on 8
    shutil.copytree(photos, tmp_path / "held_out")
    held_out = tmp_path / "held_out"
    more = ["--sample-every", 3, "--sample-steps", 2, "--set", f"data.validation=['{held_out}']"]
    result = run(photos, tmp_path, *more)
    assert_undisturbed(result, tmp_path, undisturbed, 2)
    assert "out of memory in validation" in result.output and "out of memory in the preview at step 3" in result.output
    assert "4 x keep_all," in result.output and len(list((tmp_path / "samples").glob("*.png"))) == 3


@pytest.mark.slow
def test_after_a_preview_training_goes_back_to_its_own_placement(photos, undisturbed, tmp_path, monkeypatch):
    """The second preview begins with the placement that the first one needed."""
    Shortage(monkeypatch, previews, "sample_images", {1})
    placed, real = [], Models.place_units
    monkeypatch.setattr(
        Models,
        "place_units",
        lambda self, flux, units, *rest: placed.append(len(units)) or real(self, flux, units, *rest),
    )
    result = run(photos, tmp_path, "--sample-every", 1, "--sample-steps", 1)
    assert_undisturbed(result, tmp_path, undisturbed, 1)
    assert placed == [3, 6, 3, 6, 3], "half of the units in each preview, all in the steps between"
    assert '"resident": null' in (tmp_path / "plan.json").read_text()


@pytest.mark.slow
def test_a_preview_that_never_fits_is_skipped(photos, undisturbed, tmp_path, monkeypatch):
    Shortage(monkeypatch, AutoEncoder, "decode", set(range(1000)))
    least = ("--resident-units", 0, "--slots", 2)
    result = run(photos, tmp_path, *least, "--sample-every", 2, "--sample-steps", 1)
    assert_undisturbed(result, tmp_path, undisturbed, 2)  # the smallest plan twice in each preview
    assert result.output.count("no preview at step") == 2


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--resident-units", "0", "--slots", "2")])
def test_pinned_inputs_in_ram_give_exactly_the_same_lora(more, photos, undisturbed, tmp_path, monkeypatch):
    stored = []
    real = HostInputs.store
    monkeypatch.setattr(HostInputs, "store", lambda self, tensors: stored.append(1) or real(self, tensors))
    assert_undisturbed(run(photos, tmp_path, "--offload", *more), tmp_path, undisturbed, 0)
    assert len(stored) == 3 * 2 * 4
