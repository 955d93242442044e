"""Read and write safetensors files.

A file is 8 bytes of header length, a JSON header, then the tensors back to back (github.com/huggingface/safetensors).
The reader checks the whole header against the file's size before it touches any tensor. Then it reads one tensor at a
time at its position. It uses no memory map, so a file can be replaced while it is in use, also on Windows.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import torch

from fluxq.errors import WrongRequest

from ..atomic import atomic_path

MAX_HEADER_BYTES = 32 << 20  # real headers are below 1 MB; embedded preview images add a few more
MAX_TENSORS = 1 << 16  # real files have up to a few thousand
MAX_HEADER_ITEMS = 16 * MAX_TENSORS  # commas and brackets: 8 per tensor, the rest for metadata that is itself JSON
MAX_DIMENSIONS = 8

# In the safetensors library's order. A file stores its tensors by falling rank, the last dtype of this table first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
OTHER_MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"RIFF": "an image or sound file (RIFF)",
    b"GIF8": "an image (GIF)",
    b"BM": "an image (BMP)",
    b"<": "a web page, probably an error page instead of the download",
    b"version https://git-lfs": "a git-lfs pointer, not the file it points to",
}

MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises for data of another form than the code expects; RecursionError for deeply nested JSON or TOML."""

Span = tuple[int, int]  # [begin, end) in bytes
_Entry = tuple[torch.dtype, tuple[int, ...], Span]  # the span is relative to the data section


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors`, on any device and of any stride, and `metadata` to `path`, completely or not at all.

    Equal arguments give equal bytes; with at most one metadata entry, the same bytes as the safetensors library. Raises
    WrongRequest if the path cannot be written or the disk is full; an existing file is then unchanged.
    """
    header = safetensors_header(tensors, metadata)
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with atomic_path(path, nbytes) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for data in safetensors_data(tensors):
            file.write(data)


def safetensors_header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """All bytes of a file before its tensors: length, JSON, and spaces up to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in _storage_order(tensors):
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_data(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of each tensor, in the order of the file."""
    for name in _storage_order(tensors):
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensors: Iterable[tuple[str, torch.Tensor]], text: str = "") -> str:
    """A digest of (name, tensor) in this order, contiguous and on the CPU, and of `text`."""
    digest = blake2b(text.encode(errors="replace"), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="replace"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorFile:
    """A file whose header has been read and checked; its tensors are read by position, as raw bytes.

    shapes maps each key to its shape; nbytes is the total size of all tensors; metadata is text about the file.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], spans: Mapping[str, Span], metadata: dict[str, str]
    ):
        """spans: key -> [begin, end) in the file."""
        self.path, self.shapes, self.metadata, self._spans = path, shapes, metadata, spans

    def keys(self) -> KeysView[str]:
        return self.shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        self._span(key)
        return self.shapes[key]

    def size(self, key: str) -> int:
        """The tensor's size in bytes."""
        begin, end = self._span(key)
        return end - begin

    def read(self, key: str, spans: Sequence[Span] | None = None) -> torch.Tensor:
        """A copy of the tensor's bytes, flat uint8; with `spans`, [begin, end) within the tensor, only those bytes."""
        spans = [(0, self.size(key))] if spans is None else spans
        data = torch.empty(sum(end - begin for begin, end in spans), dtype=torch.uint8)
        self._fill(key, spans, data)
        return data

    def read_into(self, key: str, out: torch.Tensor) -> None:
        """Fill `out`, flat uint8 of the tensor's length, with its bytes. Raises ValueError for a different length."""
        if len(out) != self.size(key):
            raise ValueError(f"{printable(key)} has {self.size(key):,} bytes, not {len(out):,}")
        self._fill(key, [(0, len(out))], out)

    def _fill(self, key: str, spans: Sequence[Span], out: torch.Tensor) -> None:
        view, done, wanted, start = out.numpy().data, 0, 0, self._span(key)[0]
        try:
            with open(self.path, "rb", buffering=0) as file:
                for begin, end in spans:
                    file.seek(start + begin)
                    wanted += end - begin
                    while done < wanted and (count := file.readinto(view[done:wanted])):  # at most 2 GiB per call
                        done += count
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if done < len(view):
            what = f"only {done:,} of the {len(view):,} bytes of {printable(key)} are left"
            refuse(self.path, f"became shorter while it was read: {what}", "start again")

    def _span(self, key: str) -> Span:
        if key not in self._spans:
            refuse(self.path, f"has no tensor {printable(key)}", "use a file that has it")
        return self._spans[key]


class Checkpoint(TensorFile):
    """A safetensors file; metadata is the header's `__metadata__`, or {}.

    Raises WrongRequest, with what is wrong, unless the file is a complete safetensors file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        file_size, start, header = _read_header(path)
        metadata = _checked_metadata(path, header.pop("__metadata__", {}))
        entries = {key: _checked_entry(path, key, entry) for key, entry in header.items()}
        self.nbytes = _checked_nbytes(path, file_size, start, entries)
        self._dtypes = {key: dtype for key, (dtype, _, _) in entries.items()}
        shapes = {key: shape for key, (_, shape, _) in entries.items()}
        spans = {key: (start + begin, start + end) for key, (_, _, (begin, end)) in entries.items()}
        super().__init__(path, shapes, spans, metadata)

    def dtype(self, key: str) -> torch.dtype:
        self._span(key)
        return self._dtypes[key]

    def get(self, key: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """A copy of the tensor, or of its rows [begin, end), in the file's dtype. Only these bytes are read."""
        shape = self.shape(key)
        if not shape or (begin == 0 and end is None):
            return self.read(key).view(self.dtype(key)).reshape(shape)
        end = shape[0] if end is None else end
        if not 0 <= begin <= end <= shape[0]:
            raise ValueError(f"{printable(key)} has {shape[0]} rows, so there are no rows {begin} to {end}")
        row = self.size(key) // max(shape[0], 1)
        return self.read(key, [(begin * row, end * row)]).view(self.dtype(key)).reshape(end - begin, *shape[1:])


def strict_load(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Make `tensors` the parameters and buffers of `module`, without copying or casting; keys and shapes must match.

    Dtypes and devices stay as they are. If the module ties names (one tensor under several names), one of them is
    enough. Raises WrongRequest, with `source` and the keys, and then leaves the module unchanged.
    """
    wanted = module.state_dict(keep_vars=True)
    tied = {id(wanted[key]): tensor for key, tensor in tensors.items() if key in wanted}
    state = {key: tensors.get(key, tied.get(id(own))) for key, own in wanted.items()}
    missing = [key for key, tensor in state.items() if tensor is None]
    unexpected = [printable(key) for key in tensors if key not in wanted]
    wrong = [
        f"{key} is {tuple(tensor.shape)}, not {tuple(wanted[key].shape)}"
        for key, tensor in state.items()
        if tensor is not None and tensor.shape != wanted[key].shape
    ]
    if problems := listed(missing=missing, unexpected=unexpected, wrong_shape=wrong):
        refuse(source, f"does not fit {type(module).__name__}: {problems}", "use the file that belongs to it")
    module.load_state_dict(state, strict=True, assign=True)


def listed(**problems: list[str]) -> str:
    """A clause like "2 missing (a; b), 1 wrong shape (c is (2,), not (3,))"; empty lists are left out."""
    return ", ".join(
        f"{len(names):,} {what.replace('_', ' ')} ({'; '.join(names[:4])}{'; ...' if len(names) > 4 else ''})"
        for what, names in problems.items()
        if names
    )


def _read_header(path: Path) -> tuple[int, int, dict]:
    """(file size, start of the data section, parsed JSON header)."""
    if path.is_dir():
        refuse(path, "is a folder, not a safetensors file", "name the file inside it")
    if not path.is_file():
        refuse(path, "does not exist", "check the path")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        _refuse_pickle(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            _refuse_foreign(path, size, start)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES:
                _refuse_header(path, f"it claims {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
            if 8 + length > size:
                _refuse_truncated(path, 8 + length, size, "for its header alone")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    if sum(map(text.count, b",[{")) > MAX_HEADER_ITEMS:  # parsed, each takes at least 60 bytes
        _refuse_header(path, f"it lists more than {MAX_HEADER_ITEMS:,} items")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        _refuse_header(path, printable(str(error)))
    if not isinstance(header, dict):
        _refuse_header(path, f"it is a JSON {type(header).__name__}, not an object")
    if len(header) > MAX_TENSORS:
        _refuse_header(path, f"it lists {len(header):,} tensors, the limit is {MAX_TENSORS:,}")
    return size, 8 + length, header


def _refuse_foreign(path: Path, size: int, start: bytes) -> None:
    """Raise WrongRequest if the first bytes show that the file is not a safetensors file."""
    if size == 0:
        refuse(path, "is empty (0 bytes)", "download it again")
    if start[8:9] == b"{":
        return
    if start.startswith(PICKLE_MAGIC):
        _refuse_pickle(path)
    for magic, kind in OTHER_MAGIC.items():
        if start.startswith(magic):
            refuse(path, f"is {kind}", "use a .safetensors file")
    if size <= 8:
        _refuse_truncated(path, 10, size, "at the very least")
    what = f"is not a safetensors file (its header begins with {start[8:9]!r}, not b'{{')"
    refuse(path, what, "download it again")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {printable(key)} occurs twice")
        result[key] = value
    return result


def _checked_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse_header(path, "its metadata must map names to text")
    return metadata


def _checked_entry(path: Path, key: str, entry: object) -> _Entry:
    """One tensor's dtype, shape and span. Raises WrongRequest unless they agree with each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse_header(path, f"{printable(key)} must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _whole_numbers(shape) or not _whole_numbers(span) or len(span) != 2:
        _refuse_header(path, f"the dtype, shape or data_offsets of {printable(key)} has the wrong type")
    if dtype not in DTYPES:
        what = f"stores {printable(key)} as {printable(dtype)}, which fluxq does not read"
        refuse(path, what, "use a 16- or 32-bit version")
    itemsize = DTYPES[dtype].itemsize
    if len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) * itemsize >= 1 << 63:
        _refuse_header(path, f"the shape of {printable(key)} is impossible: {printable(str(shape))}")
    wanted, given = math.prod(shape) * itemsize, span[1] - span[0]
    if wanted != given:
        what = f"{printable(key)} of shape {shape} in {dtype} takes {wanted:,} bytes, but has {given:,}"
        _refuse_header(path, what)
    return DTYPES[dtype], tuple(shape), (span[0], span[1])


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _checked_nbytes(path: Path, file_size: int, data_start: int, entries: dict[str, _Entry]) -> int:
    """The total size of all tensors. Raises WrongRequest unless they fill the data section: no overlap, no gap."""
    nbytes = 0
    for key, (_, _, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != nbytes:
            what = "overlaps the tensor before it" if begin < nbytes else "leaves a gap after the tensor before it"
            _refuse_header(path, f"{printable(key)} {what}: it begins at byte {begin:,} of the data, not {nbytes:,}")
        nbytes = end
    if data_start + nbytes > file_size:
        _refuse_truncated(path, data_start + nbytes, file_size, "according to its header")
    if data_start + nbytes < file_size:
        rest = file_size - data_start - nbytes
        refuse(path, f"has {rest:,} extra bytes after the last tensor of its header", "download it again")
    return nbytes


def refuse(path: str | Path, what: str, remedy: str) -> NoReturn:
    """Raise WrongRequest with the sentence "<path> <what>; <remedy>"."""
    raise WrongRequest(f"{path} {what}; {remedy}")


@contextmanager
def well_formed(path: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Around code that takes a file's contents to have a certain form: whatever Python raises if they do not becomes
    WrongRequest, with the sentence "<path> <what> (<reason>); <remedy>".
    """
    try:
        yield
    except WrongRequest:
        raise
    except MALFORMED as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        refuse(path, f"{what} ({printable(reason)})", remedy)


def _refuse_header(path: Path, what: str) -> NoReturn:
    refuse(path, f"has a damaged header ({what})", "download it again")


def _refuse_truncated(path: Path, expected: int, actual: int, why: str) -> NoReturn:
    what = f"is truncated: expected {expected:,} bytes {why}, found {actual:,}, {expected - actual:,} missing"
    refuse(path, what, "download it again")


def _refuse_pickle(path: Path) -> NoReturn:
    refuse(path, "is a pickle checkpoint, which can run hidden code when loaded", "use its .safetensors version")


def _unreadable(path: Path, error: OSError) -> WrongRequest:
    return WrongRequest(f"{path} cannot be read ({error.strerror or error}); check its permissions and the disk")


def printable(text: str) -> str:
    """A name from a file, shortened and safe to print."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _storage_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names by falling dtype rank, then alphabetically. Wide types come first, so every tensor is aligned."""
    return sorted(tensors, key=lambda name: (-DTYPE_RANK[tensors[name].dtype], name))
