"""The text encoders' weights through a ring: bit-identical states, each unit copied once per batch of captions."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch

from fluxq import nano
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.checkpoint.shapes import clip_shapes, t5_shapes
from fluxq.formats.load import load_text_encoders
from fluxq.offload import Immediate, Late, Staged, Streams

CPU = torch.device("cpu")
TOKENIZERS = ((nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt"), (nano.T5_TOKENIZER,))
CAPTIONS = ["A red circle at the top", "", "blue and red " * 30]
CLIP = dict(vocab_size=1000, hidden_size=128, intermediate_size=192, num_hidden_layers=3, max_position_embeddings=77)
T5 = dict(vocab_size=1000, d_model=64, d_kv=16, d_ff=96, num_layers=4, num_heads=3, relative_attention_num_buckets=32)
UNITS = 3 + 4
VECTORS = {name for name, shape in t5_shapes(T5).items() if len(shape) < 2}
STORED = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
    "scaled fp8": torch.float8_e4m3fn,
    "scaled fp32": torch.float32,
}
LANES = {
    "immediate": Immediate,
    "late": Late,
    "staged": lambda: Staged(Immediate(), [torch.empty(1 << 17, dtype=torch.uint8) for _ in range(2)]),
    "the default": lambda: None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random encoders, T5 in every way of storing it."""
    torch.manual_seed(0)
    tmp_path = tmp_path_factory.mktemp("encoders")

    def random(shapes, dtype):
        return {
            name: (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2) + (len(shape) < 2)).to(dtype)
            for name, shape in shapes.items()
        }

    write_safetensors(tmp_path / "clip_l.safetensors", random(clip_shapes(CLIP), torch.float16))
    for stored, dtype in STORED.items():
        tensors = random(t5_shapes(T5), dtype)
        if "scaled" in stored:
            for i, name in enumerate(name for name, tensor in list(tensors.items()) if tensor.ndim > 1):
                rows = (len(tensors[name]), 1) if i % 2 else ()
                tensors[f"{name.removesuffix('.weight')}.scale_weight"] = torch.rand(rows) + 0.5
            tensors |= {name: tensor.half() for name, tensor in tensors.items() if name in VECTORS}
        write_safetensors(tmp_path / f"{stored}.safetensors", tensors)
    return tmp_path


def loaded(folder, stored, dtype=torch.bfloat16, slots=0, streams: Streams | None = None):
    paths = folder / "clip_l.safetensors", folder / f"{stored}.safetensors"
    return load_text_encoders(*paths, *TOKENIZERS, 24, CPU, dtype, slots, streams, poison=True)


def ring_of(encoders):
    return encoders.t5.weights.ring


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lanes", "stored"),
    [
        *(("the default", stored) for stored in STORED),
        # views of their slots, and numbers that are made of them
        *((lanes, stored) for lanes in LANES if lanes != "the default" for stored in ("bf16", "scaled fp8")),
    ],
)
def test_states_through_a_ring_are_the_same_to_the_bit(stored, lanes, folder):
    """Again and again, for several slots, given 0xFF when their unit is given up."""
    expected = [loaded(folder, stored).encode(captions) for captions in (CAPTIONS, CAPTIONS[:1])]
    for slots in (2, 3, UNITS, 20):
        ours = loaded(folder, stored, slots=slots, streams=LANES[lanes]())
        for captions, wanted in zip((CAPTIONS, CAPTIONS[:1]), expected, strict=True):
            found = ours.encode(captions)
            assert torch.equal(found.t5, wanted.t5) and torch.equal(found.clip, wanted.clip)
            assert found.t5.isfinite().all() and found[2:] == wanted[2:]
        ring_of(ours).close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_need_no_conversion_are_views_of_their_slot(dtype, folder):
    ours = loaded(folder, {torch.float16: "fp16", torch.float32: "fp32"}[dtype], dtype, 2, Immediate())
    weights, name = ours.t5.weights, "encoder.block.1.layer.0.SelfAttention.q.weight"
    with weights.resident("encoder.block.1"):
        inside = weights.read(name)
        assert torch.equal(inside, weights.source.value(name, dtype))
        assert inside.untyped_storage().data_ptr() == ring_of(ours).memory("encoder.block.1").data_ptr()
    with weights.resident("encoder.block.3"):
        assert not torch.equal(inside, weights.source.value(name, dtype))


@pytest.mark.parametrize("slots", [2, 3, UNITS])
def test_each_unit_is_copied_once_for_a_batch_of_captions(slots, folder):
    """At the end also the next batch's first units, CLIP's, which are small. If all fit in slots: once in total."""
    ours = loaded(folder, "fp16", slots=slots, streams=Immediate())
    ring = ring_of(ours)
    for batch in (1, 2, 3):
        ours.encode(CAPTIONS)
        assert ring.copies == (UNITS if slots == UNITS else batch * UNITS + slots)
    lengths = {unit: len(source) for unit, source in ring.host.items()}
    assert list(ring.schedule.units)[:3] == [f"encoder.layers.{i}" for i in range(3)]
    if slots < UNITS:
        ahead = sum(list(lengths.values())[:slots])
        assert ring.bytes_copied == 3 * sum(lengths.values()) + ahead


def test_both_models_pass_through_the_same_ring(folder):
    ours = loaded(folder, "fp16", slots=2)
    assert ours.clip.weights.ring is ours.t5.weights.ring
    assert len({ring_of(ours).memory(unit).data_ptr() for unit in ring_of(ours).schedule.units}) == 2


def test_the_host_holds_no_more_than_a_few_pieces(folder, monkeypatch):
    """Everything is read into the staging thread's buffers, each as large as the largest tensor."""
    sizes, threads = set(), set()
    ours = loaded(folder, "fp16", slots=2)
    source = ours.t5.weights.source
    read_into = type(source).read_into

    def watched(source, name, out):
        sizes.add(out.untyped_storage().nbytes())
        threads.add(threading.current_thread().name)
        read_into(source, name, out)

    monkeypatch.setattr(type(source), "read_into", watched)
    ours.encode(CAPTIONS)
    largest = 128 * 192 * 2  # of CLIP's
    assert all(nbytes <= 4 * (largest + 4096) for nbytes in sizes) and len(sizes) == 1
    assert all("staging" in name for name in threads)


def test_a_file_that_becomes_shorter_is_refused_by_name(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "shorter")
    ours = loaded(folder, "fp16", slots=2)
    with (folder / "fp16.safetensors").open("rb+") as file:
        file.truncate(100_000)
    with pytest.raises(WrongRequest, match=r"fp16\.safetensors became shorter while it was read"):
        ours.encode(CAPTIONS)


def test_a_cpu_reads_each_block_when_it_computes_with_it(folder):
    paths = folder / "clip_l.safetensors", folder / "fp16.safetensors"
    assert not hasattr(load_text_encoders(*paths, *TOKENIZERS, 24, CPU).t5.weights, "ring")
