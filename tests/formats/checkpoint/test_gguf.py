"""GGUF files, written by the gguf package: values, names, and one clear sentence for every false header."""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from helpers import tiny_config

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import source as sources
from fluxq.formats.checkpoint.gguf import GgufFile
from fluxq.formats.checkpoint.shapes import flux_shapes, t5_shapes
from fluxq.formats.checkpoint.source import open_flux, open_t5
from fluxq.formats.quantized import cached, load_quantized, write_quantized
from fluxq.formats.weights import StoredWeights, streamed
from fluxq.kernels import quantize
from fluxq.model.text_layers import t5_units
from fluxq.offload import Immediate

CONFIG = tiny_config(hidden_size=256, num_heads=8, mlp_ratio=2.0, depth=1, depth_single_blocks=1)
T5 = dict(vocab_size=64, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, relative_attention_num_buckets=32)
T5_NAMES = {  # llama.cpp's, written out
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "enc.blk.0.attn_rel_b.weight",
} | {
    f"encoder.block.{i}.layer.{theirs}.weight": f"enc.blk.{i}.{ours}.weight"
    for i in range(2)
    for theirs, ours in (
        ("0.SelfAttention.q", "attn_q"),
        ("0.SelfAttention.k", "attn_k"),
        ("0.SelfAttention.v", "attn_v"),
        ("0.SelfAttention.o", "attn_o"),
        ("0.layer_norm", "attn_norm"),
        ("1.DenseReluDense.wi_0", "ffn_gate"),
        ("1.DenseReluDense.wi_1", "ffn_up"),
        ("1.DenseReluDense.wo", "ffn_down"),
        ("1.layer_norm", "ffn_norm"),
    )
}
CPU = torch.device("cpu")
LAYER = "single_blocks.0.linear1.weight"
PLAIN = ("F32", "F16", "BF16")
QUANTIZERS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # the gguf package can make these,
DECODERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # and only decode those


