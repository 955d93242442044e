"""Comfy's scaled fp8, in all its spellings, compared with a decoder in plain NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_config
from safetensors.torch import save_file

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import open_flux
from fluxq.formats.quantized import QuantizedFile, load_quantized, write_quantized
from fluxq.kernels import RowScaled, quantize

CONFIG = tiny_config()
CPU = torch.device("cpu")
LAYER = "single_blocks.1.linear2"


def fp8_numbers(dtype: torch.dtype) -> np.ndarray:
    """The number that each of the 256 codes stands for: sign, 4 or 5 bits of exponent, 3 or 2 of mantissa."""
    mantissa_bits, bias = (3, 7) if dtype == torch.float8_e4m3fn else (2, 15)
    code = np.arange(256)
    exponent, mantissa = (code & 127) >> mantissa_bits, (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    size = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    return np.where(code & 128, -size, size).astype(np.float32)


def scaled(
    scale_shape=lambda rows, columns: (),
    suffix: str = "scale_weight",
    dtype: torch.dtype = torch.float8_e4m3fn,
    prefix: str = "",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A transformer as Comfy stores it, every matrix with a random scale; and its values from plain NumPy."""
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, shape in flux_shapes(CONFIG).items():
        tensor = torch.randn(shape)
        if len(shape) == 1:
            stored[prefix + name], values[name] = tensor.bfloat16(), tensor.bfloat16().float()
            continue
        codes, scale = tensor.to(dtype), torch.rand(scale_shape(*shape)) + 0.1
        layer = f"{prefix}{name.removesuffix('.weight')}"
        stored |= {prefix + name: codes, f"{layer}.{suffix}": scale}
        numbers, factors = fp8_numbers(dtype)[codes.view(torch.uint8).numpy()], scale.numpy()
        if scale.ndim == 3:
            factors = np.repeat(factors[..., 0], shape[1] // factors.shape[1], axis=1)
        elif scale.ndim == 1 and len(factors) > 1:
            factors = factors[:, None]
        values[name] = torch.from_numpy(numbers * factors)
    return stored, values


def write(path: Path, tensors, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return path


def assert_values(path: Path, values) -> None:
    source = open_flux(path)
    assert source.config == CONFIG and source.shapes.keys() == values.keys()
    for name, wanted in values.items():
        assert torch.equal(source.value(name, torch.float32), wanted), name
        if wanted.ndim == 2:
            assert torch.equal(source.rows(name, [5, 0, 5], torch.float32), wanted[[5, 0, 5]])


LAYERS = [name.removesuffix(".weight") for name, shape in flux_shapes(CONFIG).items() if len(shape) == 2]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "scale_shape",
    [lambda n, k: (), lambda n, k: (1,), lambda n, k: (n,), lambda n, k: (n, 1), lambda n, k: (n, 4, 1)],
    ids=["number", "one", "rows", "column", "blocks"],
)
def test_older_files_are_read_with_scales_of_any_shape(tmp_path, prefix, dtype, scale_shape):
    stored, values = scaled(scale_shape, dtype=dtype, prefix=prefix)
    stored |= {f"{prefix}{layer}.scale_input": torch.tensor(7.0) for layer in LAYERS}
    stored[f"{prefix}scaled_fp8"] = torch.empty(2, dtype=dtype)
    assert_values(write(tmp_path / "a.safetensors", stored), values)
    kind = "e4m3" if dtype == torch.float8_e4m3fn else "e5m2"
    in_blocks = " in blocks" if len(scale_shape(64, 64)) == 3 else ""
    assert open_flux(tmp_path / "a.safetensors").precision == f"fp8 {kind}, scaled{in_blocks}"


@pytest.mark.parametrize("where", ["beside", "header", "nowhere"])
def test_newer_files_are_read_wherever_they_store_their_format(tmp_path, where):
    stored, values = scaled(suffix="weight_scale")
    stored |= {f"{layer}.input_scale": torch.tensor(7.0) for layer in LAYERS[::2]}
    about, metadata = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, {}
    if where == "beside":
        blob = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        stored |= {f"{layer}.comfy_quant": blob.clone() for layer in LAYERS}
    elif where == "header":
        metadata = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(LAYERS, about)})}
    assert_values(write(tmp_path / "a.safetensors", stored, **metadata), values)


def test_a_vector_may_have_a_scalar_scale(tmp_path):
    stored, values = scaled()
    name = "single_blocks.1.norm.key_norm.weight"  # as Comfy spells it
    own = stored.pop(name.replace("weight", "scale")).to(torch.float8_e4m3fn)
    stored |= {name: own, name.replace("weight", "scale_weight"): torch.tensor(0.3)}
    values[name.replace("weight", "scale")] = torch.from_numpy(fp8_numbers(own.dtype)[own.view(torch.uint8)]) * 0.3
    assert_values(write(tmp_path / "a.safetensors", stored), values)


