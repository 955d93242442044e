"""NumPy archives from untrusted sources: numbers are read exactly, anything else is refused without using memory."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from fluxq.errors import WrongRequest
from fluxq.formats.npz import MAX_MEMBERS, NpzFile

ARRAYS = {
    "a": np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32),
    "by column": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big end first": np.arange(5, dtype=">f2"),
    "flag": np.asarray(True),
    "none": np.zeros((0, 4), np.int64),
}


def archive(path, members: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str, version=(1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_written_by_numpy_are_read_exactly(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    npz = NpzFile(tmp_path / "x.npz")
    assert npz.shapes == {name: array.shape for name, array in ARRAYS.items()}
    for name, array in ARRAYS.items():
        assert npz.dtypes[name] == array.dtype
        np.testing.assert_array_equal(npz.get(name), array)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    lies = npy(np.zeros(4, np.float32)) + bytes(64 << 20)  # 64 MiB of zeros after an array of four
    path = archive(tmp_path / "x.npz", {"a.npy": lies}, zipfile.ZIP_DEFLATED)
    del lies
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(WrongRequest, match=r"takes 144 bytes, but unpacks to 67,109,008"):
        NpzFile(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.slow
def test_a_bomb_of_the_right_length_shows_in_its_shape(tmp_path):
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.zeros((16, 2048, 2048), np.float32))}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    assert NpzFile(path).shapes == {"a": (16, 2048, 2048)}
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_false_length_in_the_directory_is_noticed_on_reading(tmp_path):
    """The directory claims 144 bytes, the packed data are 64 MiB."""
    path = archive(tmp_path / "x.npz", {"a.npy": npy(np.ones(4, np.float32)) + bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    assert struct.unpack_from("<L", data, place)[0] == 144 + (64 << 20)
    struct.pack_into("<L", data, place, 144)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(WrongRequest, match="CRC"):
        NpzFile(path).get("a")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


DICT = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
BAD = {
    "objects": ({"a.npy": npy(np.array([{}], object))}, "has more than numbers in a.npy"),
    "records": ({"a.npy": npy(np.zeros(2, "i4,f4"))}, "has more than numbers in a.npy"),
    "text": ({"a.npy": npy(np.array(["x"]))}, "has more than numbers in a.npy"),
    "no array": ({"a.txt": b"x"}, "has a.txt, which is not an array"),
    "version 2": ({"a.npy": header(DICT, (2, 0)) + bytes(8)}, "version (2, 0)"),
    "endless header": ({"a.npy": b"\x93NUMPY\1\0\xff\xff" + b" " * 70000}, "not a valid .npz"),
    "negative": ({"a.npy": header(DICT.replace("(2,)", "(-2, -1)")) + bytes(8)}, "of shape (-2, -1)"),
    "huge": ({"a.npy": header(DICT.replace("(2,)", "(2, 99999999999999999)"))}, "unpacks to"),
    "no tuple": ({"a.npy": header(DICT.replace("(2,)", "[2]")) + bytes(8)}, "not a valid .npz"),
    "code": ({"a.npy": header(DICT.replace("(2,)", "exit()")) + bytes(8)}, "not a valid .npz"),
    "open brackets": ({"a.npy": header("(" * 5000)}, "not a valid .npz"),
    "empty": ({"a.npy": b""}, "not a valid .npz"),
    "short": ({"a.npy": header(DICT) + bytes(7)}, "takes"),
    "many": ({f"{n}.npy": b"" for n in range(MAX_MEMBERS + 1)}, "it lists 257 arrays"),
}


@pytest.mark.parametrize("name", BAD)
def test_file_that_is_not_an_archive_of_numbers_is_refused_in_one_sentence(tmp_path, name):
    members, sentence = BAD[name]
    with pytest.raises(WrongRequest, match=re.escape(sentence)) as caught:
        NpzFile(archive(tmp_path / "x.npz", members))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("kept", [0, 1, 21, 100, 0.5, 0.99])
def test_a_truncated_archive_is_refused(tmp_path, kept):
    np.savez(tmp_path / "x.npz", **ARRAYS)
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[: kept if kept >= 1 else int(kept * len(data))])
    with pytest.raises(WrongRequest, match="is not a valid .npz file"):
        NpzFile(tmp_path / "x.npz")


def test_a_zip64_directory_is_refused_unread(tmp_path):
    np.savez(tmp_path / "x.npz", **ARRAYS)
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(data[:-22] + b"PK\6\7" + bytes(16) + data[-22:])
    with pytest.raises(WrongRequest, match="ZIP64"):
        NpzFile(tmp_path / "x.npz")


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """Each byte of a small archive is changed, one at a time; only WrongRequest is ever raised."""
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(6.0), b=np.asarray(False))
    data, refused = (tmp_path / "x.npz").read_bytes(), 0
    for place in range(len(data)):
        spoilt = bytearray(data)
        spoilt[place] ^= 0xFF
        (tmp_path / "y.npz").write_bytes(spoilt)
        try:
            npz = NpzFile(tmp_path / "y.npz")
            for name in npz.shapes:
                npz.get(name)
        except WrongRequest:
            refused += 1
    assert refused > len(data) // 2


def test_missing_file_is_named(tmp_path):
    with pytest.raises(WrongRequest, match=r"absent.npz cannot be read \(No such file"):
        NpzFile(tmp_path / "absent.npz")
