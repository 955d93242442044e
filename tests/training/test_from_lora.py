"""Training that starts from a LoRA file, and on top of LoRAs merged into the frozen model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from lora_files import WRITERS
from PIL import Image

from fluxq import nano
from fluxq.cli.main import main
from fluxq.config import LoraConfig, ModelConfig
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import save_lora
from fluxq.kernels import dequantize, quantize
from fluxq.model import Flux, FluxConfig
from fluxq.model.lora import add_adapted
from fluxq.models.parts import Models
from fluxq.training.from_lora import settings_of, start_from

CONFIG = FluxConfig.nano()
SHAPES = flux_shapes(CONFIG)
BLOCKS = [key.removesuffix(".weight") for key, shape in SHAPES.items() if len(shape) == 2 and "_blocks." in key]
PAIR = ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear2")


def adapters(modules, rank=3, alpha=2.0, size=0.1) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(rank)
    made = {}
    for module in modules:
        out, inputs = SHAPES[f"{module}.weight"]
        down = torch.randn(rank, inputs, generator=generator)
        made[module] = Adapter(down, torch.randn(out, rank, generator=generator) * size, alpha)
    return made


def saved(path, some, dialect="kohya"):
    save_lora(path, some, CONFIG, dialect, torch.float32)
    return load_lora(path, CONFIG)


def silent(line: str) -> None:
    pass


def started(lora, requested, notify=silent):
    """The layers of a model that starts from `lora`, and the settings that `requested` resolves to."""
    settings = settings_of(lora, requested, CONFIG, silent)
    layers = add_adapted(Flux(CONFIG), settings.adapted())
    start_from(lora, layers, notify)
    return layers, settings


def change(layer) -> torch.Tensor:
    return layer.lora_scale * layer.lora_up.detach().double() @ layer.lora_down.detach().double()


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
def test_a_run_starts_with_the_files_change_rank_and_scale(tmp_path, dialect):
    wanted = adapters(PAIR)
    layers, settings = started(saved(tmp_path / "x", wanted, dialect), LoraConfig())
    assert layers.keys() == set(PAIR) and settings.rank == 3
    assert settings.alpha == pytest.approx(2.0 if dialect != "diffusers" else 3.0)
    for module, adapter in wanted.items():
        torch.testing.assert_close(change(layers[module]), adapter.change().double(), rtol=1e-5, atol=1e-5)


def test_lower_ranks_and_other_scales_start_the_same_and_can_grow(tmp_path):
    wanted = adapters(PAIR[:1], rank=5, alpha=1.5) | adapters(PAIR[1:], rank=2, alpha=7.0)
    layers, settings = started(saved(tmp_path / "x", wanted), LoraConfig(alpha=4.0, rank=6))
    assert (settings.rank, settings.alpha) == (6, 4.0)
    for module, adapter in wanted.items():
        torch.testing.assert_close(change(layers[module]), adapter.change().double(), rtol=1e-5, atol=1e-5)
        assert (layers[module].lora_up[:, adapter.rank :] == 0).all()
        assert (layers[module].lora_down[adapter.rank :] != 0).any(1).all()  # a component of zeros would never move


def test_ranks_of_layers_and_rank_stabilized_scales_start_the_same_too(tmp_path):
    wanted = adapters(PAIR, rank=4, alpha=8.0)
    requested = LoraConfig(ranks=(f"{re.escape(PAIR[0])}=6",), rank_stabilized=True)
    layers, settings = started(saved(tmp_path / "x", wanted), requested)
    assert (settings.rank, settings.alpha) == (4, 4.0), "alpha / sqrt(rank) is the file's scale"
    assert [len(layer.lora_down) for layer in layers.values()] == [6, 4]
    for module, adapter in wanted.items():
        torch.testing.assert_close(change(layers[module]), adapter.change().double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(WrongRequest, match="adapts layers that lora.targets does not include"):
        started(saved(tmp_path / "y", wanted), LoraConfig(ranks=(f"{re.escape(PAIR[0])}=0",)))


def test_a_lower_rank_is_the_best_of_its_rank_and_its_error_is_printed(tmp_path):
    wanted, lines = adapters(PAIR, rank=4), []
    layers, _ = started(saved(tmp_path / "x", wanted), LoraConfig(rank=2), lines.append)
    lost = whole = 0.0
    for module, adapter in wanted.items():
        values = torch.linalg.svdvals(adapter.change().double())
        own = (change(layers[module]) - adapter.change().double()).norm().item()
        assert own == pytest.approx(values[2:].norm().item(), rel=1e-4)
        lost, whole = lost + own**2, whole + values.square().sum().item()
    assert lines == [f"x was reduced to the rank of this run; relative error: {(lost / whole) ** 0.5:.2%}"]


def test_targets_are_the_files_or_more_but_never_less(tmp_path):
    lora, lines = saved(tmp_path / "x", adapters(PAIR)), []
    more, settings = started(lora, LoraConfig(targets=("attention",)), lines.append)
    assert set(PAIR) < more.keys() and settings.targets == ("attention",)
    assert lines == [f"not in x, so trained from zero: {len(more) - 2} layers"]
    assert all((layer.lora_up == 0).all() for path, layer in more.items() if path not in PAIR)
    with pytest.raises(WrongRequest, match=r"does not include, like single_blocks\.0\.linear2 \(1 in all\)"):
        settings_of(lora, LoraConfig(targets=(re.escape(PAIR[0]),)), CONFIG, silent)


def test_ranks_of_parts_that_add_up_are_printed(tmp_path):
    tensors, _, _ = WRITERS["ai-toolkit"]()
    write_safetensors(tmp_path / "x", tensors)
    lines = []
    settings = settings_of(load_lora(tmp_path / "x", CONFIG), LoraConfig(), CONFIG, lines.append)
    assert settings.rank == 16
    assert lines[1].startswith("rank 16: the file splits fused layers into parts, whose ranks add up; --rank 4 takes")


def test_a_preset_is_recognized(tmp_path):
    lora = saved(tmp_path / "x", adapters([m for m in BLOCKS if not re.search(r"mod", m)]))
    assert settings_of(lora, LoraConfig(), CONFIG, silent).targets == ("attention+mlp",)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 20 + i).convert("RGB").save(folder / f"{i}.png")
    return folder


def train(tmp_path, *more):
    arguments = ["train", *more, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.slow
def test_a_run_starts_from_a_file_and_resumes_without_it(tmp_path, photos):
    path = tmp_path / "old.safetensors"
    wanted = adapters(PAIR, size=0.01)
    saved(path, wanted, "diffusers")
    nano_run = [photos, "--model", "nano", "--trigger", "zqx", "--lr", 0, "--from-lora", path, "--steps"]
    result = train(tmp_path, *nano_run, 1)
    assert result.exit_code == 0, result.output
    written = load_lora(tmp_path / "run/zqx.safetensors", CONFIG).adapters
    assert written.keys() == wanted.keys()
    for module, adapter in wanted.items():
        error = (written[module].change() - adapter.change()).norm() / adapter.change().norm()
        assert error <= 2**-7, module  # a learning rate of 0 changes nothing; the file rounds to bf16
    path.unlink()
    assert train(tmp_path, "--resume", tmp_path / "run", "--steps", 2).exit_code == 0


@pytest.mark.slow
def test_base_loras_are_in_the_weights_before_they_are_quantized(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    one, two = adapters(PAIR), adapters(PAIR[:1], rank=5, alpha=3.0)
    saved(tmp_path / "a=1.safetensors", one)
    saved(tmp_path / "b.safetensors", two, "diffusers")
    loras = (f"{tmp_path / 'a=1.safetensors'}", f"{tmp_path / 'b.safetensors'}=0.8")
    source = open_flux(nano.FLUX)
    for format in ("nf4", "int8", "fp8", "bf16"):
        flux = Models(ModelConfig(name="nano", format=format, base_loras=loras), notify=silent).load_flux()
        plain = Models(ModelConfig(name="nano", format=format), notify=silent).load_flux()
        for module in BLOCKS:
            weight = source.value(f"{module}.weight", torch.float32)
            if module in one:
                weight = weight + one[module].change()
            if module in two:
                weight = weight + 0.8 * two[module].change()
            layer, stored = flux.get_submodule(module), plain.get_submodule(module)
            got = dequantize(layer.frozen, torch.float32)
            if module not in one:
                assert torch.equal(got, dequantize(stored.frozen, torch.float32)), module
            elif format == "bf16":
                assert (got - weight).norm() <= 2**-8 * weight.norm()
            else:  # the same but where the last bit of a sum decides a code
                expected = dequantize(quantize(weight, format), torch.float32)
                assert ((got - expected).abs() > 1e-3).float().mean() <= 1e-4, (format, module)
                assert (got - weight).norm() < 0.11 * weight.norm()


def test_base_loras_and_strengths_have_their_own_caches_and_identities(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.safetensors"
    saved(path, adapters(PAIR))
    seen = set()
    for loras in ((), (f"{path}",), (f"{path}=0.5",), (f"{path}", f"{path}")):
        models = Models(ModelConfig(name="nano", base_loras=loras), notify=silent)
        assert not models.is_quantized
        models.load_flux()
        assert models.is_quantized
        seen.add(models.fingerprint())
    saved(path, adapters(PAIR, rank=4))
    models = Models(ModelConfig(name="nano", base_loras=(f"{path}",)), notify=silent)
    assert not models.is_quantized and models.fingerprint() not in seen
    assert len(seen) == 4 == len(list((tmp_path / "cache").glob("*.safetensors")))


@pytest.mark.slow
def test_a_run_on_a_base_lora_is_the_run_on_the_merged_model(tmp_path, photos):
    """The same losses as on a file into which the LoRA was merged, in fp32, so that nothing is rounded."""
    path = tmp_path / "a.safetensors"
    saved(path, adapters(PAIR, size=0.02))
    source = open_flux(nano.FLUX)
    wide = tmp_path / "wide.safetensors"
    write_safetensors(wide, {name: source.value(name, torch.float32) for name in source.shapes})
    merged = tmp_path / "merged.safetensors"
    merge = ["lora", "merge", f"{path}=0.8", "--base", wide, "--out", merged]
    assert CliRunner().invoke(main, [str(a) for a in merge]).exit_code == 0
    rest = ["--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL, "--t5-length", 32, "--resolution", 96]
    common = [photos, *rest, "--trigger", "zqx", "--steps", 2, "--rank", 4, "--overwrite", "--flux"]
    losses = []
    for which in ([wide, "--base-lora", f"{path}=0.8"], [merged], [wide]):
        result = train(tmp_path, *common, *which)
        assert result.exit_code == 0, result.output
        losses.append(json.loads((tmp_path / "run/result.json").read_text())["loss_last"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(losses[2] - losses[0]) > 1e-3 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--from-lora", "{tmp}/absent.safetensors"], "absent.safetensors does not exist"),
        (["--from-lora", nano.AE], "not a LoRA"),
        (["--from-lora", "{tmp}/big.safetensors"], "was made for a model of other sizes"),
        (["--from-lora", "{tmp}/clip.safetensors"], "adapts only CLIP-L, no layer of the transformer"),
        (["--from-lora", "{tmp}/x.safetensors", "--set", "lora.targets=['txt_in']"], "lora.targets does not include"),
        (["--base-lora", "{tmp}/absent.safetensors"], "absent.safetensors"),
        (["--base-lora", "{tmp}/x.safetensors=much"], "is not a number; write FILE=0.8"),
        (["--base-lora", "{tmp}/big.safetensors=0.5"], "was made for a model of other sizes"),
    ],
)
def test_loras_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, photos, arguments, sentence):
    saved(tmp_path / "x.safetensors", adapters(PAIR))
    save_lora(tmp_path / "clip.safetensors", {}, CONFIG, clip={"encoder.layers.0.mlp.fc1": adapters(PAIR)[PAIR[0]]})
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    tensors = {key: checkpoint.get(key) for key in checkpoint.keys()}
    key = "lora_unet_single_blocks_0_linear2.lora_down.weight"
    write_safetensors(tmp_path / "big.safetensors", tensors | {key: torch.ones(3, 15360)})
    result = train(tmp_path, photos, "--model", "nano", "--steps", 1, *(str(a).format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2
    assert sentence in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_quantized_file_takes_no_base_lora(tmp_path):
    own = tmp_path / "own.safetensors"
    saved(tmp_path / "x.safetensors", adapters(PAIR))
    assert CliRunner().invoke(main, ["quantize", str(nano.FLUX), str(own)]).exit_code == 0
    models = Models(ModelConfig(flux=own, base_loras=(f"{tmp_path / 'x.safetensors'}",)), notify=silent)
    with pytest.raises(WrongRequest, match="--base-lora cannot be merged into it; give the original file"):
        _ = models.flux_config