def test_unscaled_layers_of_a_newer_file_are_plain(tmp_path):
    stored, values = scaled(suffix="weight_scale")
    stored.pop(f"{LAYER}.weight_scale")
    stored[f"{LAYER}.weight"] = values[f"{LAYER}.weight"] = torch.randn(values[f"{LAYER}.weight"].shape)
    assert_values(write(tmp_path / "a.safetensors", stored), values)


@pytest.mark.parametrize("scale_shape", [lambda n, k: (), lambda n, k: (n, 1)], ids=["number", "rows"])
def test_an_fp8_file_keeps_its_bytes_and_its_own_scale(tmp_path, scale_shape):
    stored, values = scaled(scale_shape)
    source = open_flux(write(tmp_path / "a.safetensors", stored))
    write_quantized(tmp_path / "q.safetensors", source, "fp8", {}, CPU)
    flux = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU)
    for name in values:
        layer = name.removesuffix(".weight")
        if "_blocks." in name and layer != name and values[name].ndim == 2:
            kept = flux.get_submodule(layer).frozen
            assert isinstance(kept, RowScaled)
            assert torch.equal(kept.values.view(torch.uint8), stored[name].view(torch.uint8))
            assert torch.equal(kept.scale, stored[f"{layer}.scale_weight"].reshape(-1).expand(len(values[name])))


def test_other_formats_are_made_from_the_scaled_values(tmp_path):
    stored, values = scaled()
    source = open_flux(write(tmp_path / "a.safetensors", stored))
    write_quantized(tmp_path / "q.safetensors", source, "nf4", {}, CPU)
    flux = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU)
    wanted, found = quantize(values[f"{LAYER}.weight"], "nf4"), flux.get_submodule(LAYER).frozen
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.absmax, wanted.absmax)


def refusal(path: Path) -> str:
    with pytest.raises(WrongRequest) as caught:
        open_flux(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "svdquant_w4a4", "awq_w4a16"])
@pytest.mark.parametrize("where", ["beside", "header"])
def test_comfys_other_formats_are_refused_by_name(tmp_path, format, where):
    """Their packed shapes, with half the columns, are never mistaken for the model's."""
    stored, _ = scaled(suffix="weight_scale")
    about, metadata = {"format": format}, {}
    stored[f"{LAYER}.weight"] = torch.zeros(64, 160, dtype=torch.uint8)
    stored[f"{LAYER}.weight_scale_2"] = torch.tensor(1.0)
    if where == "beside":
        stored[f"{LAYER}.comfy_quant"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: about}})}
    sentence = refusal(write(tmp_path / "a.safetensors", stored, **metadata))
    assert f"stores 1 of its tensors ({LAYER}.weight; ...) as {format}, which fluxq does not read" in sentence


def test_nvfp4_is_recognized_by_its_second_scale(tmp_path):
    stored, _ = scaled(suffix="weight_scale")
    stored |= {f"{layer}.weight_scale_2": torch.tensor(1.0) for layer in LAYERS}
    sentence = refusal(write(tmp_path / "a.safetensors", stored))
    assert f"stores {len(LAYERS)} of its tensors (" in sentence and "as nvfp4, which fluxq does not read" in sentence


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (b"{", "has a damaged img_in.comfy_quant (Expecting"),
        (b"[]", "has a damaged img_in.comfy_quant (a JSON list, not an object)"),
        (b"{}", "has a damaged img_in.comfy_quant (it has no format)"),
        (b'{"format": 3}', "has a damaged img_in.comfy_quant (it has no format)"),
        (b"\xff\xfe\xfd\xfc", "has a damaged img_in.comfy_quant ("),
        (b"[" * 60_000, "has a damaged img_in.comfy_quant ("),
        (b" " * 70_000, "has a damaged img_in.comfy_quant (70,000 bytes, the limit is 65,536)"),
    ],
)
def test_a_damaged_format_entry_is_refused(tmp_path, blob, sentence):
    stored, _ = scaled(suffix="weight_scale")
    stored["img_in.comfy_quant"] = torch.tensor(list(blob), dtype=torch.uint8)
    assert sentence in refusal(write(tmp_path / "a.safetensors", stored))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": 3}', '{"layers": {"img_in": null}}'])
def test_damaged_quantization_metadata_is_refused(tmp_path, text):
    stored, _ = scaled(suffix="weight_scale")
    assert "has a damaged" in refusal(write(tmp_path / "a.safetensors", stored, _quantization_metadata=text))


@pytest.mark.parametrize("shape", [(3,), (2, 64), (64, 3, 1), (64, 1, 2), (64, 0, 1), (1, 64)])
def test_scales_of_another_shape_are_refused(tmp_path, shape):
    stored, _ = scaled()
    stored[f"{LAYER}.scale_weight"] = torch.ones(shape)
    assert f"1 wrong scale ({LAYER}.scale_weight of (64, 320) is {shape} F32)" in refusal(
        write(tmp_path / "a.safetensors", stored)
    )
