"""Numpy's .npz archives, read without trust: what a file claims is checked before anything of it is unpacked.

An archive is a ZIP file with an .npy file for each array (numpy.lib.format). Opening reads the ZIP's list and the first
bytes of every array: names, dtypes and shapes. An array's bytes are unpacked when it is asked for, no more of them than
its shape needs, so whoever looks at the shape first knows what it takes. Pickled objects are never read.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from fluxq.errors import WrongRequest

from .checkpoint.files import printable, refuse

MAX_MEMBERS = 256  # latents in a dozen resolutions have five arrays each
END = struct.Struct(
    "<4s4H2LH"
)  # the ZIP's last record: signature, disks, members (twice), bytes of the list, its place
# What zipfile and numpy raise for damaged bytes, a wrong password and packings that they do not know.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, RuntimeError, struct.error, TokenError)
LOCATOR = 20  # bytes of the record before it that leads to a longer list
MAKE_AGAIN = "delete it and have its program make it again"


class NpzFile:
    """An archive whose list and headers have been read: `shapes` and `dtypes` by array.

    Raises WrongRequest for all but an archive of plain numbers that is as long as it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        try:
            _check_end(path)
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    self._look_at(archive, member)
        except WrongRequest:
            raise
        except OSError as error:
            raise _unreadable(path, error) from error
        except DAMAGED as error:
            raise _damaged(path, error) from error

    def get(self, name: str) -> np.ndarray:
        """The array; as many bytes of it are unpacked as its shape needs."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                by_column = _header(file)[1]
                data = file.read(nbytes)  # its end is reached, so the checksum is compared too
        except OSError as error:
            raise _unreadable(self.path, error) from error
        except DAMAGED as error:
            raise _damaged(self.path, error) from error
        if len(data) != nbytes:
            refuse(self.path, f"has {len(data):,} of the {nbytes:,} bytes of {printable(name)}", MAKE_AGAIN)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")

    def _look_at(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename.removesuffix(".npy")
        shown = printable(member.filename)
        if name == member.filename or name in self.shapes:
            raise ValueError(f"it holds {shown}, which is no array or there twice")
        with archive.open(member) as file:
            shape, _, dtype = _header(file)
            begun = file.tell()
        if dtype.hasobject or dtype.kind not in "fiub":
            refuse(self.path, f"holds more than numbers in {shown}, and loading that can run hidden code", MAKE_AGAIN)
        wanted = begun + math.prod(shape) * dtype.itemsize
        if member.file_size != wanted or any(side < 0 for side in shape):
            raise ValueError(
                f"{shown} of shape {shape} takes {wanted:,} bytes, but would unpack to {member.file_size:,}"
            )
        self.shapes[name], self.dtypes[name] = shape, dtype


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether columns come first, dtype). Only version 1, whose header has at most 64 KiB."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array is of .npy version {version}, which numbers never need")
    return np.lib.format.read_array_header_1_0(file)


def _check_end(path: Path) -> None:
    """Raise ValueError where the list of members is longer than is ever needed: it would be read whole."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END.size - LOCATOR))
        end = file.read()
    if not end[-END.size :].startswith(b"PK\5\6") or len(end) < END.size + LOCATOR:
        raise ValueError("it is cut off, or no ZIP file")
    if end.startswith(b"PK\6\7"):
        raise ValueError("its list of arrays is of the ZIP64 kind, for more than 65,535 of them")
    members, list_bytes = END.unpack(end[-END.size :])[4:6]
    if members > MAX_MEMBERS or list_bytes > MAX_MEMBERS << 10:
        raise ValueError(f"it lists {members:,} arrays in {list_bytes:,} bytes")


def _damaged(path: Path, error: Exception) -> WrongRequest:
    return WrongRequest(f"{path} is no sound .npz file ({printable(str(error) or type(error).__name__)}); {MAKE_AGAIN}")


def _unreadable(path: Path, error: OSError) -> WrongRequest:
    return WrongRequest(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")
