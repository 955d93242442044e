"""Saved state: the same bits return, for every optimizer, and another run's state is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.config import OPTIMIZERS
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.model import Flux, add_lora
from fluxq.training.disk import state_bytes
from fluxq.training.libraries import library_of
from fluxq.training.optim import build_optimizer
from fluxq.training.state import Measured, Progress, Validated, load_state, save_state, saved_settings


def trained(optimizer_name: str, steps: int, rank: int = 64):
    """Layers and optimizer after `steps` steps on random gradients; at rank 64 bitsandbytes keeps 8-bit states."""
    torch.manual_seed(1)
    layers = add_lora(randomize(Flux(tiny_config())), rank, 8, targets=r"single_blocks\.\d\.linear1")
    parameters = [p for layer in layers.values() for p in (layer.lora_down, layer.lora_up)]
    optimizer = build_optimizer(optimizer_name, parameters, 1e-2, 0.01)
    advance(parameters, optimizer, 0, steps)
    return layers, parameters, optimizer


def advance(parameters, optimizer, start, stop):
    for step in range(start, stop):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


BEFORE = Measured(0, {"loss": 0.5, "low": 0.25}, {"held_out": {"loss": 0.5}}, {"loss": 0.4})
NEEDS_SECONDS = ("adamw4bit", "adamwfp8", "adafactor", "muon")
"""To import their libraries."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in NEEDS_SECONDS else name for name in OPTIMIZERS]
    + ["torch.optim.NAdam", "torch.optim.SGD"],
)
def test_training_from_a_saved_state_is_bit_exact(name, tmp_path):
    if library_of(name).package == "pytorch_optimizer":
        pytest.importorskip("pytorch_optimizer")
    path = tmp_path / "state.safetensors"
    layers, parameters, optimizer = trained(name, 3)
    saved = Progress({"data": "d", "model": "m"}, 3, 1.5, Validated(BEFORE, None, BEFORE, None, 2, "i"), ["a.b"])
    optimizer.param_groups[0]["weight_decay"] = 0.5
    save_state(path, saved, layers, optimizer)
    advance(parameters, optimizer, 3, 6)
    layers2, parameters2, optimizer2 = trained(name, 0)
    assert load_state(path, layers2, optimizer2) == saved
    assert (optimizer2.done, optimizer2.param_groups[0]["weight_decay"]) == (3, 0.5)
    advance(parameters2, optimizer2, 3, 6)
    for a, b in zip(parameters, parameters2, strict=True):
        assert torch.equal(a, b)
    for p, q in zip(parameters, parameters2, strict=True):
        one, other = optimizer.state[p], optimizer2.state[q]
        assert one.keys() == other.keys()
        tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(one[key], other[key]) for key in tensors)
    sizes = [p.numel() for p in parameters]
    if not name.startswith("torch.optim."):
        assert path.stat().st_size == pytest.approx(state_bytes(sizes, name, 64), rel=0.1), "as predicted"


def test_another_rank_is_refused(tmp_path):
    layers, _, optimizer = trained("adamw", 1)
    save_state(tmp_path / "s.safetensors", Progress({}), layers, optimizer)
    other, _, optimizer = trained("adamw", 0, rank=4)
    with pytest.raises(WrongRequest, match="another rank or other targets"):
        load_state(tmp_path / "s.safetensors", other, optimizer)


@pytest.mark.parametrize("corrects", [False, True])
def test_a_lora_is_loaded_with_its_start(tmp_path, corrects):
    layers, _, optimizer = trained("adamw", 1)
    starts = {
        path: (torch.randn_like(layer.lora_down), torch.randn_like(layer.lora_up)) for path, layer in layers.items()
    }
    for path, layer in layers.items():
        layer.set_start(*starts[path], corrects)
    save_state(tmp_path / "s.safetensors", Progress({}), layers, optimizer)
    fresh, _, optimizer = trained("adamw", 0)
    load_state(tmp_path / "s.safetensors", fresh, optimizer)
    for path, layer in fresh.items():
        assert torch.equal(layer.start_down, starts[path][0].bfloat16()) and layer.corrects == corrects
        assert torch.equal(layer.start_up, starts[path][1].bfloat16())
    next(iter(layers.values())).set_start(torch.zeros(1, 2), torch.zeros(2, 1), corrects)
    save_state(tmp_path / "s.safetensors", Progress({}), layers, optimizer)
    with pytest.raises(WrongRequest, match="is damaged"):
        load_state(tmp_path / "s.safetensors", fresh, optimizer)


