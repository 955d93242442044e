"""What the LoRA starts from: LoftQ's correction, LoRA-GA's gradients; runs that resume, files that are saved."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize, relative_error, tiny_config

from fluxq import nano
from fluxq.bench.timed_step import SameBatch
from fluxq.caching import Batch
from fluxq.commands.quantize import quantize_command
from fluxq.config import ModelConfig, TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.lora.read import load_lora
from fluxq.kernels import dequantize, quantize
from fluxq.memory.placement import costs_of
from fluxq.model import Flux, add_lora
from fluxq.models import Models
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training import initial
from fluxq.training.defaults import resolve
from fluxq.training.disk import needs_of
from fluxq.training.initial import correct_rounding, empty, follow_gradients, started
from fluxq.training.objective import Objective
from fluxq.training.report import read_log
from fluxq.training.run import Run

QKV = "double_blocks.0.img_attn.qkv"


def objective(rank: int = 2) -> tuple[Objective, dict]:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config()))
    layers = add_lora(flux, rank, 3, targets=r"double_blocks\.0\.img_.*|img_in")
    empty(layers, "lora_ga")
    c = flux.config
    batch = Batch(torch.randn(2, c.in_channels // 4, 8, 6), torch.randn(2, 5, c.context_in_dim),
                  torch.randn(2, c.vec_in_dim), ["a.png", "b.png"])  # fmt: skip
    return Objective(flux, SameBatch(batch, 64), TrainingConfig(batch=2, seed=7)), layers


def test_lora_ga_follows_the_mean_gradient_of_the_first_batches():
    """Against the whole gradient, which a start of full width shows: nearly all that its rank can follow."""
    one, layers = objective()
    before = float(one.loss(0))
    layer, trained = layers[QKV], (layers[QKV].lora_down, layers[QKV].lora_up)
    layer.set_start(torch.eye(layer.in_features), torch.zeros(layer.out_features, layer.in_features))
    layer.lora_down, layer.lora_up = (
        torch.nn.Parameter(torch.zeros_like(t.float())) for t in (layer.start_down, layer.start_up)
    )
    for index in range(3):
        (one.loss(index) / 3).backward()
    gradient = layer.lora_up.grad.double() / layer.lora_scale
    layer.lora_down, layer.lora_up = trained
    layer.set_start(None, None)

    follow_gradients(one, layers, 3, seed=1)
    assert float(one.loss(0)) == before, "the model is as it was"
    assert (layer.lora_down, layer.lora_up) == trained and not layer.lora_down.any() and not layer.lora_up.any()
    down, up = (torch.linalg.qr(t.double())[0] for t in (layer.start_down.T, layer.start_up))
    beside = gradient - up @ (up.T @ gradient)
    beside = beside - (beside @ down) @ down.T
    squares = torch.linalg.svdvals(gradient).square()
    assert 1 - float(beside.square().sum() / squares.sum()) > 0.9 * float(squares[:4].sum() / squares.sum())


def test_lora_ga_is_the_same_for_the_same_seed_and_other_for_another():
    starts = []
    for seed in (1, 1, 2):
        one, layers = objective()
        follow_gradients(one, layers, 1, seed)
        starts.append(layers[QKV].start_down)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_failure_while_gradients_are_measured_leaves_the_lora_as_it_was(monkeypatch):
    """The work is repeated under a smaller plan."""
    one, layers = objective()
    before = {path: (layer.lora_down, layer.lora_up) for path, layer in layers.items()}
    monkeypatch.setattr(initial, "accumulate_gradients", lambda *args: one.loss(0).backward() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        follow_gradients(one, layers, 1, 0)
    assert {path: (layer.lora_down, layer.lora_up) for path, layer in layers.items()} == before
    monkeypatch.setattr(initial, "accumulate_gradients", lambda *args: (one.loss(0) * torch.inf).backward())
    with pytest.raises(WrongRequest, match="is not finite in the first 1 batches"):
        follow_gradients(one, layers, 1, 0)


def test_layers_without_enough_singular_vectors_start_plain():
    """img_in has 16 inputs."""
    _, layers = objective(rank=9)
    assert started(layers, "lora_ga").keys() & {"img_in", QKV} == {QKV}
    assert layers["img_in"].lora_down.any() and not layers[QKV].lora_down.any()
    assert started(layers, "loftq").keys() & {"img_in", QKV} == {QKV}


def test_loftq_starts_nearer_to_the_original_weight():
    models = Models(config_from_dict({"model": {"name": "nano", "format": "nf4"}}, "a test").model, notify=silent)
    flux = models.load_flux()
    layers = add_lora(flux, 8, 4, targets="attention")
    empty(layers, "loftq")
    share = correct_rounding(models, layers, seed=1)
    lost = after = 0.0
    for path, layer in layers.items():
        whole = models.open("flux").value(f"{path}.weight", torch.float32)
        down, up = layer.factors(layer.corrects)
        error = whole - dequantize(layer.frozen, torch.float32)
        lost += float(error.square().sum())
        after += float((error - layer.lora_scale * up.detach() @ down.detach()).square().sum())
    assert 0.03 < share < 0.3 and after / lost == pytest.approx(1 - share, abs=0.001)


def configured(tmp_path, init: str = "plain", **sections):
    photos = tmp_path / "photos"
    if not photos.exists():
        photos.mkdir()
        for i, (image, caption) in enumerate(drawing.concept(seed=5, count=2)):
            image.resize((64, 64)).save(photos / f"{i}.png")
            (photos / f"{i}.txt").write_text(caption)
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "cache": str(tmp_path.parent / "starts"), "resolution": 64},
        "lora": {"rank": 4, "alpha": 2, "init": init, "init_batches": 2}
        if init == "lora_ga"
        else {"rank": 4, "init": init},
        "training": {"steps": 2, "learning_rate": 1e-3},
        "output": {"out": str(tmp_path / init), "name": "x", "plot_seconds": 1e9},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return config_from_dict(values, "a test")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["lora_ga", "loftq"])
def test_a_run_resumes_to_the_bit_and_saves_the_difference(tmp_path, init):
    whole = partial(configured, tmp_path, init, training={"steps": 3})
    train(whole(output={"out": str(tmp_path / "whole")}), notify=silent)
    train(configured(tmp_path, init), notify=silent)
    said: list[str] = []
    train(whole(), resume=True, notify=said.append)
    assert not any("LoRA of" in line for line in said), "the start is that of the state"
    one, other = (Checkpoint(tmp_path / name / "x.safetensors") for name in ("whole", init))
    assert all(torch.equal(one.get(key), other.get(key)) for key in one.keys())
    lora = load_lora(tmp_path / init / "x.safetensors", Models(whole().model).flux_config)
    assert lora.ranks == [8] and lora.adapters[QKV].scale == (0.5 if init == "lora_ga" else 1)
    about = one.metadata
    assert (about["ss_network_dim"], about["fluxq_lora_init"]) == ("8", init)
    if init == "lora_ga":
        train(configured(tmp_path, training={"steps": 1}), notify=silent)
        first = [read_log(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("plain", init)]
        assert first[0] == first[1], "the start is the base model to the bit"
    else:
        kept = whole(lora={"keep_correction": True}, output={"out": str(tmp_path / "kept")})
        train(kept, notify=silent)
        own = load_lora(tmp_path / "kept" / "x.safetensors", Models(whole().model).flux_config).adapters[QKV]
        weight = Models(whole().model).open("flux").value(f"{QKV}.weight", torch.float32)
        error = weight - dequantize(quantize(weight, "nf4"), torch.float32)
        assert own.rank == 4 and relative_error(lora.adapters[QKV].change(), own.change()) > 0.1
        correction = own.change() - lora.adapters[QKV].change()
        assert float((error - correction).norm() / error.norm()) < 0.99


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"format": "bf16"}}, "--lora-init loftq corrects the rounding .* bf16; pass --format nf4"),
        (
            {"lora": {"max_norm": 1.0}},
            "lora.max_norm is not for a LoRA that counts from a start; leave it",
        ),
        ({"lora": {"from_lora": "x.safetensors"}}, "--lora-init loftq and --from-lora both say how the LoRA starts"),
    ],
)
def test_what_cannot_start_so_is_refused(tmp_path, sections, sentence):
    config = configured(tmp_path, "loftq", **sections)
    with pytest.raises(WrongRequest, match=sentence):
        initial.check_init(config, Models(config.model, notify=silent))


def test_a_file_with_only_quantized_weights_is_refused(tmp_path):
    quantize_command(nano.FLUX, tmp_path / "n.safetensors", "nf4")
    config = configured(tmp_path, "loftq")
    config = replace(config, model=ModelConfig(flux=tmp_path / "n.safetensors"))
    with pytest.raises(WrongRequest, match="holds only quantized weights; name the file that it was made from"):
        initial.check_init(config, Models(config.model, notify=silent))


def test_a_weight_that_lost_nothing_is_refused(monkeypatch):
    models = Models(config_from_dict({"model": {"name": "nano", "format": "nf4"}}, "a test").model, notify=silent)
    layers = add_lora(models.load_flux(), 2, 2, targets=QKV.replace(".", r"\."))
    monkeypatch.setattr(initial, "rounding_error", lambda source, name, *rest: torch.zeros(source.shapes[name]))
    with pytest.raises(WrongRequest, match="has nothing to correct: .* already has its weights in nf4"):
        correct_rounding(models, layers, 1)


def test_memory_and_disk_are_planned_for_what_a_start_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxq.memory.placement.measure", lambda folder: SimpleNamespace(capability=86, library=0))
    needs, costs = {}, {}
    for init in ("plain", "loftq", "lora_ga"):
        config = configured(tmp_path, init)
        models = Models(config.model, notify=silent)
        resolved = resolve(config, models, silent)[0]
        needs[init] = {need.what: need.nbytes for need in needs_of(Run(resolved), models, previews=0)}
        costs[init] = costs_of(resolved, models, 64).lora // 6
    assert needs["lora_ga"]["LoRAs"] > 1.9 * needs["plain"]["LoRAs"] and needs["loftq"] == needs["lora_ga"]
    assert needs["lora_ga"]["state twice"] > needs["plain"]["state twice"]
    assert costs["loftq"] == costs["plain"] * 8 // 6 and costs["lora_ga"] == costs["plain"] * (2 * 4 + 8) // 4
