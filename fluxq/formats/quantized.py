"""fluxq's file format for a quantized transformer: every unit is one contiguous, aligned piece, loaded with one read.

It is a safetensors file with one flat uint8 tensor per unit (fluxq/model/units.py), whose start and length are
multiples of 256 bytes. The metadata's `fluxq` is JSON: format, config, source (name, fingerprint, hash of the tensors'
bytes) and layout, which lists each unit's tensors as [name, dtype, shape, first byte]. A matrix in NF4 is
`<layer>.codes` and `.absmax`, in 8 bits `<layer>.values` and `.scale`; every other tensor keeps its name, in 16 bits.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.kernels import NF4Weight, RowScaled, Weight, dequantize, quantize
from fluxq.kernels.weights import NF4_BLOCK, parts_of
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.layout import ALIGNMENT, TensorEntry, layout, stored_parts
from fluxq.model.linear import Linear
from fluxq.model.units import REST, by_unit

from .atomic import atomic_path, free_bytes, remove_leftover
from .checkpoint.detect import DIFFUSERS_FLUX, kind
from .checkpoint.files import DTYPE_NAMES, DTYPES, Checkpoint, TensorFile, printable, refuse, well_formed
from .checkpoint.shapes import flux_shapes
from .checkpoint.shards import open_file
from .checkpoint.source import Source

LAYOUT_VERSION = 1
MAX_VECTOR_BYTES = 1 << 17  # the longest vector of FLUX.1 takes 86 KB in fp32, the absmax of a matrix at least 590 KB


def write_quantized(
    path: Path,
    source: Source[FluxConfig],
    format: str,
    about: dict[str, Any],
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    inspect: Callable[[str, Weight, Weight], None] = lambda name, w, q: None,
) -> None:
    """Quantize `source` into `path` on `device`, one tensor at a time, or one band of rows at a time if it is large.

    `about` is JSON for the metadata. `progress` is called with (bytes read, total bytes), `inspect` with every matrix's
    name, weight and quantized weight, band by band. Raises WrongRequest if the disk has too little space, before
    anything is read, for a matrix of a width that `format` cannot hold, and for numbers that are not finite.
    """
    require_widths(source, format)
    units = layout(source.shapes, format)
    description = {
        "version": LAYOUT_VERSION,
        "format": format,
        "config": dataclasses.asdict(source.config),
        "layout": {
            unit: [[p.name, DTYPE_NAMES[p.dtype], p.shape, p.start] for p in entries]
            for unit, (entries, _) in units.items()
        },
    }
    blank = "0" * 32  # a placeholder: the hash of the source is known at the end
    header = _header(units, {**description, "source": {**about, "hash": blank}})
    needed = len(header) + sum(length for _, length in units.values())
    remove_leftover(path)
    require_disk_space(path, needed)
    versions = _versions(source.files)
    digest, done = blake2b(digest_size=16), 0
    with atomic_path(path, needed) as temporary, temporary.open("wb") as file:
        file.write(header)
        names = by_unit(source.shapes)
        bands = _read_ahead(source, [name for unit in units for name in names[unit]], digest)
        for unit, (entries, length) in units.items():
            buffer, parts = torch.zeros(length, dtype=torch.uint8), iter(entries)
            own = format if unit != REST else "bf16"
            for name in names[unit]:
                targets = [view(buffer, next(parts)) for _ in stored_parts(name, source.shapes[name], own)]
                for rows in source.bands(name):
                    weight = next(bands).to(device)
                    for target, part in zip(targets, _quantized(name, weight, own, inspect), strict=True):
                        target[rows.start : rows.stop].copy_(part)
                for target in targets:  # if a matrix has such numbers, its scales are not finite, or fp8 has kept them
                    if target.is_floating_point() and not is_finite(target):
                        refuse(source.path, f"has NaN or infinite numbers in {name}", "use another file")
                done += source.sizes[name]
                progress(done, source.nbytes)
            file.write(buffer.numpy().data)
        if _versions(source.files) != versions:
            refuse(source.path, "changed while it was read", "start again")
        final = _header(units, {**description, "source": {**about, "hash": digest.hexdigest()}})
        file.seek(0)
        file.write(final)


def _versions(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Size and modification time of each file, to notice if one is replaced or written to."""
    return [(status.st_size, status.st_mtime_ns) for status in (file.stat() for file in files)]


