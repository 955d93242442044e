"""Differential output preservation: the loss is its formula, and what the class looks like stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomize, tiny_config

from fluxq.bench.timed_step import SameBatch
from fluxq.caching import Batch
from fluxq.commands.cache import cache_command
from fluxq.config import ModelConfig, TrainConfig, TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.data.captions import in_class
from fluxq.errors import WrongRequest
from fluxq.flow import sample_noise, velocity
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.stream import expect_training
from fluxq.model import Flux, add_lora
from fluxq.model.lora import lora_layers, lora_strength
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training.objective import Objective
from fluxq.training.optim import build_optimizer, optimizer_step
from fluxq.training.timesteps import sample_timesteps

TRAINING = TrainingConfig(batch=2, seed=7, guidance=1.5, preserve_class="dog", preserve_weight=0.5)


def objective(targets: str = "attention", captions=("dog", "a dog"), training: TrainingConfig = TRAINING) -> Objective:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    for layer in add_lora(flux, 2, 3, targets).values():
        torch.nn.init.normal_(layer.lora_up, std=0.05)
    c, names = flux.config, ["photos/a.png", "photos/b.png"]
    latents = torch.randn(2, c.in_channels // 4, 8, 6)

    def batch(captions) -> SameBatch:
        txt, pooled = torch.randn(2, 5, c.context_in_dim), torch.randn(2, c.vec_in_dim)
        return SameBatch(Batch(latents, txt, pooled, names, captions), 64)

    return Objective(flux, batch(("zqx", "a zqx")), training, in_class=batch(captions))


def expected(one: Objective, index: int) -> torch.Tensor:
    """Of each image, by the definition."""
    assert one.in_class is not None
    batch, other = one.batches.batch(index), one.in_class.batch(index)
    t = sample_timesteps(one.training, index, batch.examples, 12)
    noise = sample_noise(batch.latents.shape[1:], 7, index, batch.examples)
    mix = t[:, None, None, None]
    x = (1 - mix) * batch.latents + mix * noise
    now = velocity(one.flux, x, t, other.txt, other.pooled, 1.5)
    with torch.no_grad(), lora_strength(one.flux, 0.0):
        base = velocity(one.flux, x, t, other.txt, other.pooled, 1.5)
    return (now - base).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_loss_is_its_formula(targets):
    """Also if LoRA changes modulation, which is then computed in each pass."""
    one = objective(targets)
    plain = float(one.loss(3))
    flow, kept = [term.detach() for term in one.terms(3)]
    assert float(flow) == plain and float(kept) > 1e-3
    torch.testing.assert_close(kept, 0.5 * expected(one, 3).mean(), rtol=1e-5, atol=0)


def test_an_image_without_a_trigger_counts_nothing():
    one = objective(captions=("zqx", "a dog"))
    *_, kept = one.terms(3)
    torch.testing.assert_close(kept, 0.5 * expected(one, 3)[1] / 2, rtol=1e-5, atol=0)
    assert len([*objective(captions=("zqx", "a zqx")).terms(3)]) == 1


def test_without_lora_nothing_is_to_be_kept():
    one = objective()
    for layer in lora_layers(one.flux).values():
        torch.nn.init.zeros_(layer.lora_up)
    *_, kept = one.terms(0)
    assert float(kept) == 0


def test_a_step_follows_both_gradients_one_pass_after_the_other():
    """And says both losses."""
    one = objective()
    parameters = [*one.flux.parameters()]
    sum(one.terms(0)).backward()
    total = [p.grad.clone() for p in parameters]
    told = float(sum(one.terms(0)))
    optimizer = build_optimizer("torch.optim.SGD", parameters, 1.0, 0.0)
    before = [p.detach().clone() for p in parameters]
    loss, _ = optimizer_step(optimizer, one, 0, 1, 1.0, 0.0)
    assert loss == pytest.approx(told, rel=1e-6)
    for p, q, gradient in zip(parameters, before, total, strict=True):
        torch.testing.assert_close(q - p.detach(), gradient, rtol=1e-3, atol=1e-6)


def test_the_ring_knows_that_no_backward_pass_follows_the_base_models():
    """Otherwise it copies 16 units a step, not 12."""
    flux = Models(ModelConfig(name="nano"), notify=silent).load_flux([], 4, True)
    add_lora(flux, 4, 4)
    expect_training(flux)
    c, latents = flux.config, torch.randn(1, flux.config.in_channels // 4, 8, 8)

    def batch(caption: str) -> SameBatch:
        return SameBatch(
            Batch(latents, torch.randn(1, 5, c.context_in_dim), torch.randn(1, c.vec_in_dim), ["a"], [caption]), 64
        )

    one = Objective(flux, batch("zqx"), replace(TRAINING, steps=9), in_class=batch("dog"))
    copies = []
    for index in range(3):
        for term in one.terms(index):
            term.backward()
        copies.append(flux.ring.copies)
    assert [b - a for a, b in zip(copies, copies[1:], strict=False)] == [12, 12]


@pytest.mark.slow
def test_the_output_for_the_class_moves_less_with_it_than_without():
    """And the images are learned with it too."""
    moved, learned = {}, {}
    for weight in (None, 20.0):
        one = objective(training=replace(TRAINING, preserve_weight=weight or 1.0))
        other, probe = one.in_class, objective()
        one.in_class, probe.flux = other if weight else None, one.flux
        parameters = [*one.flux.parameters()]
        for p in parameters[1::2]:
            torch.nn.init.zeros_(p)
        before = float(one.loss(0))
        optimizer = build_optimizer("adamw", parameters, 2e-2, 0.0)
        for step in range(20):
            optimizer_step(optimizer, one, step, 1, 1.0, 1.0)
        moved[weight], learned[weight] = float(expected(probe, 99).mean()), before - float(one.loss(0))
    assert moved[20.0] < 0.5 * moved[None] and learned[20.0] > 0.5 * learned[None] > 0


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("zqx", "dog"),
        ("ZQX, a zqxy and a zqx's hat", "dog, a zqxy and a dog's hat"),
        ("a cat", "a cat"),
    ],
)
def test_the_class_takes_the_place_of_the_trigger(caption, expected):
    assert in_class(caption, " zqx ", "dog") == expected
    assert in_class(caption, "", "dog") == in_class(caption, None, "dog") == caption


def photos(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=3)):
        image.resize((64, 64)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return str(folder)


def settings(tmp_path: Path, out: str, steps: int, memory: dict | None = None, **more) -> TrainConfig:
    data = {"folders": [photos(tmp_path / "photos")], "trigger": drawing.TRIGGER, "cache": str(tmp_path / "cache")}
    training = {"steps": steps, "learning_rate": 5e-3, "optimizer": "adamw", **more}
    values = {
        "model": {"name": "nano"},
        "data": {**data, "resolution": 64, "caption_dropout": 0.3},
        "lora": {"rank": 8},
        "training": training,
        "memory": memory or {},
        "output": {"out": str(tmp_path / out), "name": "a", "plot_seconds": 1e9},
    }
    return config_from_dict(values, "a test")


def run(tmp_path: Path, out: str, steps: int, resume: bool = False, **more) -> None:
    train(settings(tmp_path, out, steps, **more), resume=resume, notify=silent)


def state(tmp_path: Path, out: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(tmp_path / out / "state" / "state.safetensors")
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_streamed_or_not(tmp_path):
    run(tmp_path, "whole", 4, preserve_class="circle")
    run(tmp_path, "parts", 2, preserve_class="circle")
    run(tmp_path, "parts", 4, True, preserve_class="circle")
    run(tmp_path, "streamed", 4, memory={"resident_units": 0, "slots": 3}, preserve_class="circle")
    run(tmp_path, "plain", 4)
    whole = state(tmp_path, "whole")
    for other in ("parts", "streamed"):
        assert all(torch.equal(value, state(tmp_path, other)[key]) for key, value in whole.items()), other
    assert not all(torch.equal(value, state(tmp_path, "plain")[key]) for key, value in whole.items())


@pytest.mark.slow
def test_fluxq_cache_encodes_the_captions_with_the_class_too(tmp_path):
    cache_command(settings(tmp_path, "run", 1, preserve_class="circle"))
    before = {*(tmp_path / "cache" / "text").rglob("*.safetensors")}
    run(tmp_path, "run", 1, preserve_class="circle")
    assert before and {*(tmp_path / "cache" / "text").rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"training": {"preserve_class": "dog"}},
            "--preserve-class dog takes the place of the trigger in captions; give",
        ),
        ({"training": {"preserve_class": "Zqx"}, "data": {"trigger": "zqx"}}, "--preserve-class 'Zqx' must name what"),
        ({"training": {"preserve_class": " "}, "data": {"trigger": "zqx"}}, "--preserve-class ' ' must name what the"),
        (
            {"training": {"preserve_class": "dog"}, "data": {"trigger": "z"}, "lora": {"text_encoder": "clip_l"}},
            "--preserve-class compares with the base model, which needs its own CLIP-L",
        ),
    ],
)
def test_what_cannot_be_preserved_is_refused(values, sentence, tmp_path):
    data = {"folders": [photos(tmp_path / "photos")], "cache": str(tmp_path / "cache"), **values.pop("data", {})}
    values |= {"data": data, "model": {"name": "nano"}, "output": {"out": str(tmp_path / "run")}}
    with pytest.raises(WrongRequest, match=sentence):
        train(config_from_dict(values, "a test"), notify=silent)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
