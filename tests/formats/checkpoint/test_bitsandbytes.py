"""Files quantized by bitsandbytes, written by its own code, or through diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import Lazy, randomize, tiny_config
from safetensors.torch import load_file, save_file

from benchmarks.peers.diffusers_blocks import transformer
from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import source as sources
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.checkpoint.keys import to_diffusers
from fluxq.formats.checkpoint.recognize import stored_tensors
from fluxq.formats.checkpoint.shapes import flux_shapes
from fluxq.formats.checkpoint.source import OPENERS, open_flux, open_t5
from fluxq.formats.quantized import QuantizedFile, cached, load_quantized, write_quantized
from fluxq.kernels import NF4Weight, RowScaled, dequantize
from fluxq.training.libraries import import_bitsandbytes

diffusers = Lazy("diffusers")
bnb_quantizer = Lazy("diffusers.quantizers.bitsandbytes.bnb_quantizer")
transformers = Lazy("transformers")
bnb = import_bitsandbytes().functional
CONFIG = tiny_config(  # every width a multiple of the block of 64: bitsandbytes decodes others wrongly on CPUs
    in_channels=64, out_channels=64, vec_in_dim=128, context_in_dim=192, hidden_size=128, num_heads=4, depth=1
)
CPU = torch.device("cpu")
LAYER = "single_blocks.1.linear2.weight"


def packed(name: str, w: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes saves for a matrix."""
    codes, state = bnb.quantize_4bit(w, **options)
    return {name: codes} | {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}