def require_widths(source: Source[FluxConfig], format: str) -> None:
    """Raise WrongRequest if a row of a matrix of the blocks is not a whole number of blocks of NF4."""
    for unit, names in by_unit(source.shapes).items() if format == "nf4" else ():
        for name in names:
            if unit != REST and len(shape := source.shapes[name]) == 2 and shape[1] % NF4_BLOCK:
                what = f"has {name} of width {shape[1]}, which is not a multiple of {NF4_BLOCK} as nf4 needs"
                refuse(source.path, what, "use --format int8 or fp8")


def require_disk_space(path: Path, needed: int) -> None:
    """Raise WrongRequest if the disk of `path`, which need not exist, has fewer than `needed` bytes free."""
    free = free_bytes(path.parent)
    if free is not None and free < needed:
        need, has = (f"{n / 1e9:.1f} GB" if needed >= 1e9 else f"{n:,} bytes" for n in (needed, free))
        raise WrongRequest(f"{path} needs {need}, but only {has} are free; free some space on that disk")


def is_finite(x: torch.Tensor) -> bool:
    """Whether `x`, of any float dtype, has neither NaN nor infinite numbers."""
    if x.dtype.itemsize == 1:  # torch has no isfinite for them; e4m3 has no infinity
        special = 0x7F if x.dtype == torch.float8_e4m3fn else 0x7C
        return not ((x.view(torch.uint8) & special) == special).any()
    return bool(x.isfinite().all())


def _read_ahead(source: Source[FluxConfig], names: Sequence[str], digest: Any) -> Iterator[Weight]:
    """The bands of `names` in order. While one is processed, a thread reads the next and hashes it into `digest`."""

    def read(name: str, rows: range) -> Weight:
        digest.update(name.encode())
        return source.get(name, rows, lambda data: digest.update(data.numpy().data))

    bands = [(name, rows) for name in names for rows in source.bands(name)]
    with ThreadPoolExecutor(1) as reader:
        next_band = reader.submit(read, *bands[0])
        for band in bands[1:]:
            weight, next_band = next_band.result(), reader.submit(read, *band)
            yield weight
        yield next_band.result()


def _quantized(name: str, w: Weight, format: str, inspect: Callable[[str, Weight, Weight], None]) -> list[Tensor]:
    if format == "bf16" or (isinstance(w, Tensor) and w.ndim < 2):
        return [dequantize(w, torch.bfloat16)]
    weight = quantize(w, format)
    inspect(name, w, weight)
    return list(parts_of(weight))


def _header(units: dict[str, tuple[list[TensorEntry], int]], description: dict[str, Any]) -> bytes:
    """The safetensors header, padded so that the data section starts at a multiple of ALIGNMENT."""
    entries: dict[str, Any] = {"__metadata__": {"fluxq": json.dumps(description)}}
    start = 0
    for unit, (_, length) in units.items():
        entries[unit] = {"dtype": "U8", "shape": [length], "data_offsets": [start, start + length]}
        start += length
    text = json.dumps(entries).encode()
    padded = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def view(buffer: Tensor, entry: TensorEntry) -> Tensor:
    """The tensor of `entry` in a unit's flat `buffer`."""
    return buffer[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.shape)


def cached(
    source: Source[FluxConfig],
    format: str,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    merged: str = "",
) -> QuantizedFile:
    """`source` in `format`, from the cache folder; if it is not there yet, it is quantized into it.

    `merged`: see `fingerprint`.
    """
    path = cached_path(source.files, format, merged)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock").acquire()  # if two runs start at once, the second waits for the first's file
    except OSError as error:
        raise WrongRequest(
            f"{path.parent} cannot be written to ({error.strerror or error}); set FLUXQ_CACHE to another folder"
        ) from error
    with held:
        if path.is_file():
            with suppress(WrongRequest):  # if it is damaged, it is written again
                return QuantizedFile.open(path)
        for leftover in path.parent.glob(f".{glob.escape(path.stem)}.tmp-*"):  # from a crash
            leftover.unlink(missing_ok=True)
        about = {"files": [file.name for file in source.files], "fingerprint": fingerprint(source.files, merged)}
        write_quantized(path, source, format, about, device, progress)
        return QuantizedFile.open(path)


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], format: str) -> int:
    """The bytes that a transformer with these shapes takes in `format`."""
    return sum(length for _, length in layout(shapes, format).values())


