"""How files store tensors, and how stored rows become weights: one small class a kind.

    Plain     numbers of 8 to 64 bits
    Scaled    Comfy's scaled fp8: `<layer>.scale_weight` or `.weight_scale` beside the weight
    FourBits  bitsandbytes' NF4 and FP4: `.absmax`, nested or not, `.quant_map` and `.quant_state.*` beside the weight
    EightBits bitsandbytes' int8: `<layer>.SCB` beside the weight
    Blocks    GGUF's quantized types, decoded by the gguf package
    Foreign   what fluxq does not read; it says so by name

What has a container in fluxq/kernels/weights.py comes as the very bytes in the file, all else as fp32.
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

Seen = Callable[[Tensor], object]
"""Is given the bytes of every weight as they are read."""


def unseen(data: Tensor) -> None:
    pass


class Stored(ABC):
    """One tensor of a checkpoint: the shape that it stands for, its kind for people, its bits a weight, its bytes."""

    shape: tuple[int, ...]
    kind: str
    bits: float
    nbytes: int
    wrong: str | None = None
    """What does not fit about a scale."""

    @abstractmethod
    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> Weight:
        """The slices at `rows` of the first dimension; nothing else is read. A number alone counts as one row."""


class Plain(Stored):
    def __init__(self, file: TensorFile, key: str, dtype: torch.dtype) -> None:
        self.file, self.key, self.dtype, self.shape = file, key, dtype, file.shape(key)
        self.nbytes, self.bits = file.size(key), dtype.itemsize * 8
        self.kind = PRECISIONS.get(dtype, DTYPE_NAMES[dtype])

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> Tensor:
        data = _rows(self.file, self.key, rows, self.nbytes // max((*self.shape, 1)[0], 1), seen).view(self.dtype)
        return data.reshape(len(rows), *self.shape[1:]) if self.shape else data.reshape(())


class Scaled(Stored):
    """A tensor that one number multiplies, or a matrix with one a row, or (rows, n, 1), one for each n-th of a row."""

    def __init__(self, plain: Plain, scale: Plain) -> None:
        self.plain, self.scale = plain, scale
        self.shape, self.nbytes, self.bits = plain.shape, plain.nbytes, plain.bits
        of, by = plain.shape, scale.shape
        in_blocks = len(of) == 2 and len(by) == 3 and by[::2] == (of[0], 1) and by[1] and of[1] % by[1] == 0
        self.kind = f"{plain.kind}, scaled" + (" in blocks" if in_blocks else "")
        fits = math.prod(by) == 1 or in_blocks or (len(of) == 2 and by in (of[:1], (*of[:1], 1)))
        if not fits or scale.dtype in FP8 or scale.dtype not in PRECISIONS:
            self.wrong = _misfit(scale, of)

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> Weight:
        values, scale = self.plain.rows(rows, seen), self.scale.file.read(self.scale.key)
        seen(scale)
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
    """Two codes a byte, high nibble first; each is a level of the table times its block's absmax.

    state is the JSON that lies beside it; the other parts lie in the files of `owners`.
    """

    def __init__(self, file: TensorFile, key: str, type: str, state: Any, owners: Mapping[str, TensorFile]) -> None:
        self.file, self.key, self.type, self.owners = file, key, type, owners
        self.is_nested = f"{key}.nested_absmax" in owners
        self.kind = type + (", nested" if self.is_nested else "")
        self.shape, self.block = state.get("shape"), state.get("blocksize")
        self.offset, self.nested_block = state.get("nested_offset", 0.0), state.get("nested_blocksize", 256)
        if not isinstance(self.shape, list) or len(self.shape) != 2 or not all(map(_is_count, self.shape)):
            damaged(file, f"{key}.quant_state", f"shape {printable(str(self.shape))}")
        if not _is_count(self.block) or self.block % NF4_BLOCK:
            damaged(file, f"{key}.quant_state", f"blocks of {printable(str(self.block))}")
        if not _is_count(self.nested_block) or not isinstance(self.offset, float) or not math.isfinite(self.offset):
            found = f"offset {self.offset}, nested blocks of {self.nested_block}"
            damaged(file, f"{key}.quant_state", printable(found))
        self.shape = tuple(self.shape)
        if self.shape[1] % self.block:
            what = (
                f"stores {printable(key)} in blocks of {self.block} that run over the ends of rows of {self.shape[1]}"
            )
            refuse(file.path, what, "give a 16-bit version")
        self.nbytes, self.bits = math.prod(self.shape) // 2, 4
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise unless each part is there and as long as the shape wants it."""
        blocks = math.prod(self.shape) // self.block
        sizes = {"": self.nbytes, ".quant_map": 64, ".absmax": blocks * (1 if self.is_nested else 4)}
        if self.is_nested:
            sizes |= {".nested_absmax": -(-blocks // self.nested_block) * 4, ".nested_quant_map": 1024}
        for part, size in sizes.items():
            name = f"{self.key}{part}"
            if name not in self.owners or self.owners[name].size(name) != size:
                found = f"{self.owners[name].size(name):,} bytes" if name in self.owners else "missing"
                damaged(self.file, name, f"{found}, {size:,} bytes are wanted for {self.shape}")

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> Weight:
        codes = _rows(self.file, self.key, rows, self.shape[1] // 2, seen).view(len(rows), -1)
        absmax, levels = self._absmax(rows, seen), self._floats("quant_map", seen)
        if self.type == "nf4" and torch.allclose(levels, torch.tensor(NF4_LEVELS), rtol=0, atol=1e-6):
            return NF4Weight(codes, absmax.repeat_interleave(self.block // NF4_BLOCK, 1))
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
        values = pairs[codes.int()].view(len(rows), -1, self.block)
        return values.mul_(absmax[..., None]).view(len(rows), -1)

    def _absmax(self, rows: Sequence[int], seen: Seen) -> Tensor:
        """(rows, blocks of a row) fp32, out of its nested form where it has one."""
        name, count = f"{self.key}.absmax", self.shape[1] // self.block
        data = _rows(self.owners[name], name, rows, count * (1 if self.is_nested else 4), seen)
        if not self.is_nested:
            return data.view(torch.float32).view(len(rows), count)
        index = torch.tensor(rows)[:, None] * count + torch.arange(count)
        nested, table = (self._floats(part, seen) for part in NESTED)
        found = unnest_absmax(data, table, nested[index.view(-1) // self.nested_block], self.offset, block=1)
        return found.view(len(rows), count)

    def _floats(self, part: str, seen: Seen) -> Tensor:
        data = self.owners[f"{self.key}.{part}"].read(f"{self.key}.{part}")
        seen(data)
        return data.view(torch.float32)


class EightBits(Stored):
    """int8 rows, each times its largest magnitude / 127."""

    def __init__(self, plain: Plain, largest: Plain) -> None:
        self.plain, self.largest, self.shape = plain, largest, plain.shape
        self.nbytes, self.bits, self.kind = plain.nbytes, 8, "int8"
        if (plain.dtype, largest.dtype, largest.shape) != (torch.int8, torch.float32, plain.shape[:1]):
            self.wrong = _misfit(largest, plain.shape)

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> RowScaled:
        values = self.plain.rows(rows, seen)
        largest = self.largest.rows(rows, seen)
        return RowScaled(values, largest / 127)


class Blocks(Stored):
    """A matrix in blocks of 32 or 256 numbers, whole ones in each row."""

    def __init__(self, file: GgufFile, key: str) -> None:
        self.file, self.key, self.type, self.shape = file, key, file.types[key], file.shape(key)
        self.nbytes, self.kind = file.size(key), file.types[key]
        self.bits = 8 * self.nbytes / max(math.prod(self.shape), 1)

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        data = _rows(self.file, self.key, rows, self.nbytes // self.shape[0], seen).view(len(rows), -1)
        return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[self.type]))


class Foreign(Stored):
    """A tensor that is stored as fluxq does not read it."""

    def __init__(self, file: TensorFile, key: str, kind: str) -> None:
        self.kind, self.shape, self.nbytes = kind, file.shape(key), file.size(key)
        self.bits = 8 * self.nbytes / max(math.prod(self.shape), 1)

    def rows(self, rows: Sequence[int], seen: Seen = unseen) -> NoReturn:
        raise TypeError(f"{self.kind} is not read")


def joined(parts: Sequence[Weight]) -> Weight:
    """The rows of `parts` one after another: the same bytes where all are of one kind, else numbers in fp32."""
    if len(parts) == 1:
        return parts[0]
    if len({(type(part), *(tensor.dtype for tensor in parts_of(part))) for part in parts}) > 1:
        return torch.cat([dequantize(part, torch.float32) for part in parts])
    return of_parts(parts[0], [torch.cat(same) for same in zip(*map(parts_of, parts), strict=True)])


def damaged(file: TensorFile, key: str, what: str) -> NoReturn:
    refuse(file.path, f"has a damaged {printable(key)} ({what})", "download it again")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 31


def _misfit(scale: Plain, of: tuple[int, ...]) -> str:
    return f"{printable(scale.key)} of {of} is {scale.shape} {DTYPE_NAMES[scale.dtype]}"


def _rows(file: TensorFile, key: str, rows: Sequence[int], size: int, seen: Seen) -> Tensor:
    """The bytes of `rows`, of `size` bytes each; neighbors by one read."""
    if isinstance(rows, range):
        spans = [(rows.start * size, rows.stop * size)]
    else:
        spans = [(i * size, (i + 1) * size) for i in rows]
    data = file.read(key, spans)
    seen(data)
    return data
