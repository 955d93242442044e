"""Read the header of a GGUF file, including its tensors' positions (github.com/ggml-org/ggml, docs/gguf.md).

A header holds key-value pairs, then each tensor's name, dimensions, type and offset. Every length is checked against
the bytes that are left before anything is read, and only requested values are kept, so a header with false lengths
costs no memory.
"""

import math
import os
import struct
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, NoReturn

from fluxq.errors import WrongRequest

from .files import MAX_TENSORS, Span, TensorFile, printable, refuse

MAX_BYTES = 32 << 20  # of a whole header; a vocabulary of 256,000 pieces with its merges takes about 12 MB
MAX_NAME_BYTES = 1024  # GGML itself allows 64
MAX_DIMENSIONS = 4  # the format's limit
ALIGNMENT = 32  # unless `general.alignment` differs
MAX_KEYS = 4096  # real files have fewer than 100
MAX_KEY_BYTES = 65535  # the format's limit
MAX_ITEMS = 1 << 20  # of an array that is kept; T5's charsmap is 237,539 bytes
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Shape = tuple[int, ...]
Value = str | int | float | bool | list[str] | tuple[int | float | bool, ...]


class GgufFile(TensorFile):
    """A GGUF file; types maps each key to the name of its type ("BF16", "Q4_K"), and shapes are (..., in).

    Raises WrongRequest, with what is wrong, unless the file is a complete GGUF file.
    """

    def __init__(self, path: Path):
        try:
            with open(path, "rb") as file:
                reader = _Reader(path, file)
                metadata = reader.values(("general.architecture", "general.name", "general.alignment"))
                shapes, self.types, spans = reader.tensors(metadata.pop("general.alignment", ALIGNMENT))
        except OSError as error:
            raise WrongRequest(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error
        self.nbytes = sum(end - begin for begin, end in spans.values())
        super().__init__(path, shapes, spans, {key: str(value) for key, value in metadata.items()})


def read_gguf_values(path: Path, keys: Collection[str]) -> dict[str, Value]:
    """The values of all `keys` that the file has. Raises WrongRequest if its header is damaged."""
    try:
        with open(path, "rb") as file:
            return _Reader(path, file).values(keys)
    except OSError as error:
        raise WrongRequest(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error


class _Reader:
    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left, self.count = min(self.size, MAX_BYTES), 0

    def values(self, keys: Collection[str]) -> dict[str, Value]:
        if self.left < 4 or self.take(4) != b"GGUF":
            refuse(self.path, "is not a GGUF file", "use a GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            refuse(self.path, f"is GGUF version {version}, but fluxq reads only 2 and 3", "convert it again")
        self.count, count = self.number("Q"), self.number("Q")
        if count > MAX_KEYS:
            self.damaged(f"it claims {count:,} key-value pairs, the limit is {MAX_KEYS:,}")
        values = {}
        for _ in range(count):
            key = self.string(MAX_KEY_BYTES)
            value = self.value(key, keep=key in keys)
            if key in values:
                self.damaged(f"the key {printable(key)} occurs twice")
            if value is not None:
                values[key] = value
        return values

    def tensors(self, alignment: Value) -> tuple[dict[str, Shape], dict[str, str], dict[str, Span]]:
        """Shapes, types and spans of all tensors. Call it after `values`.

        The data section begins at the next multiple of `alignment`.
        """
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            self.damaged(f"its alignment {printable(str(alignment))} is not a power of two")
        if self.count > MAX_TENSORS:
            self.damaged(f"it claims {self.count:,} tensors, the limit is {MAX_TENSORS:,}")
        shapes: dict[str, Shape] = {}
        types: dict[str, str] = {}
        places: dict[str, Span] = {}
        for _ in range(self.count):
            name = self.string(MAX_NAME_BYTES)
            if name in shapes:
                self.damaged(f"the tensor {printable(name)} occurs twice")
            shapes[name], types[name], nbytes = self.sizes(name)
            start = self.number("Q")
            places[name] = (start, start + nbytes)
        data = -(-self.file.tell() // alignment) * alignment
        self.check(places, data, alignment)
        return shapes, types, {name: (data + begin, data + end) for name, (begin, end) in places.items()}

    def sizes(self, name: str) -> tuple[Shape, str, int]:
        """The next tensor's shape, type and size in bytes. Each row must be a whole number of blocks."""
        from gguf import GGML_QUANT_SIZES  # imported here because it takes 0.1 s

        dimensions = self.number("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            self.damaged(f"{printable(name)} has {dimensions:,} dimensions, not 1 to {MAX_DIMENSIONS}")
        reverse = [self.number("Q") for _ in range(dimensions)]
        number = self.number("I")
        kind = next((kind for kind in GGML_QUANT_SIZES if kind.value == number), None)
        if kind is None:
            self.damaged(f"{printable(name)} has the unknown type {number}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = math.prod(reverse)
        if reverse[0] % block or count // block * block_bytes > self.size:
            shape = " x ".join(f"{n:,}" for n in reverse)
            self.damaged(f"{printable(name)} cannot be {shape} in {kind.name}, whose blocks are {block}")
        return tuple(reversed(reverse)), kind.name, count // block * block_bytes

    def check(self, places: dict[str, Span], data: int, alignment: int) -> None:
        """Raise WrongRequest unless the tensors fill the file from `data` on: no overlap, and no gap but padding."""
        filled = 0
        for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
            if begin % alignment or not filled <= begin < filled + alignment:
                what = "overlaps the tensor before it" if begin < filled else "does not follow the tensor before it"
                self.damaged(f"{printable(name)} {what}: it begins at byte {begin:,} of the data, not {filled:,}")
            filled = end
        if (missing := data + filled - self.size) > 0 and places:
            what = f"is truncated: expected {data + filled:,} bytes according to its header, found {self.size:,}"
            refuse(self.path, f"{what}, {missing:,} missing", "download it again")
        if -missing >= alignment:
            what = f"has {-missing:,} extra bytes after the last tensor of its header"
            refuse(self.path, what, "download it again")

    def value(self, key: str, keep: bool) -> Value | None:
        """The next value; without `keep` it is skipped, and the result is None."""
        kind, count = self.number("I"), 1
        is_array = kind == ARRAY
        if is_array:
            kind, count = self.number("I"), self.number("Q")
        if kind != STRING and kind not in SCALARS:
            self.damaged(f"{printable(key)} has the unknown type {kind}")
        min_bytes = count * (8 if kind == STRING else struct.calcsize(SCALARS[kind]))
        if min_bytes > self.left:
            self.damaged(f"{printable(key)} claims {count:,} values, but only {self.left:,} bytes are left or allowed")
        if not keep:
            if kind != STRING:
                self.skip(min_bytes)
            else:
                for _ in range(count):
                    self.skip(self.number("Q"))
            return None
        if count > MAX_ITEMS:
            self.damaged(f"{printable(key)} claims {count:,} values, the limit is {MAX_ITEMS:,}")
        if kind == STRING:
            strings = [self.string() for _ in range(count)]
            return strings if is_array else strings[0]
        numbers = struct.unpack(f"<{count}{SCALARS[kind]}", self.take(min_bytes))
        return numbers if is_array else numbers[0]

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self, most: int = MAX_BYTES) -> str:
        length = self.number("Q")
        if length > most:
            self.damaged(f"it claims a string of {length:,} bytes, the limit is {most:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.damaged("a string is not UTF-8")

    def take(self, count: int) -> bytes:
        self.spend(count)
        data = self.file.read(count)
        if len(data) < count:
            self.damaged("it became shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self.spend(count)
        self.file.seek(count, os.SEEK_CUR)

    def spend(self, count: int) -> None:
        if count > self.left:
            self.damaged(f"it claims {count:,} more bytes, but only {self.left:,} are left or allowed")
        self.left -= count

    def damaged(self, what: str) -> NoReturn:
        refuse(self.path, f"has a damaged header ({what})", "download it again")
