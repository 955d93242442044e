"""Merge a LoRA into its transformer, in memory to train on top of it, or into a checkpoint's tensors.

`MergedSource` returns a source's tensors with the LoRAs merged in, so any code that reads a source reads the merged
model. `merge_into` writes a new checkpoint, one tensor at a time: every tensor keeps its key, shape and dtype, 8-bit
weights keep their scales, and the loss from rounding to that dtype is measured.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b, file_digest
from pathlib import Path

import torch
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.kernels import Weight, dequantize
from fluxq.model.config import FluxConfig

from ..atomic import atomic_folder, atomic_path, remove_leftover
from ..checkpoint import detect, keys, sizes
from ..checkpoint.detect import DIFFUSERS_FLUX, FLUX
from ..checkpoint.files import Checkpoint, printable, refuse, safetensors_data, safetensors_header
from ..checkpoint.gguf import GgufFile
from ..checkpoint.keys import RowRange
from ..checkpoint.shards import Shards, locate
from ..checkpoint.source import Source
from ..checkpoint.stored_tensors import OnRead, Plain, Scaled, ignore_bytes
from ..quantized import is_finite, require_disk_space
from .algebra import Adapter
from .peft import adapter_files

MERGEABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
ROWS_AT_ONCE = 512  # few enough that the merged rows stay in the CPU's caches
REMEDY = "use a transformer in 16 or 32 bits or in fp8, as a BFL file or a diffusers folder"


def lora_hashes(loras: Iterable[tuple[Path, float]]) -> str:
    """One line per LoRA with its files' hash and its strength; "" for no LoRAs. Used as a cache key."""
    lines = []
    for path, strength in loras:
        digest = blake2b(digest_size=16)
        tensors, settings = adapter_files(path)
        for file in (tensors, settings) if settings and settings.is_file() else (tensors,):
            digest.update(_hash(file))
        lines.append(f"{digest.hexdigest()} {strength!r}")
    return "\n".join(lines)


def _hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file_digest(file, "blake2b").digest()
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror or error})", "check the path")


class MergedSource(Source[FluxConfig]):
    """`source` with `adapters` (BFL module -> adapter) merged into its weights. Merged matrices are fp32."""

    def __init__(self, source: Source[FluxConfig], adapters: Mapping[str, Adapter]) -> None:
        vars(self).update(vars(source))
        self.original, self.adapters = source, adapters

    def get(self, name: str, rows: range | None = None, on_read: OnRead = ignore_bytes) -> Weight:
        weight, adapter = self.original.get(name, rows, on_read), self.adapters.get(name.removesuffix(".weight"))
        if adapter is None:
            return weight
        up = adapter.up if rows is None else adapter.up[rows.start : rows.stop]
        weight = dequantize(weight, torch.float32)
        if not is_finite(weight):
            refuse(self.path, f"has NaN or infinite numbers in {name}", "use another file")
        merged = weight.add_(Adapter(adapter.down, up, adapter.alpha).change())
        _require_finite(merged, name)
        return merged


class Base:
    """A checkpoint to merge into, with the module of each row of its tensors. Only headers are read.

    Raises WrongRequest unless the file is a complete FLUX.1 transformer in 16 or 32 bits or in fp8.
    """

    def __init__(self, path: Path) -> None:
        located = locate(path, FLUX)
        self.is_folder, self.shards = path.is_dir() or located.suffix.lower() == ".json", Shards(located)
        if "fluxq" in self.shards.metadata:
            what = "is already quantized by fluxq"
            refuse(path, what, "merge into the original file, or train on it with --base-lora")
        shapes = self.shards.shapes
        pieces: Mapping[str, tuple[RowRange, ...]]
        if detect.kind(shapes) == DIFFUSERS_FLUX:
            self.config = sizes.flux_sizes(keys.flux_original_names(shapes), located)
            sizes.compare(shapes, keys.flux_diffusers_shapes(self.config), FLUX, located)
            pieces = keys.flux_pieces(self.config)
        else:
            self.config = sizes.flux_config(shapes, located)
            names = sizes.flux_keys(shapes, located)
            pieces = {name: (RowRange(key, 0, (*shapes[key], 1)[0]),) for name, key in names.items()}
        self.places = _places(pieces)
        self.keys = {piece.key for parts in pieces.values() for piece in parts}
        for key in self.places:
            plain = stored.plain if isinstance(stored := self.shards.tensors[key], Scaled) else stored
            if not isinstance(plain, Plain) or plain.dtype not in MERGEABLE_DTYPES or isinstance(plain.file, GgufFile):
                refuse(located, f"stores {key} as {stored.kind}, which fluxq cannot merge into", REMEDY)

    def merged(self, key: str, stored: Tensor, adapters: Mapping[str, Adapter], errors: RoundingError) -> Tensor:
        """`stored` after merging `adapters` into it in place, with the same dtype and scale."""
        scale = self._scale(key)
        for piece, module, start in self.places.get(key, ()):
            for first in range(0, piece.rows if module in adapters else 0, ROWS_AT_ONCE):
                count, adapter = min(ROWS_AT_ONCE, piece.rows - first), adapters[module]
                rows = slice(piece.first + first, piece.first + first + count)
                own = scale[rows] if scale.ndim else scale
                up = adapter.up[start + first : start + first + count]
                change = Adapter(adapter.down, up, adapter.alpha).change()
                wanted = stored[rows].float() * own + change
                _require_finite(wanted, key)
                stored[rows] = _rounded(wanted / own, stored.dtype)
                errors.add(stored[rows].float() * own - wanted, change)
        return stored

    def _scale(self, key: str) -> Tensor:
        stored = self.shards.tensors.get(key)
        if not isinstance(stored, Scaled):
            return torch.ones(())
        scale = stored.scale.rows(range((*stored.scale.shape, 1)[0])).float()
        if not is_finite(scale) or not (scale > 0).all():
            refuse(stored.scale.file.path, f"has a scale that is not a positive number in {stored.scale.key}", REMEDY)
        if scale.numel() not in (1, stored.shape[0]):
            what = f"has a scale {stored.scale.key} of shape {tuple(scale.shape)} that does not fit"
            refuse(self.shards.path, what, REMEDY)
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)


