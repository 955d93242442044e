"""Read NumPy's .npz archives without trusting them: a file's claims are checked before anything is unpacked.

An archive is a ZIP file with an .npy file for each array (numpy.lib.format). Opening it reads the ZIP's directory and
the first bytes of every array, for names, dtypes and shapes. An array's bytes are unpacked only by `get`, and no more
of them than its shape needs, so its shape shows the cost in advance. Pickled objects are never read.
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
# The ZIP's last record: signature, disks, members (twice), size of the directory, its position, length of a comment.
END = struct.Struct("<4s4H2LH")
# Raised by zipfile and numpy for damaged bytes, a wrong password and unknown compression.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, RuntimeError, struct.error, TokenError)
LOCATOR = 20  # size of the ZIP64 locator, a record before END that points to a longer directory
REMEDY = "delete it and create it again with its program"


class NpzFile:
    """An archive whose directory and headers have been read: `shapes` and `dtypes` by array.

    Raises WrongRequest unless the archive holds only plain numbers and its sizes are consistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        try:
            _check_end(path)
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    self._read_header(archive, member)
        except WrongRequest:
            raise
        except OSError as error:
            raise _unreadable(path, error) from error
        except DAMAGED as error:
            raise _damaged(path, error) from error

    def get(self, name: str) -> np.ndarray:
        """The array; only as many bytes as its shape needs are unpacked."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                by_column = _header(file)[1]
                data = file.read(nbytes)  # reaches the end, so zipfile compares the checksum too
        except OSError as error:
            raise _unreadable(self.path, error) from error
        except DAMAGED as error:
            raise _damaged(self.path, error) from error
        if len(data) != nbytes:
            refuse(self.path, f"has only {len(data):,} of the {nbytes:,} bytes of {printable(name)}", REMEDY)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if by_column else "C")

    def _read_header(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename.removesuffix(".npy")
        shown = printable(member.filename)
        if name == member.filename or name in self.shapes:
            raise ValueError(f"it has {shown}, which is not an array or occurs twice")
        with archive.open(member) as file:
            shape, _, dtype = _header(file)
            start = file.tell()
        if dtype.hasobject or dtype.kind not in "fiub":
            refuse(self.path, f"has more than numbers in {shown}, which can run hidden code when loaded", REMEDY)
        wanted = start + math.prod(shape) * dtype.itemsize
        if member.file_size != wanted or any(side < 0 for side in shape):
            raise ValueError(f"{shown} of shape {shape} takes {wanted:,} bytes, but unpacks to {member.file_size:,}")
        self.shapes[name], self.dtypes[name] = shape, dtype


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether the order is column-major, dtype). Only version 1, whose header has at most 64 KiB."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"an array has .npy version {version}, which plain numbers never need")
    return np.lib.format.read_array_header_1_0(file)


def _check_end(path: Path) -> None:
    """Raise ValueError if the directory is longer than is ever needed, because zipfile would read all of it."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END.size - LOCATOR))
        end = file.read()
    if not end[-END.size :].startswith(b"PK\5\6") or len(end) < END.size + LOCATOR:
        raise ValueError("it is truncated or not a ZIP file")
    if end.startswith(b"PK\6\7"):
        raise ValueError("it has a ZIP64 directory, which is for more than 65,535 arrays")
    members, list_bytes = END.unpack(end[-END.size :])[4:6]
    if members > MAX_MEMBERS or list_bytes > MAX_MEMBERS << 10:
        raise ValueError(f"it lists {members:,} arrays in {list_bytes:,} bytes")


def _damaged(path: Path, error: Exception) -> WrongRequest:
    return WrongRequest(f"{path} is not a valid .npz file ({printable(str(error) or type(error).__name__)}); {REMEDY}")


def _unreadable(path: Path, error: OSError) -> WrongRequest:
    return WrongRequest(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")