def test_a_file_that_is_not_a_state_is_refused(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    layers, _, optimizer = trained("adamw", 0)
    with pytest.raises(WrongRequest, match="is not a saved state of fluxq"):
        load_state(tmp_path / "x.safetensors", layers, optimizer)


def small_state(folder):
    """A state's path, and what `load_state` needs for it."""
    layers = add_lora(randomize(Flux(tiny_config())), 1, 8, targets=r"single_blocks\.0\.linear1")
    optimizer = build_optimizer("adamw", [p for x in layers.values() for p in (x.lora_down, x.lora_up)], 1e-2, 0.01)
    save_state(folder / "s.safetensors", Progress({"settings": "[lora]\nrank = 1\n"}), layers, optimizer)
    return folder / "s.safetensors", layers, optimizer


def test_any_flipped_bit_is_noticed(tmp_path):
    path, layers, optimizer = small_state(tmp_path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    digest = whole.index(b"fluxq_checksum")
    for place in [*range(0, header, 11), *range(header, len(whole), 397)]:
        if place in range(digest, digest + len(b"fluxq_checksum")):
            continue  # then it is like a state of a former version
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        for read in (saved_settings, lambda path: load_state(path, layers, optimizer)):
            with pytest.raises(WrongRequest, match="put a copy of that file back, or .* with --from-lora$"):
                read(path)


def test_a_state_without_a_checksum_is_read(tmp_path):
    path, layers, optimizer = small_state(tmp_path)
    checkpoint = Checkpoint(path)
    tensors = {name: checkpoint.get(name) for name in checkpoint.keys()}
    write_safetensors(path, tensors, {"fluxq_state": checkpoint.metadata["fluxq_state"]})
    assert load_state(path, layers, optimizer).step == 0


def test_a_former_state_has_only_the_losses_before_training(tmp_path):
    path, layers, optimizer = small_state(tmp_path)
    checkpoint = Checkpoint(path)
    about = json.loads(checkpoint.metadata["fluxq_state"])
    del about["facts"]["validated"]
    about["facts"]["validation"] = {"a": 0.5, "b": 0.25}
    tensors = {name: checkpoint.get(name) for name in checkpoint.keys()}
    write_safetensors(path, tensors, {"fluxq_state": json.dumps(about)})
    before = Measured(0, {"loss": 0.375}, {"a": {"loss": 0.5}, "b": {"loss": 0.25}}, {})
    assert load_state(path, layers, optimizer).validation == Validated(before, before, before)


@pytest.mark.parametrize("wrong", [{"waited": "x"}, {"last": {"step": 1}}, {"base": 3}, {"images": "i", "best": [1]}])
def test_a_state_whose_validations_are_not_such_is_damaged(wrong, tmp_path):
    path, layers, optimizer = small_state(tmp_path)
    checkpoint = Checkpoint(path)
    about = json.loads(checkpoint.metadata["fluxq_state"])
    about["facts"]["validated"] |= wrong
    tensors = {name: checkpoint.get(name) for name in checkpoint.keys()}
    write_safetensors(path, tensors, {"fluxq_state": json.dumps(about)})
    with pytest.raises(WrongRequest, match="is damaged"):
        load_state(path, layers, optimizer)


def test_a_setting_that_is_text_where_it_was_a_number_is_damage(tmp_path):
    path, layers, optimizer = small_state(tmp_path)
    checkpoint = Checkpoint(path)
    tensors = {name: checkpoint.get(name) for name in checkpoint.keys()}
    about = json.loads(checkpoint.metadata["fluxq_state"])
    about["groups"][0]["lr"] = "fast"
    write_safetensors(path, tensors, {"fluxq_state": json.dumps(about)})
    with pytest.raises(WrongRequest, match=f"^{re.escape(str(path))} is damaged"):
        load_state(path, layers, optimizer)
