"""Safetensors files: bytes, atomic writing, strict loading, and one clear sentence for every damaged file."""

import errno
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint import files
from fluxq.formats.checkpoint.files import DTYPES, Checkpoint, strict_load, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(33, 5),
        "a.weight": torch.randn(7).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "größe": torch.arange(3),
        **{name: torch.randint(0, 2, (5,)).to(dtype) for name, dtype in DTYPES.items()},
    }


def test_file_is_the_librarys_byte_for_byte(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    for metadata in (None, {"format": "pt"}):
        write_safetensors(tmp_path / "ours.safetensors", tensors, metadata)
        save_file(tensors, tmp_path / "library.safetensors", metadata)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_rows_are_read_alone(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    checkpoint = Checkpoint(path)
    for begin, end in ((0, 33), (0, 1), (7, 19), (32, 33), (5, 5), (30, None)):
        assert torch.equal(checkpoint.get("b.weight", begin, end), tensors["b.weight"][begin:end])
    assert torch.equal(checkpoint.get("a.weight", 2, 5), tensors["a.weight"][2:5])
    assert checkpoint.get("scalar", 0, 1).shape == ()
    for begin, end in ((0, 34), (-1, 2), (4, 3)):
        with pytest.raises(ValueError, match=f"b.weight has 33 rows, so there are no rows {begin} to {end}"):
            checkpoint.get("b.weight", begin, end)


def test_round_trip_keeps_dtype_shape_and_bits(tmp_path):
    tensors, path = some_tensors(), tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"a": "1", "b": "ü\n"})
    checkpoint, library = Checkpoint(path), load_file(path)
    assert set(checkpoint.keys()) == set(tensors)
    assert checkpoint.metadata == {"a": "1", "b": "ü\n"}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        read = checkpoint.get(name)
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert read.shape == tensor.shape and read.dtype == tensor.dtype
        assert bytes_of(read) == bytes_of(tensor) == bytes_of(library[name])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_equal_tensors_give_equal_files(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "x", tensors, {"a": "1", "b": "2"})
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())), {"b": "2", "a": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


# --- writing ---


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, do=original: (calls.append(name), do(*args)))
    write_safetensors(tmp_path / "x", {})
    assert calls[:2] == ["fsync", "replace"]


def test_full_disk_names_path_and_bytes_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, {"x": torch.zeros(3)})
    good, pieces = path.read_bytes(), files.safetensors_data

    def fill_up(tensors):
        yield next(pieces(tensors))[:4096]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "safetensors_data", fill_up)
    with pytest.raises(
        WrongRequest, match=r"lora\.safetensors cannot be written because the disk is full \(4,0\d\d bytes are"
    ):
        write_safetensors(path, {"x": torch.zeros(1000)})
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["lora.safetensors"]


