"""LoRAs merged into checkpoints: layout and precision are kept, and the stored weights are the merged ones."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_config
from safetensors.torch import load_file, save_file

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.lora.algebra import Adapter
from fluxq.formats.lora.base import Base, MergedSource, merge_into

CONFIG = tiny_config()
SHAPES = flux_shapes(CONFIG)
MODULES = [key.removesuffix(".weight") for key, shape in SHAPES.items() if len(shape) == 2]
PREFIX = "model.diffusion_model."
TOP = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * 0.05 for name, shape in SHAPES.items()}


@pytest.fixture
def adapters() -> dict[str, Adapter]:
    """For two thirds of all matrices, including the last modulation with its swapped halves."""
    chosen = [m for i, m in enumerate(MODULES) if i % 3 or "adaLN" in m]
    return {
        m: Adapter(torch.randn(3, SHAPES[f"{m}.weight"][1]), torch.randn(SHAPES[f"{m}.weight"][0], 3) * 0.02, 1.7)
        for m in chosen
    }


def merged_weights(weights, adapters):
    """The merged weights in fp64, from the definition."""
    wanted = {name: tensor.double() for name, tensor in weights.items()}
    for module, a in adapters.items():
        wanted[f"{module}.weight"] += 1.7 / 3 * a.up.double() @ a.down.double()
    return wanted


def merge(path, target, adapters):
    return merge_into(Base(path), target, adapters, "a=1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_file_keeps_everything_but_the_merged_weights(tmp_path, weights, adapters, dtype):
    stored = {PREFIX + name: tensor.to(dtype) for name, tensor in weights.items()}
    stored["vae.decoder.conv_in.weight"] = torch.randn(4, 16, 3, 3)
    write_safetensors(tmp_path / "base.safetensors", stored, {"modelspec.title": "t"})
    errors = merge(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters)
    before, after = Checkpoint(tmp_path / "base.safetensors"), Checkpoint(tmp_path / "out.safetensors")
    assert before.shapes == after.shapes and [before.dtype(k) for k in stored] == [after.dtype(k) for k in stored]
    assert after.metadata == {"modelspec.title": "t", "modelspec.merged_from": "a=1"}
    wanted = merged_weights({n: stored[PREFIX + n] for n in weights}, adapters)
    lost = whole = 0.0
    for name in weights:
        got, was = after.get(PREFIX + name), stored[PREFIX + name]
        if name.removesuffix(".weight") not in adapters:
            assert torch.equal(got, was), name
            continue
        change = wanted[name] - was.double()
        assert ((got.double() - wanted[name]).abs() <= torch.finfo(dtype).eps * wanted[name].abs() + 1e-7).all(), name
        lost += (got.double() - wanted[name]).square().sum().item()
        whole += change.square().sum().item()
    assert torch.equal(after.get("vae.decoder.conv_in.weight"), stored["vae.decoder.conv_in.weight"])
    assert errors.relative == pytest.approx((lost / whole) ** 0.5, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("names", [("scale_weight", "scaled_fp8"), ("weight_scale", None)])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_keeps_its_scales(tmp_path, weights, adapters, names, per_row):
    dtype, stored, values = torch.float8_e4m3fn, {}, {}
    for name, w in weights.items():
        if w.ndim < 2:
            stored[name] = w.bfloat16()
            continue
        scale = (w.abs().amax(1, keepdim=True) if per_row else w.abs().max()) / 300
        stored[name] = (w / scale).to(dtype)
        stored[name.replace(".weight", f".{names[0]}")] = scale
        values[name] = stored[name].float() * scale
    if names[1]:
        stored[names[1]] = torch.zeros(0, dtype=dtype)
    write_safetensors(tmp_path / "base.safetensors", stored)
    errors = merge(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters)
    after = load_file(tmp_path / "out.safetensors")
    assert after.keys() == stored.keys()
    wanted = merged_weights(values, adapters)
    for name in values:
        scale = stored[name.replace(".weight", f".{names[0]}")]
        assert torch.equal(after[name.replace(".weight", f".{names[0]}")], scale)
        got = after[name].double() * scale
        if name.removesuffix(".weight") in adapters:
            limit = wanted[name].clamp(-448 * scale, 448 * scale)
            assert ((got - limit).abs() <= 2**-4 * limit.abs() + 2**-9 * scale).all(), name
            assert after[name].float().isfinite().all()  # what is beyond the range stays at its end
        else:
            assert torch.equal(after[name].view(torch.uint8), stored[name].view(torch.uint8))
    assert 0.01 < errors.relative < 3


@pytest.mark.parametrize("dtype", list(TOP))
def test_plain_fp8_saturates(tmp_path, weights, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    write_safetensors(tmp_path / "base.safetensors", stored)
    module = "single_blocks.0.linear2"
    rows, columns = SHAPES[f"{module}.weight"]
    huge = {module: Adapter(torch.ones(1, columns), torch.full((rows, 1), 1e6), 1.0)}
    merge(tmp_path / "base.safetensors", tmp_path / "out.safetensors", huge)
    assert (Checkpoint(tmp_path / "out.safetensors").get(f"{module}.weight").float() == TOP[dtype]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *TOP])
@pytest.mark.parametrize("name", ["single_blocks.0.linear2.weight", "img_in.weight", "txt_in.bias"])
def test_a_base_that_is_not_finite_is_named_with_the_tensor(tmp_path, weights, dtype, name):
    """Not the LoRA, which adapts the first of these tensors alone."""
    stored = {PREFIX + key: tensor.to(dtype) for key, tensor in weights.items()}
    stored["vae.unused"] = torch.full((2,), torch.inf)
    stored[PREFIX + name].view(-1)[-1] = torch.nan
    write_safetensors(path := tmp_path / "base.safetensors", stored)
    shape = SHAPES["single_blocks.0.linear2.weight"]
    adapters = {"single_blocks.0.linear2": Adapter(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)}
    with pytest.raises(WrongRequest, match=f"^{path} has NaN or infinite numbers in {PREFIX}{name}; use another file"):
        merge(path, tmp_path / "out.safetensors", adapters)
    if "linear2" in name:
        with pytest.raises(WrongRequest, match=f"^{path} has NaN or infinite numbers in {name}; use another file"):
            MergedSource(open_flux(path), adapters).get(name)
    assert [file.name for file in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_scale_that_is_not_finite_is_named(tmp_path, weights, adapters):
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}
    scales = {f"{module}.scale_weight": torch.tensor(0.5) for module in MODULES}
    scales["img_in.scale_weight"].fill_(torch.nan)
    write_safetensors(path := tmp_path / "base.safetensors", stored | scales)
    with pytest.raises(WrongRequest, match=f"^{path} has a scale that is not a positive number in img_in.scale_weight"):
        merge(path, tmp_path / "out.safetensors", adapters)


def test_a_diffusers_folder_keeps_its_shards(tmp_path, weights, adapters):
    names = to_diffusers(weights, CONFIG)
    folder, listing = tmp_path / "model" / "transformer", {}
    folder.mkdir(parents=True)
    for i in (0, 1):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        part = {name: t.contiguous() for j, (name, t) in enumerate(sorted(names.items())) if j % 2 == i}
        save_file(part, folder / shard, {"format": "pt"})
        listing |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": listing})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    settings = {"_class_name": "FluxTransformer2DModel", "axes_dims_rope": list(CONFIG.axes_dim)}
    (folder / "config.json").write_text(json.dumps(settings))
    merge(tmp_path / "model", tmp_path / "out", adapters)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in folder.iterdir())
    wanted = to_diffusers(merged_weights(weights, adapters), CONFIG)
    after = {}
    for shard in set(listing.values()):
        after |= load_file(tmp_path / "out" / shard)
    assert after.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(after[name].double(), tensor, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def write(path, tensors, metadata=None):
    write_safetensors(path, tensors, metadata)
    return path


def test_unsuitable_base_is_refused(tmp_path, weights):
    bnb = {f"{n}.absmax" if i == 9 else n: t for i, (n, t) in enumerate(weights.items())}
    whole = {n: t.to(torch.int8) if n.endswith("linear1.weight") else t for n, t in weights.items()}
    cases = {
        "1 unexpected": write(tmp_path / "bnb.safetensors", bnb),
        "quantized by fluxq; merge into the original": write(tmp_path / "own.safetensors", weights, {"fluxq": "{}"}),
        "stores single_blocks.0.linear1.weight as I8": write(tmp_path / "int8.safetensors", whole),
        "is a LoRA, not": write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(1)}),
        "absent.safetensors does not exist": tmp_path / "absent.safetensors",
    }
    for sentence, path in cases.items():
        with pytest.raises(WrongRequest, match=sentence):
            Base(path)


def test_a_failure_leaves_nothing(tmp_path, weights, adapters, monkeypatch):
    write_safetensors(tmp_path / "base.safetensors", weights)
    base = Base(tmp_path / "base.safetensors")
    monkeypatch.setattr(base, "merged", lambda *_: (_ for _ in ()).throw(WrongRequest("spoilt")))
    for folder in (False, True):
        base.is_folder = folder
        with pytest.raises(WrongRequest, match="spoilt"):
            merge_into(base, tmp_path / "out", adapters, "a=1")
        assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_full_disk_is_reported_before_anything_is_written(tmp_path, weights, adapters, monkeypatch):
    write_safetensors(tmp_path / "base.safetensors", weights)
    usage = type("Usage", (), {"free": 1000, "total": 2000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(WrongRequest, match="free some space on that disk"):
        merge(tmp_path / "base.safetensors", tmp_path / "out.safetensors", adapters)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