def unpacked(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix in fp32, as bitsandbytes decodes it."""
    parts = {key.removeprefix(f"{name}."): t.clone() for key, t in tensors.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, CPU)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(tensors[name].view(torch.uint8).reshape(-1, 1), state)


def absmax_of(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix's scales, un-nested by bitsandbytes if they are nested."""
    parts = {key.removeprefix(f"{name}."): t.clone() for key, t in tensors.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, CPU)
    if not state.nested:
        return state.absmax
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


def single_file(prefix: str = "model.diffusion_model.", **options) -> dict[str, torch.Tensor]:
    """A transformer as lllyasviel stores it: matrices in 4 bits, vectors in bf16, the original fused names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in flux_shapes(CONFIG).items():
        w = torch.randn(shape).bfloat16()
        tensors |= packed(prefix + name, w, **options) if len(shape) == 2 else {prefix + name: w}
    return tensors


def write(path: Path, tensors) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "band"), [(torch.uint8, 1 << 12), (torch.bfloat16, 1 << 24)])
@pytest.mark.parametrize(
    "options",
    [
        dict(quant_type="nf4"),
        dict(quant_type="nf4", compress_statistics=True),
        dict(quant_type="nf4", blocksize=128),
        dict(quant_type="fp4"),
        dict(quant_type="fp4", compress_statistics=True),
    ],
    ids=["nf4", "nf4 nested", "nf4 by 128", "fp4", "fp4 nested"],
)
def test_single_files_have_the_values_that_bitsandbytes_gives_them(tmp_path, monkeypatch, options, storage, band):
    """At once, or in bands of rows that begin anywhere in a nested block."""
    monkeypatch.setattr(sources, "BAND", band)
    prefix = "model.diffusion_model."
    tensors = by_128(prefix, **options) if "blocksize" in options else single_file(prefix, **options)
    is_codes = {key: tensor.dtype == torch.uint8 and key.endswith(".weight") for key, tensor in tensors.items()}
    stored = {key: t.flatten().view(storage)[:, None] if is_codes[key] else t for key, t in tensors.items()}
    source = open_flux(write(tmp_path / "a.safetensors", stored))
    assert source.config == CONFIG and source.precision.startswith(options["quant_type"])
    for name, shape in source.shapes.items():
        key = prefix + name
        wanted = unpacked(key, tensors) if is_codes[key] else tensors[key].float()
        assert torch.equal(source.value(name, torch.float32), wanted) and wanted.shape == shape, name
    assert len(list(source.bands(LAYER))) == (1 if band == 1 << 24 else 22)
    wanted = unpacked(prefix + LAYER, tensors)
    assert torch.equal(source.rows(LAYER, [77, 3, 77], torch.float32), wanted[[77, 3, 77]])


def by_128(prefix: str, **options) -> dict[str, torch.Tensor]:
    """Blocks of 128 if they divide the rows."""
    tensors = single_file(prefix, quant_type="nf4")
    for name in (LAYER, "double_blocks.0.img_mlp.0.weight"):
        tensors |= packed(prefix + name, torch.randn(flux_shapes(CONFIG)[name]), **options)
    return tensors


@pytest.mark.parametrize("band", [1 << 24, 1 << 12])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_keeps_its_exact_bytes(tmp_path, monkeypatch, nested, band):
    monkeypatch.setattr(sources, "BAND", band)
    tensors = single_file("", quant_type="nf4", compress_statistics=nested)
    source = open_flux(write(tmp_path / "a.safetensors", tensors))
    write_quantized(tmp_path / "q.safetensors", source, "nf4", {}, CPU)
    flux, kept = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU), 0
    for name, shape in flux_shapes(CONFIG).items():
        if len(shape) == 2 and "_blocks." in name:
            frozen, kept = flux.get_submodule(name.removesuffix(".weight")).frozen, kept + 1
            assert torch.equal(frozen.codes.flatten(), tensors[name].flatten())
            assert torch.equal(frozen.absmax.flatten(), absmax_of(name, tensors))
        elif len(shape) == 2:
            found = flux.get_submodule(name.removesuffix(".weight")).weight
            assert torch.equal(found, unpacked(name, tensors).bfloat16())
    assert kept == 10 + 2 * 3


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((7, 80), 32), ((5, 64), 128), ((70, 192), 128), ((9, 320), 2048), ((4, 33), 64), ((6, 96), 64)],
)
def test_blocks_of_any_size_may_straddle_rows(tmp_path, shape, block, type, nested):
    """bitsandbytes decodes such a matrix correctly on CPUs if it is given as one long row."""
    tensors = packed("a.weight", torch.randn(shape), blocksize=block, quant_type=type, compress_statistics=nested)
    checkpoint = Checkpoint(write(tmp_path / "a.safetensors", tensors))
    stored = stored_tensors(dict.fromkeys(checkpoint.keys(), checkpoint))["a.weight"]
    changed_state(tensors, "a.weight", type, shape=[1, shape[0] * shape[1]])
    wanted = unpacked("a.weight", tensors).view(shape)
    for rows in (range(shape[0]), range(1, 3), range(3, 4), [3, 1, 3]):
        found = stored.rows(rows)
        assert torch.equal(dequantize(found, torch.float32), wanted[list(rows)])
        assert isinstance(found, NF4Weight) == (type == "nf4" and shape[1] % 64 == 0)


def test_an_all_in_one_file_gives_each_model_as_it_is_stored(tmp_path):
    """As in lllyasviel's files: the transformer in NF4, T5 in fp8, CLIP and the autoencoder in 16 and 32 bits."""
    tensors = single_file(quant_type="nf4", compress_statistics=True)
    tensors |= {f"vae.{key}": tensor.float() for key, tensor in load_file(nano.AE).items()}
    for part, path, dtype in (("clip_l", nano.CLIP_L, torch.half), ("t5xxl", nano.T5XXL, torch.float8_e4m3fn)):
        tensors |= {f"text_encoders.{part}.transformer.{k}": t.to(dtype) for k, t in load_file(path).items()}
    path = write(tmp_path / "a.safetensors", tensors)
    found = [opener(path).precision for opener in OPENERS.values()]
    assert found == ["nf4, nested", "fp32", "fp16", "fp8 e4m3"]


def test_another_format_is_made_from_the_decoded_values(tmp_path):
    tensors = single_file("", quant_type="nf4", compress_statistics=True)
    source = open_flux(write(tmp_path / "a.safetensors", tensors))
    write_quantized(tmp_path / "q.safetensors", source, "int8", {}, CPU)
    frozen = load_quantized(QuantizedFile.open(tmp_path / "q.safetensors"), CPU).single_blocks[1].linear2.frozen
    exact = unpacked(LAYER, tensors)
    assert (frozen.values.float() * frozen.scale[:, None] - exact).abs().amax() <= exact.abs().amax() / 127 * 0.51


def test_the_cache_of_quantized_files_tells_nf4_files_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    tensors = single_file("", quant_type="nf4")
    paths = [cached(open_flux(write(tmp_path / "a.safetensors", tensors)), "nf4", CPU).path for _ in range(2)]
    assert paths[0] == paths[1]
    tensors[f"{LAYER}.absmax"] = tensors[f"{LAYER}.absmax"] * 2
    assert cached(open_flux(write(tmp_path / "a.safetensors", tensors)), "nf4", CPU).path != paths[0]


# --- folders ---


def plain_folder(folder: Path) -> diffusers.FluxTransformer2DModel:
    model = transformer(CONFIG)
    randomize(model).bfloat16().save_pretrained(folder)
    return model


def quantized_folder(folder: Path, shard_size: str = "10GB", **options) -> dict[str, torch.Tensor]:
    """diffusers loads, quantizes and saves; only its check for a GPU is skipped."""
    plain_folder(folder / "plain")
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    with (
        patch.object(quantizer, "validate_environment", lambda *_, **__: None),
        patch.object(quantizer, "update_device_map", lambda *_: {"": "cpu"}),
    ):
        config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        model = diffusers.FluxTransformer2DModel.from_pretrained(
            folder / "plain", quantization_config=config, torch_dtype=torch.bfloat16
        )
    model.save_pretrained(folder / "transformer", max_shard_size=shard_size)
    return {k: t for path in (folder / "transformer").glob("*.safetensors") for k, t in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nested", "shard_size", "skipped"),
    [(True, "10GB", None), (False, "10GB", None), (True, "100KB", None), (True, "10GB", ["to_k", "proj_mlp"])],
)
def test_diffusers_4bit_folders_are_fused(tmp_path, nested, shard_size, skipped):
    """q, k and v become one matrix although each has its own offset.

    With shards, a matrix and its scales are in different files. If one of the three is in bf16, all are decoded.
    """
    options = {"llm_int8_skip_modules": skipped} if skipped else {}
    tensors = quantized_folder(tmp_path, shard_size, bnb_4bit_use_double_quant=nested, **options)
    source = open_flux(tmp_path)
    assert source.config == CONFIG and (len(source.files) > 3) == (shard_size == "100KB") and source.diffusers
    values = {
        key: unpacked(key, tensors) if f"{key}.absmax" in tensors else tensors[key].float()
        for key in to_diffusers({name: torch.empty(shape) for name, shape in source.shapes.items()}, CONFIG)
    }
    found = to_diffusers({name: source.value(name, torch.float32) for name in source.shapes}, CONFIG)
    assert all(torch.equal(found[key], wanted) for key, wanted in values.items())

    qkv = source.get("double_blocks.0.img_attn.qkv.weight")
    assert isinstance(qkv, torch.Tensor if skipped else NF4Weight)
    if isinstance(qkv, NF4Weight):
        parts = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
        offsets = {json.loads(bytes(tensors[f"{p}.quant_state.bitsandbytes__nf4"])).get("nested_offset") for p in parts}
        assert len(offsets) == (3 if nested else 1)
        assert torch.equal(qkv.codes.flatten(), torch.cat([tensors[part].flatten() for part in parts]))
        assert torch.equal(qkv.absmax.flatten(), torch.cat([absmax_of(part, tensors) for part in parts]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantized_t5_folder_is_read(tmp_path, options):
    """transformers does not quantize T5's `wo`."""
    config = transformers.T5Config(
        vocab_size=40, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )  # fmt: skip
    randomize(transformers.T5EncoderModel(config)).bfloat16().save_pretrained(tmp_path / "plain")
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "plain", quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "text_encoder_2")
    tensors, source = load_file(tmp_path / "text_encoder_2/model.safetensors"), open_t5(tmp_path)
    for name in source.shapes:
        found = source.value(name, torch.float32)
        if f"{name}.absmax" in tensors:
            assert torch.equal(found, unpacked(name, tensors))
        elif tensors[name].dtype == torch.int8:
            kept, largest = source.get(name), tensors[f"{name.removesuffix('weight')}SCB"]
            assert isinstance(kept, RowScaled) and torch.equal(kept.values, tensors[name])
            torch.testing.assert_close(found, bnb.int8_vectorwise_dequant(tensors[name], largest), rtol=1e-6, atol=0)
        else:
            assert torch.equal(found, tensors[name].float())
    assert source.precision == ("nf4" if "load_in_4bit" in options else "int8")


# --- bad input ---


def changed_state(tensors, layer=LAYER, type="nf4", **changes) -> None:
    key = f"{layer}.quant_state.bitsandbytes__{type}"
    text = json.dumps(json.loads(bytes(tensors[key])) | changes)
    tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(f"{LAYER}.absmax"), f"damaged {LAYER}.absmax (missing, but shape (128, 640) needs 1,280"),
        (lambda t: t.pop(f"{LAYER}.nested_quant_map"), "nested_quant_map (missing, but shape (128, 640) needs 1,024"),
        (lambda t: t.pop(f"{LAYER}.quant_map"), "quant_map (missing, but shape (128, 640) needs 64 bytes"),
        (lambda t: t.update({f"{LAYER}.absmax": t[f"{LAYER}.absmax"][1:]}), "absmax (1,279 bytes, but shape"),
        (lambda t: t.update({LAYER: t[LAYER][1:]}), f"damaged {LAYER} (40,959 bytes, but shape (128, 640) needs"),
        (lambda t: changed_state(t, shape=[128, 640 << 20]), "needs 42,949,672,960 bytes"),
        (lambda t: changed_state(t, shape=[128, -640]), "quant_state (shape [128, -640])"),
        (lambda t: changed_state(t, shape=[128, 10**4000]), "quant_state (shape [128, 1000"),
        (lambda t: changed_state(t, nested_offset=float("nan")), "quant_state (offset nan"),
        (lambda t: changed_state(t, shape="x"), "quant_state (shape x)"),
        (lambda t: changed_state(t, shape=[256, 320]), "1 wrong shape (single_blocks.1.linear2.weight is (256, 320)"),
        (lambda t: changed_state(t, blocksize=0), "blocks of 0)"),
        (lambda t: changed_state(t, blocksize=None), "blocks of None)"),
        (lambda t: changed_state(t, blocksize=256), "absmax (1,280 bytes, but shape (128, 640) needs 320 bytes"),
        (lambda t: changed_state(t, blocksize=96), "blocks of 96)"),
        (lambda t: changed_state(t, nested_blocksize=0), "nested blocks of 0)"),
        (lambda t: changed_state(t, nested_offset="x"), "quant_state (offset x"),
        (lambda t: t.update({f"{LAYER}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}), "damaged"),
    ],
)  # fmt: skip
def test_damaged_scales_and_states_are_refused(tmp_path, change, sentence):
    tensors = single_file("", quant_type="nf4", compress_statistics=True)
    change(tensors)
    with pytest.raises(WrongRequest) as caught:
        open_flux(write(tmp_path / "a.safetensors", tensors))
    assert sentence in str(caught.value) and str(caught.value).isprintable() and "; " in str(caught.value)