def cached_path(files: Sequence[Path], format: str, merged: str = "") -> Path:
    """The path in the cache folder of the transformer in `files`, with `merged` merged in, in `format`."""
    name = files[0].stem if len(files) == 1 else files[0].parent.name
    return cache_folder() / f"{name}-{format}-v{LAYOUT_VERSION}-{fingerprint(files, merged)}.safetensors"


def cache_folder() -> Path:
    """The folder for quantized models: FLUXQ_CACHE, else the system's cache folder."""
    if folder := os.environ.get("FLUXQ_CACHE"):
        return Path(folder)
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "fluxq"


def fingerprint(files: Sequence[Path], merged: str = "") -> str:
    """A hash that identifies files without reading them completely; moved or copied files keep it.

    It covers each file's length, header, vectors and 2,048 samples, and config.json in diffusers' layout. `merged`
    identifies the LoRAs that were merged in. In FLUX.1 every matrix is sampled, and all vectors together are 6 MB.
    """
    digest, layouts = blake2b(digest_size=8), set()
    for path in files:
        status = path.stat()
        sampled, diffusers = _sampled(path, status.st_size, status.st_mtime_ns)
        digest.update(sampled)
        layouts.add(diffusers)
    settings = files[0].parent / "config.json"
    if True in layouts and settings.is_file():
        digest.update(settings.read_bytes())
    digest.update(merged.encode())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _sampled(path: Path, length: int, mtime_ns: int, samples: int = 2048, size: int = 1 << 12) -> tuple[bytes, bool]:
    """The hash of one file for `fingerprint`, and whether its keys are diffusers'."""
    digest, opened = blake2b(str(length).encode(), digest_size=16), open_file(path)
    with path.open("rb", buffering=0) as file:
        digest.update(file.read(1 << 20))
        for i in range(samples):
            file.seek(i * max(0, length - size) // (samples - 1))
            digest.update(file.read(size))
    for vector in _vectors(opened):
        digest.update(vector.numpy().data)
    return digest.digest(), kind(opened.keys()) == DIFFUSERS_FLUX


def _vectors(file: TensorFile) -> Iterator[Tensor]:
    """The bytes of all tensors with at most one dimension, without the absmax of 4-bit matrices, which is much longer.

    In a quantized file the vectors are inside its units.
    """
    if "fluxq" not in file.metadata:
        small = (key for key, shape in file.shapes.items() if len(shape) < 2 and file.size(key) <= MAX_VECTOR_BYTES)
        yield from map(file.read, small)
        return
    for unit, entries in QuantizedFile.open(file.path).units.items():
        yield from (file.read(unit, [(p.start, p.start + p.nbytes)]) for p in entries if len(p.shape) < 2)


def is_quantized(path: Path) -> bool:
    """Whether `write_quantized` wrote the file `path`. Raises WrongRequest if it is not a model file."""
    return path.suffix.lower() != ".json" and "fluxq" in open_file(path).metadata


@dataclass(frozen=True)
class QuantizedFile:
    """A file written by `write_quantized`, with its header parsed."""

    path: Path
    format: str
    config: FluxConfig
    source: dict[str, Any]
    units: dict[str, list[TensorEntry]]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> QuantizedFile:
        """Read the header. Raises WrongRequest for any other file, and for another layout version."""
        checkpoint = Checkpoint(path)
        if "fluxq" not in checkpoint.metadata:
            raise WrongRequest(f"{path} was not written by fluxq; quantize a model file with fluxq quantize first")
        with well_formed(path, "has damaged fluxq metadata", "quantize it again"):
            return cls._checked(path, checkpoint, json.loads(checkpoint.metadata["fluxq"]))

    @classmethod
    def _checked(cls, path: Path, checkpoint: Checkpoint, about: dict[str, Any]) -> QuantizedFile:
        """Raises ValueError and similar errors unless the layout is the one for its config and format."""
        if about["version"] != LAYOUT_VERSION:
            refuse(
                path,
                f"has layout version {printable(str(about['version']))}, not {LAYOUT_VERSION}",
                "quantize it again",
            )
        sizes = {**about["config"], "axes_dim": tuple(about["config"]["axes_dim"])}
        if any(isinstance(size, float) for name, size in sizes.items() if name != "mlp_ratio"):
            raise ValueError("its config has fractional sizes")
        config = FluxConfig(**sizes)
        units = {
            unit: [
                TensorEntry(name, DTYPES[dtype], tuple(map(int, shape)), int(start))
                for name, dtype, shape, start in entries
            ]
            for unit, entries in about["layout"].items()
        }
        if not isinstance(about["source"], dict) or not isinstance(about["source"].get("fingerprint", ""), str):
            raise ValueError("it does not name its source")
        names = [entry.name for entries in units.values() for entry in entries]
        if len(units) == 0 or len(set(names)) != len(names):
            raise ValueError("its layout names a tensor twice")
        if config.depth + config.depth_single_blocks > len(units):  # checked before `layout` lists that many units
            raise ValueError("its units are not those of its config")
        expected = layout(dict(flux_shapes(config)), about["format"])
        if expected.keys() != units.keys():
            raise ValueError("its units are not those of its config")
        for unit, entries in units.items():
            wanted, length = expected[unit]
            if {(p.name, p.dtype, p.shape) for p in entries} != {(p.name, p.dtype, p.shape) for p in wanted}:
                raise ValueError(f"the tensors of {unit} are not those of its config")
            ends = sorted((p.start, p.start + p.nbytes) for p in entries)
            if checkpoint.shape(unit) != (length,) or ends[0][0] < 0 or ends[-1][1] > length:
                raise ValueError(f"{unit} does not hold its tensors")
            if any(start % ALIGNMENT for start, _ in ends) or any(
                a[1] > b[0] for a, b in zip(ends, ends[1:], strict=False)
            ):
                raise ValueError(f"tensors of {unit} overlap")
        return cls(path, about["format"], config, about["source"], units, checkpoint)

    def length(self, unit: str) -> int:
        """The unit's size in bytes."""
        return self.checkpoint.shape(unit)[0]

    def read(self, unit: str) -> Tensor:
        """The unit's bytes, flat uint8, with one read."""
        return self.checkpoint.get(unit)

    def read_into(self, unit: str, out: Tensor) -> None:
        """Fill `out`, flat uint8 of the unit's length, with the unit's bytes."""
        self.checkpoint.read_into(unit, out)

    def tensors(self, unit: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of every tensor of `unit`, in its bytes `flat` on any device."""
        return ((entry.name, view(flat, entry)) for entry in self.units[unit])


def load_quantized(file: QuantizedFile, device: torch.device) -> Flux:
    """The transformer of `file` on `device`, with one read and one copy per unit; the layers hold views of them."""
    with torch.device("meta"):
        flux = Flux(file.config)
    for unit in file.units:
        flat = file.read(unit).to(device)
        assign(flux, dict(file.tensors(unit, flat)))
    return flux.eval()


def assign(flux: Flux, tensors: dict[str, Tensor]) -> None:
    """Make `tensors`, named as in a quantized file, the frozen weights of `flux`; nothing is copied."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = flux.get_submodule(owner)
        if isinstance(module, Linear) and leaf == "weight":
            module.store(tensor)
        elif isinstance(module, Linear) and leaf == "codes":
            module.store(NF4Weight(tensor, tensors[f"{owner}.absmax"]))
        elif isinstance(module, Linear) and leaf == "values":
            module.store(RowScaled(tensor, tensors[f"{owner}.scale"]))
        elif not (isinstance(module, Linear) and leaf in ("absmax", "scale")):
            setattr(module, leaf, tensor)
