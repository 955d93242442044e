"""Weights to use that are not those that train, as schedule-free optimizers have them: saved, shown, validated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.config import TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.lora.read import load_lora
from fluxq.model import Flux, add_lora
from fluxq.nano import drawing
from fluxq.sampling import sample_images
from fluxq.train import train
from fluxq.training import previews
from fluxq.training.defaults import resolve_optimizer
from fluxq.training.objective import Objective
from fluxq.training.optim import FlatOptimizer, build_optimizer
from fluxq.training.state import Progress, load_state, save_state

AVERAGING, FREE, AUTHORS = "averaging.AveragingSGD", "schedulefree_adamw", "schedulefree.AdamWScheduleFree"
NAMES = [AVERAGING, FREE, AUTHORS]


def trained(name: str, steps: int):
    torch.manual_seed(1)
    layers = add_lora(randomize(Flux(tiny_config())), 8, 8, targets=r"single_blocks\.\d\.linear1")
    parameters = [p for layer in layers.values() for p in (layer.lora_down, layer.lora_up)]
    optimizer = build_optimizer(name, parameters, 1e-2, 0.01)
    for step in range(steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()
    return layers, parameters, optimizer


def needs(name: str) -> None:
    if name != AVERAGING:
        pytest.importorskip("pytorch_optimizer" if name == FREE else "schedulefree")


@pytest.mark.parametrize("name", NAMES)
def test_weights_to_use_are_the_librarys_and_training_goes_on_from_its_own_bits(name):
    needs(name)
    _, parameters, optimizer = trained(name, 3)
    before = [p.detach().clone() for p in parameters]
    expected = [_to_use(name, p, optimizer) for p in parameters]
    with optimizer.evaluating():
        for p, used, own in zip(parameters, expected, before, strict=True):
            torch.testing.assert_close(p.detach(), used, rtol=1e-6, atol=1e-7)
            assert not torch.equal(p, own) and torch.equal(optimizer.trained(p), own)
    assert all(map(torch.equal, before, parameters))
    undisturbed = trained(name, 3)[2]
    for one in (optimizer, undisturbed):
        for flat in one.flats:
            flat.values.grad = torch.ones_like(flat.values)
        one.step()
    assert all(torch.equal(a.values, b.values) for a, b in zip(optimizer.flats, undisturbed.flats, strict=True))


def _to_use(name: str, p: torch.Tensor, optimizer: FlatOptimizer) -> torch.Tensor:
    """By the definition, from the weights that train and z."""
    z = optimizer.state[p]["z"].view(p.shape)
    return z + (2 if name == AVERAGING else 1 / optimizer.param_groups[0]["betas"][0]) * (p.detach() - z)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_saved_meanwhile_is_that_of_training(name, tmp_path):
    """As another thread saves it if a signal comes during a preview."""
    needs(name)
    layers, parameters, optimizer = trained(name, 3)
    before = [p.detach().clone() for p in parameters]
    with optimizer.evaluating():
        save_state(tmp_path / "s.safetensors", Progress({}, 3), layers, optimizer)
    layers2, parameters2, optimizer2 = trained(name, 0)
    load_state(tmp_path / "s.safetensors", layers2, optimizer2)
    assert all(map(torch.equal, before, parameters2))
    with optimizer.evaluating(), optimizer2.evaluating():
        assert all(map(torch.equal, parameters, parameters2))


def test_training_weights_return_after_a_failure():
    _, parameters, optimizer = trained(AVERAGING, 2)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="injected"), optimizer.evaluating():
        raise RuntimeError("injected")
    assert all(map(torch.equal, before, parameters))


def test_of_other_optimizers_they_are_the_weights_that_train():
    _, parameters, optimizer = trained("adamw", 2)
    before = [p.detach().clone() for p in parameters]
    with optimizer.evaluating():
        assert all(map(torch.equal, before, parameters))
        assert all(torch.equal(optimizer.trained(p), p) for p in parameters)


@pytest.mark.parametrize("name", NAMES)
def test_another_schedule_than_constant_is_refused(name):
    needs(name)
    resolve_optimizer(TrainingConfig(optimizer=name, learning_rate=1e-3, warmup=5), silent)
    with pytest.raises(WrongRequest, match=f"{name} averages weights in place of a schedule, which --schedule cosine"):
        resolve_optimizer(TrainingConfig(optimizer=name, learning_rate=1e-3, schedule="cosine"), silent)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_saves_previews_and_validates_by_them_and_resumes_to_the_bit(name, tmp_path, monkeypatch):
    needs(name)
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "held"):
        Path(folder).mkdir()
        for i, (image, caption) in enumerate(drawing.concept(seed=len(folder), count=2)):
            image.resize((64, 64)).save(f"{folder}/{i}.png")
            Path(folder, f"{i}.txt").write_text(caption)
    seen: dict[str, list[torch.Tensor]] = {"preview": [], "validation": []}
    names: list[str] = []

    def sampled(flux: Flux, *rest, **more):
        seen["preview"].append(flux.double_blocks[0].img_attn.qkv.lora_up.detach().clone())
        names.extend(name for name, _ in flux.named_parameters())
        return sample_images(flux, *rest, **more)

    def validated(self: Objective, batches):
        seen["validation"].append(self.flux.double_blocks[0].img_attn.qkv.lora_up.detach().clone())
        return torch.ones(3, 2)

    monkeypatch.setattr(previews, "sample_images", sampled)
    monkeypatch.setattr(Objective, "validation", validated)

    def run(out: str, steps: int, resume: bool = False, **more) -> tuple[dict, dict[str, torch.Tensor]]:
        """The LoRA's file and the state."""
        training = {"steps": steps, "learning_rate": 1e-2, "optimizer": name}
        data = {"folders": ["photos"], "validation": ["held"], "trigger": "zqx", "cache": "cache", "resolution": 64}
        output = {"out": out, "name": "a", "save_every": 2}
        values = {"model": {"name": "nano"}, "data": data, "training": training, "output": output, **more}
        train(config_from_dict(values | {"lora": {"rank": 4}}, "a test"), resume=resume, notify=silent)
        state = Checkpoint(Path(out, "state", "state.safetensors"))
        return load_lora(Path(out, "a.safetensors")).adapters, {key: state.get(key) for key in state.keys()}

    whole, state = run("whole", 4)
    run("parts", 2)
    parts, resumed = run("parts", 4, True)
    assert all(torch.equal(value, resumed[key]) for key, value in state.items())
    path = "double_blocks.0.img_attn.qkv"
    assert torch.equal(whole[path].up, parts[path].up)
    run("previewed", 4, samples={"every": 4, "steps": 1, "width": 64, "height": 64})
    index = names.index(f"{path}.lora_up")
    y, z = state[f"lora.{path}.up"], state[f"optimizer.{index}.z"].view_as(state[f"lora.{path}.up"])
    used = z + (2 if name == AVERAGING else 1 / 0.9) * (y - z)
    assert not torch.allclose(used, y, rtol=1e-3)
    for found in (whole[path].up.float(), seen["preview"][-1], seen["validation"][-1]):
        torch.testing.assert_close(found, used, rtol=1e-2, atol=1e-4)  # the file is in 16 bits
        assert (found - used).norm() < 0.1 * (y - used).norm()
