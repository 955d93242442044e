"""The quantized file: its contents and path, and that it is written once and completely."""

from __future__ import annotations

import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import Tensors, randomize, relative_error, tiny_config
from safetensors.torch import load_file, save_file

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats import quantized
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.quantized import (
    QuantizedFile,
    cached,
    fingerprint,
    layout,
    load_quantized,
    write_quantized,
)
from fluxq.kernels import FORMATS, dequantize, quantize
from fluxq.model import Flux, FluxConfig
from fluxq.model.linear import Linear
from fluxq.model.units import REST, by_unit

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path) -> Tensors:
    flux = randomize(Flux(tiny_config())).bfloat16()
    tensors = {name: t.contiguous() for name, t in flux.state_dict().items()}
    write_safetensors(tmp_path / "tiny.safetensors", tensors)
    return Tensors(flux.config, tensors, (tmp_path / "tiny.safetensors",))


@pytest.mark.parametrize("format", FORMATS)
def test_written_tensors_are_the_quantized_ones(format, source, tmp_path):
    write_quantized(tmp_path / "q.safetensors", source, format, {}, CPU)
    flux = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU)
    assert sorted(source.asked) == sorted(source.tensors)  # each read once
    for path, module in flux.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            if name in ("weight", "bias") or not isinstance(module, Linear):
                assert torch.equal(module.get_buffer(name), source.tensors[f"{path}.{name}"])
        if isinstance(module, Linear):
            expected = quantize(source.tensors[f"{path}.weight"], format if "_blocks." in path else "bf16")
            assert type(module.frozen) is type(expected)
            assert torch.equal(dequantize(module.frozen, torch.float32), dequantize(expected, torch.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_units_are_contiguous_and_aligned_in_the_file(format, source, tmp_path):
    path = tmp_path / "q.safetensors"
    write_quantized(path, source, format, {}, CPU)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 256 == 0
    file = QuantizedFile.open(path)
    assert set(file.units) == set(header) - {"__metadata__"}
    for unit, places in file.units.items():
        begin, end = header[unit]["data_offsets"]
        assert begin % 256 == 0
        assert end % 256 == 0
        flat = torch.frombuffer(bytearray(raw[8 + length + begin : 8 + length + end]), dtype=torch.uint8)
        assert torch.equal(file.read(unit), flat)
        out = torch.empty(len(flat) + 2, dtype=torch.uint8)
        file.read_into(unit, out[1:-1])
        assert torch.equal(out[1:-1], flat)
        with pytest.raises(ValueError, match=f"has {len(flat):,} bytes, not {len(out):,}"):
            file.read_into(unit, out)
        assert all(place.start % 256 == 0 for place in places)


def test_equal_units_have_one_size_at_full_width():
    """76 units of 113,246,208 weights, 63.7 MB each in NF4 and 113.2 MB in 8 bits, besides biases and norms."""
    from fluxq.formats.checkpoint.shapes import flux_shapes

    for format, expected in (("nf4", 113_246_208 * 9 / 16), ("int8", 113_246_208), ("bf16", 113_246_208 * 2)):
        units = layout(dict(flux_shapes(FluxConfig.dev())), format)
        streamed = {u: size for u, (_, size) in units.items() if u != REST and not u.endswith(".mod")}
        assert len(streamed) == 76
        assert all(expected <= size < expected * 1.003 for size in streamed.values())


def test_every_tensor_has_one_unit():
    from fluxq.formats.checkpoint.shapes import flux_shapes

    shapes = flux_shapes(FluxConfig.dev())
    units = by_unit(shapes)
    assert sorted(n for names in units.values() for n in names) == sorted(shapes)
    assert len(units) == 76 + 57 + 1
    assert units["double_blocks.3.txt"] == [
        n for n in shapes if n.startswith(("double_blocks.3.txt_attn", "double_blocks.3.txt_mlp"))
    ]


def test_a_file_is_quantized_once_even_if_moved(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    first = cached(source, "nf4", CPU)
    source.asked.clear()
    assert cached(source, "nf4", CPU).path == first.path
    (tmp_path / "elsewhere").mkdir()
    source.files = (source.files[0].rename(tmp_path / "elsewhere" / source.files[0].name),)
    assert cached(source, "nf4", CPU).path == first.path
    assert source.asked == []
    assert cached(source, "int8", CPU).path != first.path


def test_a_changed_file_is_quantized_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    first = cached(source, "nf4", CPU)
    source.tensors["single_blocks.0.linear1.weight"] = source.tensors["single_blocks.0.linear1.weight"] * 2
    write_safetensors(source.files[0], source.tensors)
    second = cached(source, "nf4", CPU)
    assert second.path != first.path
    assert second.source["hash"] != first.source["hash"]


def few_samples(path: Path) -> bytes:
    """One file's part of a fingerprint, from its first MiB, its vectors, and only 32 sampled bytes."""
    quantized._sampled.cache_clear()
    return quantized._sampled(path, path.stat().st_size, 0, samples=2, size=16)[0]


def test_a_change_in_any_vector_changes_the_fingerprint(tmp_path):
    """Samples alone could miss it: a norm of FLUX.1 is 256 bytes of 23.8 GB."""
    path, big = tmp_path / "x.safetensors", torch.zeros(1024, 1024).bfloat16()
    tensors = {"a.weight": big, "b.weight": torch.zeros(4, 4), "c.bias": torch.zeros(7), "d.scale": torch.tensor(1.0)}
    tensors |= {"e.scale": torch.zeros(0), "f.norm": torch.zeros(128).bfloat16(), "z.weight": big.clone()}
    write_safetensors(path, tensors)
    seen = {few_samples(path)}
    for name in ("c.bias", "d.scale", "f.norm"):
        tensors[name].view(-1)[-1] += 1
        write_safetensors(path, tensors)
        assert few_samples(path) not in seen, name
        seen.add(few_samples(path))
    tensors["z.weight"][5, 5] += 1  # between samples: the test would not tell the vectors' part from the samples' else
    write_safetensors(path, tensors)
    assert few_samples(path) in seen


def test_a_change_in_any_vector_of_a_quantized_file_changes_the_fingerprint(tmp_path):
    path = tmp_path / "q.safetensors"
    write_quantized(path, open_flux(nano.FLUX), "nf4", {}, CPU)
    file, raw, before = QuantizedFile.open(path), path.read_bytes(), few_samples(path)
    header = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:header])
    checked = {True: 0, False: 0}
    for unit, places in file.units.items():
        for place in places:
            begin = header + entries[unit]["data_offsets"][0] + place.start
            if (1 << 20) < begin < len(raw) - 16 - place.nbytes:
                changed = bytearray(raw)
                changed[begin + place.nbytes - 1] ^= 1
                path.write_bytes(changed)
                vector = len(place.shape) == 1
                assert (few_samples(path) != before) == vector, place
                checked[vector] += 1
    assert min(checked.values()) > 5


def diffusers_folder(folder: Path, **settings) -> Path:
    folder.mkdir()
    tensors = to_diffusers(load_file(nano.FLUX), FluxConfig.nano())
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"} | settings))
    return folder


def test_the_config_next_to_diffusers_files_is_in_the_fingerprint(tmp_path, monkeypatch):
    """Only the config has the axes of rope: other axes make another model from the same tensors."""
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    folders = [diffusers_folder(tmp_path / "a"), diffusers_folder(tmp_path / "b")]
    folders += [diffusers_folder(tmp_path / "c", axes_dims_rope=[8, 12, 12])]
    files = [cached(open_flux(folder), "nf4", CPU) for folder in folders]
    assert files[0].path.name.rsplit("-", 1)[1] == files[1].path.name.rsplit("-", 1)[1]
    assert files[0].path.name.rsplit("-", 1)[1] != files[2].path.name.rsplit("-", 1)[1]
    assert files[2].config.axes_dim == (8, 12, 12) != files[0].config.axes_dim


def test_a_stray_config_next_to_a_single_file_changes_nothing(source):
    before = fingerprint(source.files)
    (source.files[0].parent / "config.json").write_text("{}")
    assert fingerprint(source.files) == before


def test_an_interrupted_write_leaves_nothing_under_the_real_name(source, tmp_path):
    def interrupted(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(tmp_path / "out" / "q.safetensors", source, "nf4", {}, CPU, interrupted)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_reported_before_anything_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1000))
    with pytest.raises(WrongRequest, match=r"q.safetensors needs 381,184 bytes, but only 1,000 bytes are free"):
        write_quantized(tmp_path / "q.safetensors", source, "nf4", {}, CPU)
    assert source.asked == []