class RoundingError:
    """The part of the change that rounding lost, and the whole change: sums of squares over all merged tensors."""

    def __init__(self) -> None:
        self.lost = self.whole = 0.0

    def add(self, lost: Tensor, change: Tensor) -> None:
        self.lost += float(lost.double().square().sum())
        self.whole += float(change.double().square().sum())

    @property
    def relative(self) -> float:
        """|stored - wanted| / |change|."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def merge_into(
    base: Base,
    target: Path,
    adapters: Mapping[str, Adapter],
    merged_from: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoundingError:
    """Write `base` with `adapters` merged into its weights to `target`, completely or not at all.

    target is a file or, like the base, a folder of shards. `progress` is called with (bytes written, total bytes).
    Raises WrongRequest if the disk has too little space.
    """
    files = [Checkpoint(path) for path in base.shards.files]
    errors, total, done = RoundingError(), sum(file.nbytes for file in files), 0
    remove_leftover(target)
    require_disk_space(target, total)

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    if not base.is_folder:
        _write(files[0], target, base, adapters, merged_from, errors, count)
        return errors
    with atomic_folder(target) as temporary:
        for file in files:
            _write(file, temporary / file.path.name, base, adapters, merged_from, errors, count)
        for path in (base.shards.path, base.shards.path.parent / "config.json"):
            if path.suffix == ".json" and path.is_file():
                shutil.copyfile(path, temporary / path.name)
    return errors


def _write(
    file: Checkpoint,
    target: Path,
    base: Base,
    adapters: Mapping[str, Adapter],
    merged_from: str,
    errors: RoundingError,
    count: Callable[[int], None],
) -> None:
    """Write one merged file of `base` to `target`, tensor by tensor, in the order of its header."""
    empty = {key: torch.empty(file.shape(key), dtype=file.dtype(key), device="meta") for key in file.keys()}
    header = safetensors_header(empty, {**file.metadata, "modelspec.merged_from": merged_from})
    order: Iterable[str] = (key for key in json.loads(header[8:]) if key != "__metadata__")
    with atomic_path(target, len(header) + file.nbytes) as temporary, temporary.open("wb") as out:
        out.write(header)
        for key in order:
            stored = file.get(key)
            if key in base.keys and not is_finite(stored):
                refuse(file.path, f"has NaN or infinite numbers in {printable(key)}", "use another file")
            tensor = base.merged(key, stored, adapters, errors)
            for data in safetensors_data({key: tensor}):
                out.write(data)
            count(tensor.nbytes)


def _places(pieces: Mapping[str, tuple[RowRange, ...]]) -> dict[str, list[tuple[RowRange, str, int]]]:
    """Key of a matrix -> its pieces, each with its BFL module and its first row in that module."""
    places: dict[str, list[tuple[RowRange, str, int]]] = {}
    for name, parts in pieces.items():
        row = 0
        for piece in parts:
            if name.endswith(".weight"):
                places.setdefault(piece.key, []).append((piece, name.removesuffix(".weight"), row))
            row += piece.rows
    return places


def _require_finite(merged: Tensor, key: str) -> None:
    if not merged.isfinite().all():
        raise WrongRequest(f"{key} is not finite after merging the LoRA, whose change is too large; lower its strength")


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, clamped to its range, because fp8 turns values beyond it into NaN."""
    largest = torch.finfo(dtype).max
    return values.clamp_(-largest, largest).to(dtype)