def test_write_that_the_system_aborts_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")  # POSIX
    path = tmp_path / "lora.safetensors"
    write_safetensors(path, {"x": torch.zeros(3)})
    good, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(WrongRequest, match=r"lora\.safetensors cannot be written \(File too large\)"):
            write_safetensors(path, {"x": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["lora.safetensors"]


def test_unwritable_path_is_a_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "lora.safetensors", tmp_path / "file" / "deeper" / "lora.safetensors"):
        with pytest.raises(WrongRequest, match=r"lora\.safetensors cannot be written \(.*\); choose a folder"):
            write_safetensors(path, {})
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(WrongRequest, match=r"taken\.safetensors cannot be written"):
        write_safetensors(tmp_path / "taken.safetensors", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "taken.safetensors"]


# --- reading what is damaged ---


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list | None = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = packed({"x": entry(0, 8), "y": entry(8, 20)}, bytes(20))
DAMAGE = {
    "empty": (b"", "is empty (0 bytes)"),
    "seven_bytes": (b"\x01\0\0\0\0\0\0", "truncated: expected 10 bytes at the very least, found 7, 3 missing"),
    "only_a_length": (GOOD[:8], "truncated: expected 10 bytes"),
    "cut_in_header": (GOOD[:50], f"truncated: expected {len(GOOD) - 20} bytes for its header alone, found 50"),
    "cut_in_data": (
        GOOD[:-3],
        f"truncated: expected {len(GOOD)} bytes according to its header, found {len(GOOD) - 3}, 3 missing",
    ),
    "too_long": (GOOD + b"12345", "has 5 extra bytes after the last tensor"),
    "huge_header": (b"\xff" * 7 + b"\0{" + bytes(30), "claims 72,057,594,037,927,935 bytes, the limit is"),
    "no_json": (packed(b"{not json"), "damaged header (Expecting property name"),
    "no_utf8": (packed(b'{"\xff\xfe": 1}'), "damaged header ('utf-8' codec"),
    "deep_json": (packed(b'{"x":' + b"[" * 100_000), "damaged header (maximum recursion depth"),
    "huge_number": (packed(b'{"x":' + b"9" * 10_000 + b"}"), "damaged header (Exceeds the limit"),
    "starts_with_no_brace": (packed([1, 2, 3]), "is not a safetensors file (its header begins with b'[', not b'{')"),
    "entry_is_a_list": (packed({"x": [1]}), "x must have a dtype, a shape and data_offsets"),
    "entry_has_more": (packed({"x": entry(0, 4) | {"code": "1"}}, bytes(4)), "x must have a dtype"),
    "metadata_is_nested": (packed({"__metadata__": {"a": {}}}), "its metadata must map names to text"),
    "duplicate_key": (packed(b'{"x":{},"x":{}}'), "the key x occurs twice"),
    "unknown_dtype": (packed({"x": entry(0, 4, dtype="F4")}, bytes(4)), "stores x as F4, which fluxq does not read"),
    "dtype_is_a_number": (packed({"x": entry(0, 4, dtype=32)}, bytes(4)), "shape or data_offsets of x has the wrong"),
    "negative_shape": (packed({"x": entry(0, 4, [-1])}, bytes(4)), "of x has the wrong type"),
    "boolean_shape": (packed({"x": entry(0, 4, [True])}, bytes(4)), "of x has the wrong type"),
    "fractional_offset": (packed({"x": entry(0, 4) | {"data_offsets": [0, 4.0]}}, bytes(4)), "of x has the wrong"),
    "three_offsets": (packed({"x": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(4)), "of x has the wrong type"),
    "nine_dimensions": (packed({"x": entry(0, 4, [1] * 9)}, bytes(4)), "the shape of x is impossible"),
    "endless_empty": (packed({"x": entry(0, 0, [0, 1 << 62, 1 << 62])}), "the shape of x is impossible"),
    "shape_lies": (packed({"x": entry(0, 8, [3])}, bytes(8)), "x of shape [3] in F32 takes 12 bytes, but has 8"),
    "span_runs_back": (packed({"x": entry(8, 4, [1])}, bytes(8)), "takes 4 bytes, but has -4"),
    "overlap": (packed({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)), "y overlaps the tensor before it"),
    "gap": (packed({"x": entry(0, 8), "y": entry(12, 16)}, bytes(16)), "begins at byte 12 of the data, not 8"),
    "gap_at_start": (packed({"x": entry(4, 8)}, bytes(8)), "x leaves a gap"),
    "zip_pickle": (b"PK\x03\x04" + bytes(60), "is a pickle checkpoint, which can run hidden code when loaded"),
    "bare_pickle": (b"\x80\x02}q\0." + bytes(60), "is a pickle checkpoint"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(60), "is a GGUF file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(60), "is an image (PNG)"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(60), "is an image (JPEG)"),
    "web_page": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_one_sentence_with_its_numbers(tmp_path, damage):
    path = tmp_path / f"{damage}.safetensors"
    content, sentence = DAMAGE[damage]
    path.write_bytes(content)
    with pytest.raises(WrongRequest) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and sentence in message and "; " in message
    assert message.isprintable() and len(message) < 500
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".CKPT"])
def test_pickle_suffix_is_refused_whatever_is_inside(tmp_path, suffix):
    (path := tmp_path / f"model{suffix}").write_bytes(GOOD)
    with pytest.raises(WrongRequest, match=r"is a pickle checkpoint, .*; use its \.safetensors version"):
        Checkpoint(path)


def test_saved_torch_checkpoint_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.zeros(3)}, path)
    with pytest.raises(WrongRequest, match="is a pickle checkpoint"):
        Checkpoint(path)


def test_missing_file_folder_and_tensor_are_named(tmp_path):
    with pytest.raises(WrongRequest, match=r"nothing\.safetensors does not exist"):
        Checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(WrongRequest, match="is a folder"):
        Checkpoint(tmp_path)
    (path := tmp_path / "good.safetensors").write_bytes(GOOD)
    with pytest.raises(WrongRequest, match=r"good\.safetensors has no tensor z"):
        Checkpoint(path).get("z")


def test_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    (path := tmp_path / "x.safetensors").write_bytes(GOOD)
    checkpoint = Checkpoint(path)
    path.write_bytes(GOOD[:-5])
    with pytest.raises(WrongRequest, match="became shorter while it was read: only 7 of the 12 bytes of y are left"):
        checkpoint.get("y")


def test_only_the_requested_spans_are_read_in_order(tmp_path):
    cube = torch.randn(5, 3, 2).bfloat16()
    write_safetensors(tmp_path / "x.safetensors", {"cube": cube, "other": torch.ones(7)})
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    read = checkpoint.read("cube", [(48, 60), (0, 12), (48, 60)]).view(torch.bfloat16)
    assert torch.equal(read.view(3, 3, 2), cube[[4, 0, 4]])
    assert checkpoint.read("cube", []).numel() == 0
    assert torch.equal(checkpoint.get("cube", 1, 4), cube[1:4])
    with pytest.raises(ValueError, match="cube has 5 rows, so there are no rows 2 to 6"):
        checkpoint.get("cube", 2, 6)


