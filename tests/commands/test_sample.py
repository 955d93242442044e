"""Sampling: images depend on their seed, not on their batch; strengths, several LoRAs, grids, metadata."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from helpers import randomize, relative_error, tiny_config
from lora_files import WRITERS
from PIL import Image

from fluxq.caching.store import Text
from fluxq.cli.main import main
from fluxq.commands import sample
from fluxq.commands.sample import _texts_of_passes
from fluxq.config import ModelConfig, SamplesConfig
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.read import Lora
from fluxq.memory.phases import SamplingLimits
from fluxq.model import AutoEncoder, AutoEncoderConfig, Flux
from fluxq.model.costs import AUTOENCODER, TILES
from fluxq.model.lora import lora_strength
from fluxq.models.parts import Models
from fluxq.sampling.decoding import sample_images
from fluxq.sampling.denoising import attach_loras
from fluxq.sampling.requests import Request, requests_for
from fluxq.sampling.sheets import labeled_grid, save_image


@pytest.fixture
def models():
    flux = randomize(Flux(tiny_config(in_channels=64, out_channels=64)))
    autoencoder = randomize(AutoEncoder(AutoEncoderConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, groups=2)))
    texts = {p: Text(torch.randn(5, 40), torch.randn(24), p, 3, False) for p in ("a", "b", "")}
    return flux, autoencoder.in_bands, texts


def same(a: Image.Image, b: Image.Image) -> bool:
    """Equal except for the last bit of a color: a batch of another size may sum in another order."""
    difference = torch.frombuffer(bytearray(a.tobytes()), dtype=torch.uint8).int()
    return bool((difference - torch.frombuffer(bytearray(b.tobytes()), dtype=torch.uint8).int()).abs().max() <= 1)


def test_an_image_does_not_depend_on_its_batch(models):
    wanted = [Request("a", 1, 48, 32, 3), Request("b", 2, 32, 32, 3), Request("b", 3, 48, 32, 3)]
    together = sample_images(*models, wanted)
    assert [p.size for p in together] == [(48, 32), (32, 32), (48, 32)]
    for request, image in zip(wanted, together, strict=True):
        assert same(sample_images(*models, [request])[0], image)
    assert not same(together[0], together[2])


def test_progress_counts_every_step_of_every_image(models):
    calls = []
    sample_images(
        *models,
        [Request("a", 1, 32, 32, 3), Request("b", 2, 48, 32, 2)],
        lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (5, 5)
    assert [total for _, total in calls] == [5] * len(calls)


def test_the_autoencoder_is_loaded_after_denoising_and_for_the_largest_image(models):
    flux, load, texts = models
    loads, done = [], []
    wanted = [Request("a", 1, 32, 32, 3), Request("b", 2, 64, 32, 2)]
    least = AUTOENCODER + int(TILES[0][1] * 64 * 32 * 128 * 4)
    for room in (least, least - 1):
        sample_images(
            flux,
            lambda band: loads.append((band, done[-1])) or load(band),
            texts,
            wanted,
            lambda steps, total: done.append(steps),
            SamplingLimits(decoding_bytes=room),
        )
    assert loads == [(None, 5), (TILES[1][0], 5)]


def test_true_guidance_moves_away_from_the_negative_prompt(models):
    def image(cfg, negative=""):
        return sample_images(*models, [Request("a", 1, 32, 32, 3, cfg=cfg, negative=negative)])[0]

    assert same(image(1.0), image(1.0, "b"))  # not used at 1
    assert same(image(5.0, "a"), image(1.0))  # away from itself is nowhere
    assert not same(image(5.0, "b"), image(1.0))


def adapters(flux, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = flux.single_blocks[0].linear1
    down = torch.randn(rank, layer.in_features, generator=generator)
    return {"single_blocks.0.linear1": Adapter(down, torch.randn(layer.out_features, rank, generator=generator), 2.0)}


def test_loras_add_up_at_their_strengths(models):
    flux, *_ = models
    x = torch.randn(1, 4, 64)
    layer = flux.single_blocks[0].linear1
    base = layer(x)
    one, two = adapters(flux, 3, 0), adapters(flux, 5, 1)
    delta = {}
    for name, lora in (("one", one), ("two", two)):
        attach_loras(flux, [(lora, 1.0)])
        delta[name] = layer(x) - base
    attach_loras(flux, [(one, 0.5), (two, -2.0)])
    torch.testing.assert_close(layer(x), base + 0.5 * delta["one"] - 2.0 * delta["two"], rtol=1e-4, atol=1e-3)
    with lora_strength(flux, 0.0):
        torch.testing.assert_close(layer(x), base)
    attach_loras(flux, [])
    assert list(flux.parameters()) == []


def test_requests_take_unset_sides_from_the_resolution():
    samples = SamplesConfig(prompts=("a", "b"), width=64, seed=5)
    made = requests_for(samples, samples.prompts, 96)
    assert [(s.prompt, s.seed, s.width, s.height) for s in made] == [("a", 5, 64, 96), ("b", 6, 64, 96)]


@pytest.mark.slow
@pytest.mark.parametrize("grid", [[], ["--grid", "--strength", "0", "--strength", "1"]])
def test_streamed_units_sample_the_same_images(grid, tmp_path):
    common = ["sample", "--model", "nano", "--prompt", "a red star", "--prompt", "a circle", "--steps", "2", *grid]
    common += ["--cache", str(tmp_path / "cache")]
    for name, more in (("resident", []), ("streamed", ["--resident-units", "1", "--slots", "2"])):
        result = CliRunner().invoke(main, [*common, *more, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        assert ("units of weights stay on the GPU, the rest streams from RAM through 2 slots" in result.output) == (
            name == "streamed"
        )
    files = sorted(path.name for path in (tmp_path / "resident").iterdir())
    assert len(files) == 2
    for name in files:
        assert (tmp_path / "resident" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_only_one_model_is_loaded_at_a_time(tmp_path, monkeypatch):
    """Text encoders, then the transformer, then the autoencoder."""
    there, loads = weakref.WeakValueDictionary(), []

    def watch(name):
        load = getattr(Models, name)

        def watched(models, *arguments):
            loads.append((name, sorted(there)))
            there[name] = loaded = load(models, *arguments)
            return loaded

        monkeypatch.setattr(Models, name, watched)

    for name in ("load_text_encoders", "load_flux", "load_autoencoder"):
        watch(name)
    arguments = ["sample", "--model", "nano", "--prompt", "a red star", "--steps", "1", "--resident-units", "0"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert loads == [("load_text_encoders", []), ("load_flux", []), ("load_autoencoder", [])]


def test_vram_without_a_gpu_is_refused(tmp_path):
    result = CliRunner().invoke(main, ["sample", "--model", "nano", "--prompt", "x", "--vram", "8GiB"])
    assert result.exit_code == 2 and "--vram is for a CUDA GPU, and this machine has none" in result.output


def test_settings_are_in_the_png(tmp_path):
    request = Request("a cat", 7, 32, 32, 4, guidance=2.5, cfg=2.0, negative="dog")
    save_image(Image.new("RGB", (32, 32)), tmp_path / "x.png", request, LoRA="cat (0.8)")
    assert Image.open(tmp_path / "x.png").text["parameters"] == (
        "a cat\nNegative prompt: dog\nSteps: 4, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 2.5, Seed: 7, "
        "Size: 32x32, LoRA: cat (0.8)"
    )


def test_a_grid_has_every_image_in_its_cell():
    colors = [["red", "green"], ["blue", "yellow"], ["white", "black"]]
    rows = [[Image.new("RGB", (96, 64), color) for color in row] for row in colors]
    sheet = labeled_grid(rows, ["first row", "second", "a very long label of the third row"], ["left", "right"])
    found = {color for _, color in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)} <= found


def test_encoding_of_prompts_shows_its_progress(tmp_path, monkeypatch):
    """T5's file may take minutes to read: its blocks count as captions done."""
    calls = []
    monkeypatch.setattr(sample, "progress_bar", lambda: nullcontext(lambda *call: calls.append(call)))
    arguments = ["sample", "--model", "nano", "--prompt", "a red star", "--prompt", "a circle", "--steps", "1"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [call for call in calls if call[0] == "captions"] == [("captions", 1, 3), ("captions", 3, 3)]
    assert calls[-1] == ("sampling", 2, 2)


def test_prompts_that_are_too_long_are_named(tmp_path):
    arguments = ["sample", "--model", "nano", "--prompt", "red star " * 50, "--steps", "1"]
    arguments += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    lines = CliRunner().invoke(main, arguments).output.splitlines()
    prompt = f"the prompt {('red star ' * 7)[:60]!r}".removesuffix("'") + "...'"
    assert f"{prompt} is longer than 32 T5 tokens; the rest was cut off" in lines
    assert f"{prompt} is longer than 77 CLIP tokens; only T5 sees the rest" in lines


@pytest.mark.slow
def test_any_dialect_is_applied_with_its_clip_part(tmp_path):
    """OneTrainer's file as it is, converted, without its CLIP-L part, and no LoRA."""
    tensors, _, _ = WRITERS["OneTrainer legacy"]()
    tensors = {key: tensor if key.endswith(".alpha") else tensor * 0.1 for key, tensor in tensors.items()}
    write_safetensors(tmp_path / "without.safetensors", tensors)
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora"
    tensors |= {f"{name}_down.weight": torch.randn(4, 64), f"{name}_up.weight": torch.randn(256, 4)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    runner, images = CliRunner(), []
    paths = [str(tmp_path / f"{n}.safetensors") for n in ("x", "y", "without")]
    assert runner.invoke(main, ["lora", "convert", *paths[:2]]).exit_code == 0
    common = ["sample", "--model", "nano", "--prompt", "a red star", "--steps", "1", "--cache", str(tmp_path / "cache")]
    for lora in (*(["--lora", path] for path in paths), []):
        result = runner.invoke(main, [*common, "--out", str(tmp_path / "out"), *lora, "--json"])
        assert result.exit_code == 0, result.output
        (file,) = json.loads(result.stdout)["files"]
        images.append(Image.open(file).copy())  # none replaces another
    assert same(images[0], images[1])
    assert not any(same(images[i], images[j]) for i, j in ((0, 2), (0, 3), (2, 3)))


def test_prompts_are_encoded_by_the_clip_of_each_pass(tmp_path):
    """As by a CLIP-L with the LoRAs merged into its weights. CLIP-L is not loaded for passes without such LoRAs."""
    models, texts, loras = Models(ModelConfig(name="nano")), dict[str, Text](), list[Lora]()
    with torch.no_grad():
        texts = {p: Text(torch.zeros(2, 3), models.load_clip().pooled([p])[0], p, 1, False) for p in ("red", "a star")}
    for rank in (2, 3):
        torch.manual_seed(rank)
        clip = {"encoder.layers.0.mlp.fc1": Adapter(torch.randn(rank, 64), 0.1 * torch.randn(256, rank), 5.0)}
        clip |= {"encoder.layers.1.self_attn.q_proj": Adapter(torch.randn(rank, 64), torch.randn(64, rank), 1.0)}
        loras.append(Lora(tmp_path, models.flux_config, "kohya", {}, clip, {}))
    encoded = _texts_of_passes(models, texts, [[(loras[0], 0.5), (loras[1], 2.0)], [], [(loras[1], 1.0)]])
    for pass_, strengths in zip(encoded, [(0.5, 2.0), (0.0, 0.0), (0.0, 1.0)], strict=True):
        merged = models.load_clip()
        for lora, strength in zip(loras, strengths, strict=True):
            for module, adapter in lora.clip.items():
                layer = merged.get_submodule(module)
                layer.weight = layer.weight + strength * adapter.change()
        assert pass_.keys() == texts.keys()
        for prompt, text in pass_.items():
            assert relative_error(text.clip, merged.pooled([prompt])[0]) <= 1e-5
            assert text.t5 is texts[prompt].t5
    assert relative_error(encoded[0]["red"].clip, texts["red"].clip) > 0.01
    assert _texts_of_passes(Models(ModelConfig()), texts, [[], []]) == [texts, texts]
