"""How files store tensors, and how stored rows become weights: one small class per kind of storage.

    Plain     numbers of 8 to 64 bits
    Scaled    Comfy's scaled fp8: the weight and `<layer>.scale_weight` or `.weight_scale`
    FourBits  bitsandbytes' NF4 and FP4: the weight and `.absmax`, nested or not, `.quant_map`, `.quant_state.*`
    EightBits bitsandbytes' int8: the weight and `<layer>.SCB`
    Blocks    GGUF's quantized types, decoded by the gguf package
    Foreign   storage that fluxq does not read, kept to name it in messages

Formats with a container in fluxq/kernels/weights.py keep the file's exact bytes, all others become fp32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fluxq.kernels import NF4Weight, RowScaled, Weight, dequantize, unnest_absmax
from fluxq.kernels.reference import NF4_LEVELS
from fluxq.kernels.weights import NF4_BLOCK, of_parts, parts_of

from .files import DTYPE_NAMES, TensorFile, printable, refuse
from .gguf import GgufFile

PRECISIONS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8 e4m3",
    torch.float8_e5m2: "fp8 e5m2",
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NESTED = ("nested_absmax", "nested_quant_map")
FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes makes

OnRead = Callable[[Tensor], object]
"""Called with the bytes of every weight as they are read, to hash them."""


def ignore_bytes(data: Tensor) -> None:
    """An OnRead that does nothing."""


class Stored(ABC):
    """One logical tensor of a checkpoint."""

    shape: tuple[int, ...]
    """The shape of the decoded tensor."""
    kind: str
    """The kind of storage, as text for messages."""
    bits: float
    """Bits per weight."""
    nbytes: int
    wrong: str | None = None
    """Why the scale does not fit, or None."""

    @abstractmethod
    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> Weight:
        """The slices `rows` of the first dimension; nothing else is read. A scalar counts as one row."""


class Plain(Stored):
    def __init__(self, file: TensorFile, key: str, dtype: torch.dtype) -> None:
        self.file, self.key, self.dtype, self.shape = file, key, dtype, file.shape(key)
        self.nbytes, self.bits = file.size(key), dtype.itemsize * 8
        self.kind = PRECISIONS.get(dtype, DTYPE_NAMES[dtype])

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> Tensor:
        data = _rows(self.file, self.key, rows, self.nbytes // max((*self.shape, 1)[0], 1), on_read).view(self.dtype)
        return data.reshape(len(rows), *self.shape[1:]) if self.shape else data.reshape(())


class Scaled(Stored):
    """A tensor times its scale.

    The scale is one number, or for a matrix one per row, or (rows, n, 1): one for each of the n equal blocks of a row.
    """

    def __init__(self, plain: Plain, scale: Plain) -> None:
        self.plain, self.scale = plain, scale
        self.shape, self.nbytes, self.bits = plain.shape, plain.nbytes, plain.bits
        shape, by = plain.shape, scale.shape
        in_blocks = len(shape) == 2 and len(by) == 3 and by[::2] == (shape[0], 1) and by[1] and shape[1] % by[1] == 0
        self.kind = f"{plain.kind}, scaled" + (" in blocks" if in_blocks else "")
        fits = math.prod(by) == 1 or in_blocks or (len(shape) == 2 and by in (shape[:1], (*shape[:1], 1)))
        if not fits or scale.dtype in FP8 or scale.dtype not in PRECISIONS:
            self.wrong = _misfit(scale, shape)

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> Weight:
        values, scale = self.plain.rows(rows, on_read), self.scale.file.read(self.scale.key)
        on_read(scale)
        scale = scale.view(self.scale.dtype).float().reshape(self.scale.shape)
        if scale.numel() == 1:
            scale = scale.reshape(1).expand(len(rows)).contiguous()
        else:
            scale = scale[rows.start : rows.stop] if isinstance(rows, range) else scale[list(rows)]
        if scale.ndim == 3:
            return values.float().unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1)
        if values.dtype == torch.float8_e4m3fn and values.ndim == 2:
            return RowScaled(values, scale.reshape(-1))
        return values.float().mul_(scale.reshape(-1, *(1,) * (values.ndim - 1)))


class FourBits(Stored):
    """Two codes per byte, high nibble first; each stands for a level of the table times its block's absmax.

    Blocks are counted over the whole matrix, row after row: a block may begin in one row and end in the next, and the
    last one may be shorter. state is the JSON of `.quant_state.*`; owners maps the keys of the other parts to files.
    """

    def __init__(self, file: TensorFile, key: str, type: str, state: Any, owners: Mapping[str, TensorFile]) -> None:
        self.file, self.key, self.type, self.owners = file, key, type, owners
        self.is_nested = f"{key}.nested_absmax" in owners
        self.kind = type + (", nested" if self.is_nested else "")
        self.shape, self.block = state.get("shape"), state.get("blocksize")
        self.offset, self.nested_block = state.get("nested_offset", 0.0), state.get("nested_blocksize", 256)
        if not isinstance(self.shape, list) or len(self.shape) != 2 or not all(map(_is_count, self.shape)):
            damaged(file, f"{key}.quant_state", f"shape {printable(str(self.shape))}")
        if not _is_count(self.block) or self.block not in FOUR_BIT_BLOCKS:
            damaged(file, f"{key}.quant_state", f"blocks of {printable(str(self.block))}")
        if not _is_count(self.nested_block) or not isinstance(self.offset, float) or not math.isfinite(self.offset):
            state = f"offset {self.offset}, nested blocks of {self.nested_block}"
            damaged(file, f"{key}.quant_state", printable(state))
        self.shape = tuple(self.shape)
        self.nbytes, self.bits = -(-math.prod(self.shape) // 2), 4
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise WrongRequest unless each part exists and has the length that the shape requires."""
        blocks = -(-math.prod(self.shape) // self.block)
        sizes = {"": self.nbytes, ".quant_map": 64, ".absmax": blocks * (1 if self.is_nested else 4)}
        if self.is_nested:
            sizes |= {".nested_absmax": -(-blocks // self.nested_block) * 4, ".nested_quant_map": 1024}
        for part, size in sizes.items():
            name = f"{self.key}{part}"
            if name not in self.owners or self.owners[name].size(name) != size:
                actual = f"{self.owners[name].size(name):,} bytes" if name in self.owners else "missing"
                damaged(self.file, name, f"{actual}, but shape {self.shape} needs {size:,} bytes")

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> Weight:
        if not isinstance(rows, range):
            return joined([self.rows(range(row, row + 1), on_read) for row in rows])
        begin, end = rows.start * self.shape[1], rows.stop * self.shape[1]
        codes = _bytes(self.file, self.key, begin // 2, -(-end // 2), on_read)
        blocks = range(begin // self.block, -(-end // self.block))
        absmax, levels = self._absmax(blocks, on_read), self._floats("quant_map", on_read)
        absmax = absmax.repeat_interleave(self.block // (unit := min(self.block, NF4_BLOCK)))
        skipped = begin % self.block
        is_nf4 = self.type == "nf4" and torch.allclose(levels, torch.tensor(NF4_LEVELS), rtol=0, atol=1e-6)
        if is_nf4 and unit == NF4_BLOCK and self.shape[1] % NF4_BLOCK == 0:
            absmax = absmax[skipped // unit :][: (end - begin) // unit]
            return NF4Weight(codes.view(len(rows), -1), absmax.view(len(rows), -1))
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        values = pairs[codes.int()].flatten()[begin % 2 :][: end - begin]
        return values.mul_(absmax.repeat_interleave(unit)[skipped:][: end - begin]).view(len(rows), -1)

    def _absmax(self, blocks: range, on_read: OnRead) -> Tensor:
        """(len(blocks),) fp32, decoded if it is nested."""
        name, size = f"{self.key}.absmax", 1 if self.is_nested else 4
        data = _bytes(self.owners[name], name, blocks.start * size, blocks.stop * size, on_read)
        if not self.is_nested:
            return data.view(torch.float32)
        nested, table = (self._floats(part, on_read) for part in NESTED)
        index = torch.arange(blocks.start, blocks.stop) // self.nested_block
        return unnest_absmax(data, table, nested[index], self.offset, block=1)

    def _floats(self, part: str, on_read: OnRead) -> Tensor:
        data = self.owners[f"{self.key}.{part}"].read(f"{self.key}.{part}")
        on_read(data)
        return data.view(torch.float32)


class EightBits(Stored):
    """int8 rows, each scaled by its largest magnitude / 127."""

    def __init__(self, plain: Plain, largest: Plain) -> None:
        self.plain, self.largest, self.shape = plain, largest, plain.shape
        self.nbytes, self.bits, self.kind = plain.nbytes, 8, "int8"
        if (plain.dtype, largest.dtype, largest.shape) != (torch.int8, torch.float32, plain.shape[:1]):
            self.wrong = _misfit(largest, plain.shape)

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> RowScaled:
        values = self.plain.rows(rows, on_read)
        largest = self.largest.rows(rows, on_read)
        return RowScaled(values, largest / 127)


class Blocks(Stored):
    """A matrix in blocks of 32 or 256 numbers; each row is a whole number of blocks."""

    def __init__(self, file: GgufFile, key: str) -> None:
        self.file, self.key, self.type, self.shape = file, key, file.types[key], file.shape(key)
        self.nbytes, self.kind = file.size(key), file.types[key]
        self.bits = 8 * self.nbytes / max(math.prod(self.shape), 1)

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        data = _rows(self.file, self.key, rows, self.nbytes // self.shape[0], on_read).view(len(rows), -1)
        return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[self.type]))


class Foreign(Stored):
    """A tensor stored in a way that fluxq does not read."""

    def __init__(self, file: TensorFile, key: str, kind: str) -> None:
        self.kind, self.shape, self.nbytes = kind, file.shape(key), file.size(key)
        self.bits = 8 * self.nbytes / max(math.prod(self.shape), 1)

    def rows(self, rows: Sequence[int], on_read: OnRead = ignore_bytes) -> NoReturn:
        raise TypeError(f"fluxq does not read {self.kind}")


def joined(parts: Sequence[Weight]) -> Weight:
    """The rows of `parts`, concatenated: with their exact bytes if all are of one kind, else in fp32."""
    if len(parts) == 1:
        return parts[0]
    if len({(type(part), *(tensor.dtype for tensor in parts_of(part))) for part in parts}) > 1:
        return torch.cat([dequantize(part, torch.float32) for part in parts])
    return of_parts(parts[0], [torch.cat(same) for same in zip(*map(parts_of, parts), strict=True)])


def damaged(file: TensorFile, key: str, what: str) -> NoReturn:
    """Raise WrongRequest: the tensor or entry `key` is damaged."""
    refuse(file.path, f"has a damaged {printable(key)} ({what})", "download it again")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 31


def _misfit(scale: Plain, shape: tuple[int, ...]) -> str:
    return f"{printable(scale.key)} of {shape} is {scale.shape} {DTYPE_NAMES[scale.dtype]}"


def _rows(file: TensorFile, key: str, rows: Sequence[int], size: int, on_read: OnRead) -> Tensor:
    """The bytes of `rows`, of `size` bytes each; a range is read at once."""
    if isinstance(rows, range):
        return _bytes(file, key, rows.start * size, rows.stop * size, on_read)
    data = file.read(key, [(i * size, (i + 1) * size) for i in rows])
    on_read(data)
    return data


def _bytes(file: TensorFile, key: str, begin: int, end: int, on_read: OnRead) -> Tensor:
    data = file.read(key, [(begin, end)])
    on_read(data)
    return data
