"""The key-values at the start of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md); its tensors are not read.

Every length is checked against what is left before anything is read, and only what was asked for is kept: a header that
lies costs no memory.
"""

import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NoReturn

from fluxq.errors import WrongRequest
from fluxq.formats.files import printable, refuse

MAX_BYTES = 32 << 20  # all key-values together; a vocabulary of 256,000 pieces with its merges takes about 12 MB
MAX_KEYS = 4096  # real files have below 100
MAX_KEY_BYTES = 65535  # as the format has it
MAX_ITEMS = 1 << 20  # of an array that is kept; T5's charsmap is 237,539 bytes
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Value = str | int | float | bool | list[str] | tuple[int | float | bool, ...]


def read_gguf_values(path: Path, keys: Collection[str]) -> dict[str, Value]:
    """The values of those of `keys` that the file has. Raises WrongRequest, saying what is wrong with its header."""
    try:
        with open(path, "rb") as file:
            return _Reader(path, file).values(keys)
    except OSError as error:
        raise WrongRequest(f"{path} cannot be read ({error.strerror or error})") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.left = min(os.fstat(file.fileno()).st_size, MAX_BYTES)

    def values(self, keys: Collection[str]) -> dict[str, Value]:
        if self.left < 4 or self.take(4) != b"GGUF":
            refuse(self.path, "is no GGUF file", "give one that is")
        version = self.number("I")
        if version not in VERSIONS:
            refuse(self.path, f"is GGUF of version {version}, only 2 and 3 are read", "convert it again")
        self.number("Q")  # tensors
        count = self.number("Q")
        if count > MAX_KEYS:
            self.damaged(f"it claims {count:,} key-values, the most that are read is {MAX_KEYS:,}")
        found = {}
        for _ in range(count):
            key = self.string(MAX_KEY_BYTES)
            value = self.value(key, keep=key in keys)
            if value is not None:
                found[key] = value
        return found

    def value(self, key: str, keep: bool) -> Value | None:
        """The next value; None, and only passed over, unless `keep`."""
        kind, count = self.number("I"), 1
        is_array = kind == ARRAY
        if is_array:
            kind, count = self.number("I"), self.number("Q")
        if kind != STRING and kind not in SCALARS:
            self.damaged(f"{printable(key)} has a value of the unknown type {kind}")
        least = count * (8 if kind == STRING else struct.calcsize(SCALARS[kind]))
        if least > self.left:
            self.damaged(f"{printable(key)} claims {count:,} values, {self.left:,} bytes are left or allowed")
        if not keep:
            if kind != STRING:
                self.skip(least)
            else:
                for _ in range(count):
                    self.skip(self.number("Q"))
            return None
        if count > MAX_ITEMS:
            self.damaged(f"{printable(key)} claims {count:,} values, the most that are read is {MAX_ITEMS:,}")
        if kind == STRING:
            strings = [self.string() for _ in range(count)]
            return strings if is_array else strings[0]
        numbers = struct.unpack(f"<{count}{SCALARS[kind]}", self.take(least))
        return numbers if is_array else numbers[0]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self, most: int = MAX_BYTES) -> str:
        length = self.number("Q")
        if length > most:
            self.damaged(f"it claims a string of {length:,} bytes, the most that are read is {most:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.damaged("a string is not UTF-8")

    def take(self, count: int) -> bytes:
        self.spend(count)
        data = self.file.read(count)
        if len(data) < count:
            self.damaged("it has become shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self.spend(count)
        self.file.seek(count, os.SEEK_CUR)

    def spend(self, count: int) -> None:
        if count > self.left:
            self.damaged(f"it claims {count:,} more bytes, {self.left:,} are left or allowed")
        self.left -= count

    def damaged(self, what: str) -> NoReturn:
        refuse(self.path, f"has a damaged header ({what})", "download it again")
