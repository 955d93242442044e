"""`fluxq quantize`, and what training does by itself: the same file, made once and reused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from fluxq import nano
from fluxq.cli.main import main
from fluxq.config import ModelConfig
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.quantized import QuantizedFile, cache_folder, write_quantized
from fluxq.models.parts import Models


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_report_has_each_layers_error_by_format(tmp_path):
    errors = {}
    for format in ("nf4", "fp8", "int8"):
        result = run(
            "quantize", nano.FLUX, tmp_path / f"{format}.safetensors", "--format", format, "--report", "--json"
        )
        assert result.exit_code == 0, result.output
        errors[format] = json.loads(result.stdout)["relative_errors"]
        assert QuantizedFile.open(tmp_path / f"{format}.safetensors").format == format
    layers = errors["nf4"]
    assert set(layers) >= {"double_blocks.*.img_attn.qkv", "single_blocks.*.linear2", "single_blocks.*.modulation.lin"}
    for layer in layers:
        assert 0.07 < errors["nf4"][layer] < 0.11, layer
        assert errors["int8"][layer] < errors["fp8"][layer] < 0.04, layer


def test_a_quantized_file_is_a_base_like_any_other(tmp_path):
    """Training from it needs no quantized copy, and another format is refused."""
    path = tmp_path / "own.safetensors"
    assert run("quantize", nano.FLUX, path, "--format", "int8").exit_code == 0
    photos = tmp_path / "photos"
    photos.mkdir()
    nano_files = ["--ae", nano.AE, "--clip-l", nano.CLIP_L, "--t5xxl", nano.T5XXL]
    from fluxq.nano import drawing

    drawing.concept(1, 1)[0][0].save(photos / "a.png")
    common = ["train", photos, "--flux", path, *nano_files, "--resolution", 96, "--t5-length", 32, "--steps", 1]
    common += ["--cache", tmp_path / "cache", "--out", tmp_path / "run", "--trigger", "zqx"]
    refused = run(*common, "--format", "nf4")
    assert refused.exit_code == 2
    assert "holds int8, not nf4; pass --format int8" in refused.stderr
    trained = run(*common, "--format", "int8")
    assert trained.exit_code == 0, trained.output
    checked = run("check", path)
    assert checked.exit_code == 0
    assert "int8, by fluxq" in checked.output


def test_training_quantizes_once_and_prints_the_disk_space(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path))
    lines: list[str] = []
    for _ in range(2):
        Models(ModelConfig(name="nano"), notify=lines.append).load_flux()
    assert [line for line in lines if "quantizing" in line] == [
        f"quantizing flux1-nano.safetensors to nf4, once: 0.0 GB in {cache_folder()}"
    ]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_width_that_nf4_cannot_hold_is_refused_by_name(tmp_path):
    config = tiny_config(hidden_size=96, num_heads=3, depth=1, depth_single_blocks=1)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in flux_shapes(config).items()}
    save_file(tensors, path := tmp_path / "odd.safetensors")
    result = run("quantize", path, tmp_path / "q.safetensors")
    sentence = (
        f"{path} has double_blocks.0.img_attn.proj.weight of width 96, which is not a multiple of 64 as nf4 needs"
    )
    assert result.exit_code == 2 and f"error: {sentence}; use --format int8 or fp8\n" == result.stderr
    assert os.listdir(tmp_path) == ["odd.safetensors"] and sentence in run("check", "--flux", path).output
    assert run("quantize", path, tmp_path / "q.safetensors", "--format", "int8").exit_code == 0


def test_a_file_replaced_while_it_is_read_writes_nothing(tmp_path):
    """Otherwise half of one model and half of another would be stored under the first one's name."""
    source = open_flux(Path(shutil.copy(nano.FLUX, tmp_path / "flux.safetensors")))

    def replaced(done, total):
        if done == total:
            os.utime(source.path, ns=(0, source.path.stat().st_mtime_ns + 2_000_000_000))

    with pytest.raises(WrongRequest, match=r"flux\.safetensors changed while it was read; start again"):
        write_quantized(tmp_path / "q.safetensors", source, "nf4", {}, torch.device("cpu"), replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["flux.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "fp8", "int8"])
@pytest.mark.parametrize("name", ["single_blocks.1.linear1.weight", "img_in.weight", "double_blocks.0.txt_mlp.2.bias"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, format, name, number):
    tensors = load_file(nano.FLUX)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, tmp_path / "spoilt.safetensors")
    result = run("quantize", tmp_path / "spoilt.safetensors", tmp_path / "x.safetensors", "--format", format)
    assert result.exit_code == 2 and f"has NaN or infinite numbers in {name}; use another file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{ae}", "{tmp}/x.safetensors"], "ae.safetensors"),
        (["{tmp}/absent.safetensors", "{tmp}/x.safetensors"], "absent.safetensors"),
        (["{flux}", "{tmp}/there.safetensors"], "there.safetensors exists"),
        (["{flux}", "{flux}", "--overwrite"], "is a folder or the source itself"),
        (["{flux}", "{tmp}/a.safetensors", "--overwrite"], "is a folder or the source itself"),
        (["{flux}", "{tmp}/x.ckpt"], "x.ckpt must be named .safetensors, like x.safetensors"),
        (["{flux}", "{tmp}", "--overwrite"], "must be named .safetensors"),
    ],
)
def test_wrong_requests_write_nothing(arguments, sentence, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "a.safetensors").mkdir()
    names = {"ae": nano.AE, "flux": nano.FLUX, "tmp": tmp_path}
    result = run("quantize", *(a.format(**names) for a in arguments))
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