def test_another_file_is_refused(source):
    with pytest.raises(WrongRequest, match="was not written by fluxq"):
        QuantizedFile.open(source.files[0])


def test_fp8_weights_keep_their_bytes(source, tmp_path):
    source.tensors = {name: t.to(torch.float8_e4m3fn) for name, t in source.tensors.items()}
    write_quantized(tmp_path / "q.safetensors", source, "fp8", {}, CPU)
    flux = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU)
    stored = flux.double_blocks[0].img_attn.qkv
    original = source.tensors["double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(stored.values.view(torch.uint8), original.view(torch.uint8))
    assert torch.equal(stored.scale, torch.ones(len(original)))
    assert torch.equal(stored.bias, source.tensors["double_blocks.0.img_attn.qkv.bias"].bfloat16())


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_weights_with_nan_are_refused_though_they_keep_their_bytes(byte, source, tmp_path):
    name = "single_blocks.1.linear2.weight"
    source.tensors = {name: t.to(torch.float8_e4m3fn) for name, t in source.tensors.items()}
    source.tensors[name].view(torch.uint8)[3, 5] = byte
    source.path = source.files[0]
    with pytest.raises(WrongRequest, match=f"has NaN or infinite numbers in {name}"):
        write_quantized(tmp_path / "q.safetensors", source, "fp8", {}, CPU)
    assert not (tmp_path / "q.safetensors").exists()


@pytest.mark.parametrize(("format", "bound"), [("nf4", 0.12), ("fp8", 0.04), ("int8", 0.015)])
def test_the_model_in_every_format_computes_about_the_same_as_in_bf16(format, bound, source, tmp_path):
    from fluxq.model.embed import image_ids, text_ids

    outputs = {}
    for name in (format, "bf16"):
        write_quantized(tmp_path / f"{name}.safetensors", source, name, {}, CPU)
        flux = load_quantized(QuantizedFile.open(tmp_path / f"{name}.safetensors"), CPU)
        torch.manual_seed(5)
        i = (
            torch.randn(1, 6, 16),
            image_ids(2, 3),
            torch.randn(1, 3, 40),
            text_ids(3),
            torch.rand(1),
            torch.randn(1, 24),
        )
        outputs[name] = flux(*i, torch.ones(1)).float()
    assert relative_error(outputs[format], outputs["bf16"]) < 3 * bound


def test_the_file_is_a_safetensors_file_like_any_other(source, tmp_path):
    from safetensors import safe_open

    write_quantized(tmp_path / "q.safetensors", source, "nf4", {"note": "ü"}, CPU)
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        assert set(file.keys()) == set(Checkpoint(tmp_path / "q.safetensors").keys())
        assert torch.equal(file.get_tensor(REST), QuantizedFile.open(tmp_path / "q.safetensors").read(REST))


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: about.pop("version"),
        lambda about: about["layout"].pop(REST),
        lambda about: about["layout"]["single_blocks.0"].pop(),
        lambda about: about["layout"]["single_blocks.0"][0].__setitem__(3, 1 << 40),
        lambda about: about["layout"]["single_blocks.0"][1].__setitem__(3, 0),
        lambda about: about["layout"]["single_blocks.0"][0].__setitem__(3, "x"),
        lambda about: about["config"].update(depth=7),
        lambda about: about["config"].update(depth=10**12),
        lambda about: about["config"].update(depth_single_blocks=2.0),
        lambda about: about["config"].update(num_heads=0),
        lambda about: about["config"].update(mlp_ratio=float("inf")),
        lambda about: about.update(source={"fingerprint": []}),
        lambda about: about.update(format="fp2"),
        lambda about: about.update(source="somewhere"),
    ],
)
def test_a_false_header_is_refused(damage, source, tmp_path):
    path = tmp_path / "q.safetensors"
    write_quantized(path, source, "nf4", {}, CPU)
    checkpoint = Checkpoint(path)
    about = json.loads(checkpoint.metadata["fluxq"])
    damage(about)
    write_safetensors(path, {unit: checkpoint.get(unit) for unit in checkpoint.keys()}, {"fluxq": json.dumps(about)})
    with pytest.raises(WrongRequest, match=r"q\.safetensors .*quantize it again"):
        QuantizedFile.open(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_a_header_without_a_layout_is_refused(text, tmp_path):
    write_safetensors(tmp_path / "q.safetensors", {"x": torch.zeros(1)}, {"fluxq": text})
    with pytest.raises(WrongRequest, match=r"q\.safetensors has damaged fluxq metadata .*quantize it again"):
        QuantizedFile.open(tmp_path / "q.safetensors")


def test_a_damaged_file_in_the_cache_is_written_again(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    path = cached(source, "nf4", CPU).path
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert cached(source, "nf4", CPU).path.read_bytes() == whole


def test_two_runs_that_start_at_once_quantize_once(source, tmp_path, monkeypatch):
    """Partial files from a crash are removed."""
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    path = quantized.cached_path(source.files, "nf4")
    path.parent.mkdir()
    (path.parent / f".{path.stem}.tmp-0123.safetensors").write_bytes(b"half")
    with ThreadPoolExecutor(2) as both:
        found = [run.result().path for run in [both.submit(cached, source, "nf4", CPU) for _ in range(2)]]
    assert found == [path, path]
    assert sorted(source.asked) == sorted(source.tensors)
    assert {p.suffix for p in path.parent.iterdir()} == {".safetensors", ".lock"}
    assert len(list(path.parent.iterdir())) == 2


def test_a_cache_folder_that_cannot_be_created_is_named(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WrongRequest, match="cannot be written to .*; set FLUXQ_CACHE to another folder"):
        cached(source, "nf4", CPU)