@cache
def stored_as(kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, torch.Tensor]:
    """Random data of that type, and its values from the gguf package."""
    type = GGMLQuantizationType[kind]
    w = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    if kind not in DECODERS:
        data = gguf.quants.quantize(w, type)
        return data, torch.from_numpy(gguf.quants.dequantize(data, type).copy())
    block, size = gguf.GGML_QUANT_SIZES[type]
    data = np.random.default_rng(sum(shape)).integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,)):
        scale = np.linspace(0.01, 0.2, len(blocks)).astype(np.float16)  # the block's scales, which must be numbers
        blocks[:, start : start + 2] = scale.view(np.uint8).reshape(-1, 2)
    return data, torch.from_numpy(gguf.quants.dequantize(data, type).copy())


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], architecture: str = "flux", alignment=None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_array("general.tags", ["one", "two"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformer(kind: str, prefix: str = "", outside: str = "BF16", vectors: str = "F32"):
    """A transformer as city96 stores it, with only the blocks' matrices quantized; and its values."""
    tensors, values = {}, {}
    for name, shape in flux_shapes(CONFIG).items():
        own = vectors if len(shape) == 1 else kind if "_blocks." in name else outside
        data, values[name] = stored_as(own, shape)
        tensors[prefix + name] = (data, own)
    return tensors, values


def assert_values(source, values) -> None:
    assert source.shapes == {name: tuple(value.shape) for name, value in values.items()}
    for name, value in values.items():
        assert torch.equal(source.value(name, torch.float32), value), name
        if value.ndim == 2:
            assert torch.equal(source.rows(name, [9, 0, 9], torch.float32), value[[9, 0, 9]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "band"),
    [(kind, 1 << 14) for kind in PLAIN + QUANTIZERS + DECODERS] + [("BF16", 1 << 24), ("Q4_K", 1 << 24)],
)
def test_every_type_has_the_values_that_the_gguf_package_gives_it(tmp_path, monkeypatch, kind, band):
    monkeypatch.setattr(sources, "BAND", band)
    tensors, values = transformer(kind)
    source = open_flux(write(tmp_path / "a.gguf", tensors))
    assert source.config == CONFIG and source.alone and not source.diffusers
    assert source.precision == {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(kind, kind)
    assert source.nbytes == sum(data.nbytes for data, _ in tensors.values())
    assert_values(source, values)
    assert (len(list(source.bands(LAYER))) > 1) == (band < 1 << 24)


@pytest.mark.parametrize(
    ("prefix", "architecture", "outside", "vectors", "alignment"),
    [
        ("model.diffusion_model.", "flux", "F16", "F16", None),
        ("", "pig", "F32", "F32", 64),
        ("", "cow", "BF16", "BF16", 256),
    ],
)
def test_names_and_types_may_vary(tmp_path, prefix, architecture, outside, vectors, alignment):
    tensors, values = transformer("Q5_0", prefix, outside, vectors)
    data, values[LAYER] = stored_as("Q6_K", values[LAYER].shape)
    tensors[prefix + LAYER] = data, "Q6_K"  # the type may change from tensor to tensor
    assert_values(open_flux(write(tmp_path / "a.gguf", tensors, architecture, alignment)), values)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16"])
def test_t5_is_read_under_llama_cpps_names(tmp_path, kind):
    values, tensors = {}, {}
    for name, shape in t5_shapes(T5).items():
        own = "F32" if len(shape) == 1 or shape[1] % 256 else kind
        data, values[name] = stored_as(own, shape)
        tensors[T5_NAMES[name]] = (data, own)
    path = write(tmp_path / "t5.gguf", tensors, "t5encoder")
    source = open_t5(path)
    assert source.config.items() >= T5.items()
    assert_values(source, values)
    with pytest.raises(WrongRequest, match=r"is a T5 text encoder, not a FLUX\.1 transformer"):
        open_flux(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
def test_a_t5_through_a_ring_has_the_same_values(tmp_path, monkeypatch, kind, dtype):
    """Tensors decoded on the host are copied in the dtype of the computation, one band at a time."""
    monkeypatch.setattr(sources, "BAND", 1 << 14)
    tensors = {}
    for name, shape in t5_shapes(T5).items():
        own = "F32" if len(shape) == 1 or "relative" in name else kind
        tensors[T5_NAMES[name]] = (stored_as(own, shape)[0], own)
    stored = StoredWeights(open_t5(write(tmp_path / "t5.gguf", tensors, "t5encoder")), CPU, dtype)
    (ours,) = streamed([(stored, t5_units(2))], CPU, 2, Immediate(), poison=True)
    for unit, layers in t5_units(2).items():
        with ours.resident(unit):
            for (name,) in layers.values():
                assert torch.equal(ours.read(name), stored.read(name)) and ours.read(name).dtype == dtype
    numbers = sum(math.prod(t5_shapes(T5)[name]) for (name,) in layers.values())
    itemsize = 2 if kind == "BF16" else dtype.itemsize
    assert ours.ring.slot_bytes == pytest.approx(2 * numbers * itemsize, rel=0.02)


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_a_gguf_is_quantized_from_its_exact_values(tmp_path, monkeypatch, format):
    """Quantizing in bands gives the same result as at once, and the cache recognizes the file."""
    monkeypatch.setattr(sources, "BAND", 1 << 14)
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    tensors, values = transformer("Q4_K")
    source = open_flux(write(tmp_path / "a.gguf", tensors))
    file = cached(source, format, CPU)
    frozen, wanted = (
        load_quantized(file, CPU).get_submodule(LAYER.removesuffix(".weight")).frozen,
        quantize(values[LAYER], format),
    )
    for part in vars(wanted):
        assert torch.equal(getattr(frozen, part).view(torch.uint8), getattr(wanted, part).view(torch.uint8))
    assert cached(source, format, CPU).path == file.path and file.path.name.startswith(f"a-{format}-")
    tensors["single_blocks.0.linear1.bias"] = (tensors["single_blocks.0.linear1.bias"][0] + 1, "F32")
    assert cached(open_flux(write(tmp_path / "a.gguf", tensors)), format, CPU).path != file.path


def test_types_that_fluxq_does_not_read_are_named(tmp_path):
    tensors, _ = transformer("Q8_0")
    rows, columns = flux_shapes(CONFIG)[LAYER]
    tensors[LAYER] = np.zeros((rows, columns // 32 * 17), np.uint8), "MXFP4"
    with pytest.raises(WrongRequest, match=rf"stores 1 of its tensors \({LAYER}; \.\.\.\) as GGUF's MXFP4"):
        open_flux(write(tmp_path / "a.gguf", tensors))


@pytest.mark.parametrize("order", [1, -1])
def test_one_tensor_under_two_names_is_refused(tmp_path, order):
    names = ["token_embd.weight", "shared.weight"][::order]
    tensors = {name: stored_as("F16", (2, 32))[:1] + ("F16",) for name in names}
    with pytest.raises(WrongRequest, match=r"a\.gguf has one tensor under two names \(.*shared\.weight\); remove"):
        open_t5(write(tmp_path / "a.gguf", tensors, "t5encoder"))


def test_a_vector_in_blocks_is_refused(tmp_path):
    """No program writes one; its blocks are not the vector's rows."""
    tensors, values = transformer("Q8_0")
    tensors["img_in.bias"] = stored_as("Q8_0", tuple(values["img_in.bias"].shape))[0], "Q8_0"
    with pytest.raises(
        WrongRequest, match=r"\(img_in\.bias; \.\.\.\) as GGUF's Q8_0 in 1 dimensions, which fluxq does not read"
    ):
        open_flux(write(tmp_path / "a.gguf", tensors))


def test_a_gguf_without_a_tensor_is_refused_by_its_name(tmp_path):
    tensors, _ = transformer("F16")
    del tensors[LAYER]
    with pytest.raises(WrongRequest, match=rf"a\.gguf .*1 missing \({LAYER}\)"):
        open_flux(write(tmp_path / "a.gguf", tensors))


# --- false headers ---

HUGE = 1 << 40


def tensor_info(name: bytes = b"x", dimensions=(32, 2), kind: int = 8, offset: int = 0, count: int | None = None):
    """The entry of one tensor; Q8_0 of 2 rows of 32 is 68 bytes."""
    sizes = b"".join(struct.pack("<Q", n) for n in dimensions)
    number = struct.pack("<I", len(dimensions) if count is None else count)
    return struct.pack("<Q", len(name)) + name + number + sizes + struct.pack("<IQ", kind, offset)


def packed(infos: bytes, tensors: int, data: int, values: bytes = b"", keys: int = 0) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + values + infos
    return header + bytes(-len(header) % 32) + bytes(data)


def alignment(value: bytes, kind: int = 4) -> bytes:
    return struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<I", kind) + value


TWICE = alignment(struct.pack("<I", 32)) * 2
LIES = {
    "tensors": (packed(b"", HUGE, 0), "claims 1,099,511,627,776 tensors, the limit is 65,536"),
    "absent tensors": (packed(tensor_info(dimensions=(2, 1), kind=0), 60_000, 0)[:65], "8 more bytes, but only 0 are"),
    "name": (packed(struct.pack("<Q", HUGE), 1, 0), "claims a string of 1,099,511,627,776 bytes"),
    "twice": (packed(tensor_info() + tensor_info(offset=96), 2, 192), "the tensor x occurs twice"),
    "no dimensions": (packed(tensor_info(count=0), 1, 96), "x has 0 dimensions, not 1 to 4"),
    "dimensions": (packed(tensor_info(count=1 << 31), 1, 96), "x has 2,147,483,648 dimensions"),
    "huge": (packed(tensor_info(dimensions=(32, HUGE)), 1, 96), "x cannot be 32 x 1,099,511,627,776 in Q8_0"),
    "overflow": (packed(tensor_info(dimensions=(1 << 63, 1 << 63, 2)), 1, 96), "x cannot be"),
    "half a block": (packed(tensor_info(dimensions=(33, 2)), 1, 96), "x cannot be 33 x 2 in Q8_0, whose blocks"),
    "type": (packed(tensor_info(kind=4), 1, 96), "x has the unknown type 4"),
    "type beyond": (packed(tensor_info(kind=1 << 31), 1, 96), "x has the unknown type 2147483648"),
    "truncated": (packed(tensor_info(), 1, 67), "expected 164 bytes according to its header, found 163, 1 missing"),
    "goes on": (packed(tensor_info(), 1, 100), "has 32 extra bytes after the last tensor of its header"),
    "offset": (packed(tensor_info(offset=HUGE), 1, 96), "x does not follow the tensor before it: it begins at byte 1,"),
    "unaligned": (packed(tensor_info(offset=8), 1, 96), "x does not follow the tensor before it: it begins at byte 8"),
    "overlap": (packed(tensor_info() + tensor_info(b"y", offset=64), 2, 192), "y overlaps the tensor before it"),
    "gap": (packed(tensor_info() + tensor_info(b"y", offset=128), 2, 256), "y does not follow the tensor before it"),
    "alignment": (packed(tensor_info(), 1, 96, alignment(struct.pack("<I", 48)), 1), "its alignment 48 is not a"),
    "no alignment": (packed(tensor_info(), 1, 96, alignment(struct.pack("<I", 0)), 1), "its alignment 0 is not a"),
    "alignment text": (packed(tensor_info(), 1, 96, alignment(struct.pack("<Q", 1) + b"a", 8), 1), "alignment a is no"),
    "key twice": (packed(tensor_info(), 1, 96, TWICE, 2), "the key general.alignment occurs twice"),
    "version": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(99), "is GGUF version 50331648, but fluxq"),
    "cut": (b"GGUF" + struct.pack("<IQ", 3, 1), "it claims 8 more bytes, but only 0 are left"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_false_header_is_refused_without_using_memory(tmp_path, lie):
    content, sentence = LIES[lie]
    (tmp_path / "a.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(WrongRequest) as caught:
            open_flux(tmp_path / "a.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "a.gguf")) and sentence in message and "; " in message
    assert message.isprintable() and len(message) < 400


def test_random_mutations_let_only_wrong_request_escape(tmp_path):
    """Files that are accepted can be read to the end."""
    rng, path = random.Random(0), tmp_path / "a.gguf"
    tensors = {
        f"blocks.{i}.{kind}": (stored_as(kind, (3, 256))[0], kind) for i, kind in enumerate(("Q8_0", "F16", "Q4_0"))
    }
    good = write(path, tensors).read_bytes()
    end = len(good) - GgufFile(path).nbytes
    refused = 0
    tracemalloc.start()
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(end)
            if rng.random() < 0.7:
                damaged[at] = rng.choice((0, 1, 7, 32, 127, 255, rng.randrange(256)))
            else:
                del damaged[at : at + rng.randint(1, 12)]
        path.write_bytes(damaged)
        try:
            file = GgufFile(path)
            assert all(len(file.read(key)) == file.size(key) for key in file.keys())
        except WrongRequest as error:
            refused += 1
            assert str(error).startswith(str(path)) and str(error).isprintable()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 200 and peak < 8 << 20


def test_a_gguf_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    tensors, _ = transformer("Q8_0")
    source = open_flux(path := write(tmp_path / "a.gguf", tensors))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(WrongRequest, match="became shorter while it was read"):
        write_quantized(tmp_path / "q.safetensors", source, "nf4", {}, CPU)
    assert not (tmp_path / "q.safetensors").exists()
