"""The memory of `fluxq cache` at full width, counted: under 4 GiB on a GPU, under 3 GiB on a CPU.

The encoders run on `meta`, which counts the GPU memory without computing anything: the same code, files and group of
captions. benchmarks/test_fullsize.py runs the whole command on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import write_hollow
from live_bytes import LiveBytes

from fluxq import nano
from fluxq.caching.encoding import PIXELS_PER_BATCH
from fluxq.formats.checkpoint.shapes import autoencoder_shapes, clip_shapes, t5_shapes
from fluxq.formats.load import ENCODER_SLOTS, load_autoencoder, load_text_encoders
from fluxq.model import AutoEncoderConfig
from fluxq.model.text import STATES_BYTES

pytestmark = pytest.mark.slow

GIB = 2**30
META = torch.device("meta")
TOKENIZERS = ((nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt"), (nano.T5_TOKENIZER,))
CLIP_L = clip_shapes(
    dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, max_position_embeddings=77)
)
SLOTS = {"cuda": ENCODER_SLOTS, "cpu": 0}
T5_STORED = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "scaled fp8": torch.float8_e4m3fn}


def t5_xxl(layers: int) -> dict[str, tuple[int, ...]]:
    """The real one has 24 layers."""
    sizes = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, relative_attention_num_buckets=32)
    return t5_shapes(sizes | {"num_layers": layers})


def hollow_t5(path: Path, layers: int, stored: str) -> Path:
    shapes = t5_xxl(layers)
    dtypes = {name: T5_STORED[stored] if len(shape) > 1 else torch.float16 for name, shape in shapes.items()}
    if stored == "scaled fp8":
        scales = [f"{name.removesuffix('.weight')}.scale_weight" for name, shape in shapes.items() if len(shape) > 1]
        shapes |= dict.fromkeys(scales, ())
        dtypes |= dict.fromkeys(scales, torch.float32)
    return write_hollow(path, dtypes, shapes)


@pytest.mark.parametrize(
    ("place", "dtype", "stored", "layers", "most"),
    [
        ("cuda", torch.bfloat16, "fp16", (2, 3), 4 * GIB),  # more layers take no more
        ("cpu", torch.bfloat16, "fp8", (2,), 3 * GIB),
        ("cpu", torch.float32, "fp16", (2,), 3 * GIB),  # where bf16 is slow
    ],
)
def test_the_text_encoders_stay_within_their_memory(place, dtype, stored, layers, most, tmp_path, monkeypatch):
    """512 tokens per caption, a full group of captions per call. On a GPU the ring's slots hold two stored blocks in
    addition to the block in use; on a CPU there is only the block in use.
    """
    monkeypatch.setitem(STATES_BYTES, "meta", STATES_BYTES[place])
    clip = write_hollow(tmp_path / "clip_l.safetensors", dict.fromkeys(CLIP_L, torch.float16), CLIP_L)
    states, peaks = STATES_BYTES[place], []
    for count in layers:
        t5 = hollow_t5(tmp_path / f"{count}.safetensors", count, stored)
        with LiveBytes(device="meta") as bytes:
            encoders = load_text_encoders(clip, t5, *TOKENIZERS, 512, META, dtype, slots=SLOTS[place])
            encoded = encoders.encode(["a red star "] * encoders.group)
        assert encoders.group * 512 * 4096 * dtype.itemsize == states
        assert encoded.t5.shape == (encoders.group, 512, 4096) and encoded.t5.device == META
        peaks.append(bytes.peak)
    print(
        f"{encoders.group} captions through T5-XXL in {stored} and CLIP-L, {place}, {dtype}: {peaks[0] / GIB:.3f} GiB"
    )
    block = (4 * 4096 + 3 * 10240) * 4096
    slots = SLOTS[place] * block * T5_STORED[stored].itemsize
    assert states + block * dtype.itemsize + slots < peaks[0] == peaks[-1] < most


@pytest.mark.parametrize(("gib", "stored"), [(1.5, "fp16"), (1.25, "scaled fp8")])
def test_the_text_encoders_keep_to_the_gpu_budget(gib, stored, tmp_path, monkeypatch):
    """They take fewer captions at a time: as many as fit, to within one batch. Attention is a single operator here."""
    monkeypatch.setitem(STATES_BYTES, "meta", STATES_BYTES["cuda"])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **options: torch.empty_like(q))
    clip = write_hollow(tmp_path / "clip_l.safetensors", dict.fromkeys(CLIP_L, torch.float16), CLIP_L)
    t5, budget = hollow_t5(tmp_path / "t5.safetensors", 2, stored), int(gib * GIB)
    with LiveBytes(device="meta") as bytes:
        encoders = load_text_encoders(clip, t5, *TOKENIZERS, 512, META, torch.bfloat16, budget=budget)
        encoders.encode(["a red star "] * encoders.group)
    caption = 512 * 4096 * 2
    print(f"{encoders.group} captions with T5 in {stored}, {gib} GiB: {bytes.peak / GIB:.3f} GiB")
    assert bytes.peak <= budget
    assert encoders.group == STATES_BYTES["cuda"] // caption or bytes.peak > budget - 16 * caption


@pytest.mark.parametrize(("batch", "side"), [(1, 1024), (4, 512)])
def test_the_autoencoder_stays_under_3_gib(batch, side, tmp_path):
    """Includes all weights, even the decoder's, in fp32, but no convolution workspace. Bands take less."""
    assert batch * side * side == PIXELS_PER_BATCH
    shapes = autoencoder_shapes(AutoEncoderConfig())
    path = write_hollow(tmp_path / "ae.safetensors", dict.fromkeys(shapes, torch.float32), shapes)
    peaks = []
    for band in (None, 64):
        with LiveBytes(device="meta") as bytes:
            autoencoder = load_autoencoder(path, META).in_bands(band)
            autoencoder.moments(torch.zeros(batch, 3, side, side, device=META))
        peaks.append(bytes.peak)
        print(f"{batch} images of {side} x {side}, in bands of {band}: {bytes.peak / GIB:.3f} GiB")
    weight_bytes = sum(torch.Size(shape).numel() * 4 for shape in shapes.values())
    assert weight_bytes < peaks[1] < 0.6 * peaks[0] < peaks[0] < 3 * GIB


def test_meta_counts_what_the_cpu_takes(tmp_path):
    """The autoencoder at full width on a small image: the counts above are memory that is really used."""
    shapes = autoencoder_shapes(AutoEncoderConfig())
    path = write_hollow(tmp_path / "ae.safetensors", dict.fromkeys(shapes, torch.float32), shapes)
    peaks = []
    for device in (META, torch.device("cpu")):
        autoencoder = load_autoencoder(path, device)
        with LiveBytes() as bytes, torch.no_grad():
            autoencoder.moments(torch.zeros(1, 3, 128, 128, device=device))
        peaks.append(bytes.peak)
    assert peaks[0] == peaks[1] > 5 * 128 * 128 * 128 * 4