BOMBS = {
    "lists": (b'{"x":[' + b"[]," * (8 << 20) + b"0]}", "lists more than 1,048,576 items"),
    "objects": (b'{"x":[' + b"{}," * (8 << 20) + b"0]}", "lists more than 1,048,576 items"),
    "numbers": (b'{"x":[' + b"1000," * (5 << 20) + b"0]}", "lists more than 1,048,576 items"),
    "text": (json.dumps({"__metadata__": {"x": "[]," * (8 << 20)}}).encode(), "lists more than 1,048,576 items"),
    "tensors": (
        b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(65_537)),
        "lists 65,537 tensors, the limit is 65,536",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_parses_to_much_more_is_refused_in_little_memory(tmp_path, bomb):
    text, sentence = BOMBS[bomb]
    (path := tmp_path / "x.safetensors").write_bytes(packed(text))
    tracemalloc.start()
    with pytest.raises(WrongRequest, match=sentence):
        Checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20  # the text itself, up to 32 MiB, and its items


def test_header_with_the_pickle_magic_for_its_length_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    for magic in (b"\x80\x02", b"BM", b"<\0"):
        length = int.from_bytes(magic, "little")
        path.write_bytes(packed(b"{}" + b" " * (length - 2)))
        assert not Checkpoint(path).keys()


@pytest.mark.slow
def test_random_mutations_let_only_wrong_request_escape(tmp_path):
    rng, path = random.Random(0), tmp_path / "x.safetensors"
    write_safetensors(path, some_tensors(), {"note": "text"})
    good = path.read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    tokens = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"-1",
        b"1e999",
        b"null",
        b"\\ud800",
        b"99999999999999999999",
        b"NaN",
    ]
    sentences = []
    tracemalloc.start()
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(header_end)
            match rng.randrange(4):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged[at : at + rng.randint(0, 4)] = rng.choice(tokens)
                case 2:
                    del damaged[at : at + rng.randint(1, 40)]
                case 3:
                    digits = [m.start() for m in re.finditer(rb"\d", damaged[8:])]
                    damaged[8 + rng.choice(digits)] = ord(rng.choice("0123456789"))
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint(path)
            for name in checkpoint.shapes:
                assert tuple(checkpoint.get(name).shape) == checkpoint.shape(name)
        except WrongRequest as error:
            sentences.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sentences) > 300
    assert all(sentence.startswith(str(path)) and sentence.isprintable() for sentence in sentences)
    assert peak < 4 << 20


# --- strict loading ---


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("frozen", torch.zeros(4))
        self.register_buffer("table", torch.zeros(1), persistent=False)


def small_tensors() -> dict[str, torch.Tensor]:
    return {"linear.weight": torch.randn(2, 3), "linear.bias": torch.randn(2), "frozen": torch.randn(4)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_strict_load_assigns_the_very_tensors(device):
    with torch.device(device):
        module = Small()
    tensors = small_tensors()
    tensors["frozen"] = tensors["frozen"].bfloat16()
    strict_load(module, tensors, "x.safetensors")
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }
    assert module.frozen.dtype == torch.bfloat16 and isinstance(module.linear.weight, torch.nn.Parameter)


def test_strict_load_names_every_kind_of_misfit_and_changes_nothing():
    module, tensors = Small(), small_tensors()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors["linear.weight"] = torch.randn(3, 2)
    del tensors["frozen"]
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(WrongRequest) as caught:
        strict_load(module, tensors, "x.safetensors")
    assert str(caught.value) == (
        "x.safetensors does not fit Small: 1 missing (frozen), "
        "6 unexpected (extra.0; extra.1; extra.2; extra.3; ...), "
        "1 wrong shape (linear.weight is (3, 2), not (2, 3)); use the file that belongs to it"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_strict_load_takes_one_of_two_tied_names():
    module = torch.nn.ModuleDict({"shared": torch.nn.Embedding(5, 3), "embed": torch.nn.Embedding(5, 3)})
    module["embed"].weight = module["shared"].weight
    weight = torch.randn(5, 3)
    strict_load(module, {"embed.weight": weight}, "x")
    assert module["shared"].weight.data_ptr() == module["embed"].weight.data_ptr() == weight.data_ptr()


def test_paths_may_be_text(tmp_path):
    write_safetensors(str(tmp_path / "x.safetensors"), {"x": torch.ones(2)})
    assert Checkpoint(str(tmp_path / "x.safetensors")).path == Path(tmp_path / "x.safetensors")
