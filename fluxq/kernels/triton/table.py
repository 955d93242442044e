"""Which path an op takes and in what tiles: one table, by op, GPU generation and shape class.

Its rows lie in shipped.py. Rows that were measured on a user's GPU are laid over them (`lay_over`), read from a file
that `write` made; what is worth measuring is in `candidates`. Nothing is searched at run time. An unknown GPU takes
the nearest generation's rows and says so once.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..cutting import FEW_ROWS, MILLION
from .shipped import (
    GENERATIONS,
    INTERPRETED,
    PATHS,
    SHARED_KIB,
    SHIPPED,
    STREAMING,
    WIDTHS,
    Choice,
    Key,
    paths,
    shape_classes,
)

FILE_VERSION = 2  # 1 counted chunks in rows

_measured: dict[Key, Choice] = {}
_forced: dict[str, Choice] = {}


def choose(op: str, device: torch.device, size: int = FEW_ROWS + 1) -> Choice:
    """The row for an input of that many rows (for `row_quantize`, of that width) on the GPU `device`; that of large
    inputs where few have none.
    """
    if op in _forced:
        return _forced[op]
    gpu = generation(device)
    key = (op, gpu, shape_class(op, size))
    if key not in _measured and key not in SHIPPED:
        key = (op, gpu, "large")
    return _measured.get(key) or SHIPPED[key]


def shape_class(op: str, size: int) -> str:
    if op == "row_quantize":
        return next((str(width) for width in WIDTHS if width >= size), "wider")
    return "few" if size <= FEW_ROWS else "large"


@contextmanager
def using(op: str, choice: Choice) -> Iterator[None]:
    """Inside, `op` takes `choice`, whatever the GPU and the shape: how a tuner and tests try one."""
    before = _forced.get(op)
    _forced[op] = choice
    try:
        yield
    finally:
        del _forced[op]
        if before is not None:
            _forced[op] = before


@cache
def generation(device: torch.device) -> int:
    """The generation whose rows the GPU `device` takes."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


@cache  # so it is said once
def nearest(capability: int) -> int:
    """The known generation nearest to `capability`; of two as near, the older."""
    known = min(GENERATIONS, key=lambda gpu: (abs(gpu - capability), gpu))
    if known != capability:
        logging.getLogger(__name__).warning(
            "no kernel choices are known for GPUs of compute capability %.1f; those of %.1f are taken",
            capability / 10,
            known / 10,
        )
    return known


def candidates(op: str, gpu: int, shape: str = "large") -> list[Choice]:
    """What is worth measuring for `op` on a GPU of that generation, the row in use first."""
    shipped = SHIPPED.get((op, gpu, shape)) or SHIPPED[op, gpu, "large"]
    rows = (16,) if shape == "few" else (64, 128, 256)
    tiles = [*itertools.product(rows, (32, 64, 128, 256), (32, 64, 128), (4, 8))]
    found = [shipped, *(_neighbors(shipped) if op in STREAMING else ())]
    for path in paths(op, gpu) if op not in STREAMING else ():
        if path in ("extended", "plain"):
            found += [replace(shipped, path=path, chunk=n * MILLION) for n in (4, 9, 18, 27, 45)]
            continue
        for (m, n, k, warps), stages in itertools.product(tiles, (2, 3, 4)):
            choice = Choice(path, m, n, k, warps, stages, shipped.chunk)
            enough = m * n >= 32 * 32 * warps if shape == "large" else n >= 8 * warps
            if _fits(op, gpu, choice) and enough and m * n <= 128 * 32 * warps and _holds_blocks(op, choice):
                found.append(choice)
    return list(dict.fromkeys(replace(choice, word="measured", why="") for choice in found))


def _neighbors(tile: Choice) -> Iterator[Choice]:
    """One size twice or half of what it is, as far as the kernels take it: their tiles wait for memory, and little
    depends on them.
    """
    for name in ("warps", "block_m", "block_n", "step"):
        size = getattr(tile, name)
        for other in (size // 2, size * 2):
            choice = replace(tile, **{name: other})
            if size and not (name == "block_n" and not tile.block_m) and not _wrong_sizes(choice, tile):
                yield choice


def write(path: Path, rows: Mapping[Key, Choice], gpu: str) -> None:
    """Keep what was measured on the GPU of that name, for `lay_over`; in one piece or not at all."""
    listed = [dict(op=op, gpu=generation, shape=shape, **asdict(c)) for (op, generation, shape), c in rows.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps({"version": FILE_VERSION, "measured_on": gpu, "rows": listed}, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> dict[Key, Choice]:
    """The rows in a file that `write` made. Raises ValueError, with the file's name, for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FILE_VERSION:
            raise ValueError(f"it has version {content['version']}, not {FILE_VERSION}")
        return dict(_checked(row) for row in content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no table of kernel choices ({what}); delete it, or tune again") from None


def lay_over(rows: Mapping[Key, Choice]) -> None:
    """Take these rows before the shipped ones, from now on, and no others that were laid over before."""
    _measured.clear()
    _measured.update(rows)


def _checked(row: Mapping[str, Any]) -> tuple[Key, Choice]:
    """A row of a file, if all in it can be."""
    key = (row["op"], row["gpu"], row["shape"])
    choice = Choice(**{field.name: row[field.name] for field in fields(Choice)})
    op, gpu, shape = key
    if op not in PATHS or gpu not in GENERATIONS or shape not in shape_classes(op) or choice.path not in paths(op, gpu):
        raise ValueError(f"there is no {op} {choice.path} for {shape} shapes on sm_{gpu}")
    sizes = (choice.block_m, choice.block_n, choice.block_k, choice.step, choice.warps, choice.stages, choice.chunk)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"the sizes of {op} are {sizes}")
    shipped = SHIPPED.get(key) or SHIPPED[op, gpu, "large"]
    tiles = sizes[:3] if choice.path in ("fused", "triton", "scaled") else ()
    wrong = any(size not in (16, 32, 64, 128, 256) for size in tiles) or choice.warps not in (1, 2, 4, 8, 16)
    wrong |= choice.path == "fused" and not _holds_blocks(op, choice)
    if _wrong_sizes(choice, shipped) if op in STREAMING else wrong:
        raise ValueError(f"{op} has tiles {sizes[:4]} and {choice.warps} warps")
    if choice.chunk % 64:
        raise ValueError(f"{op} has chunks of {choice.chunk}, not of a multiple of 64")
    if not 1 <= choice.stages <= 8 or op not in STREAMING and not _fits(op, gpu, choice):
        raise ValueError(f"the tiles of {op} do not fit the shared memory of sm_{gpu}")
    return key, choice


def _wrong_sizes(choice: Choice, shipped: Choice) -> bool:
    """Whether a kernel that waits for memory cannot take these sizes: each a power of two, or 0 where `shipped` has
    none; 16 rows at least for a tensor core, and columns that blocks of NF4 and of rotations divide where there are
    so many.
    """
    sizes = [(getattr(choice, name), getattr(shipped, name)) for name in ("block_m", "block_n", "block_k", "step")]
    powers = all((size > 0 and size & (size - 1) == 0) if theirs else size == 0 for size, theirs in sizes)
    least = 16 if shipped.block_k else 1
    fine = choice.block_m >= max(choice.step, least if shipped.block_m else 0)
    fine &= min(256, shipped.block_n) <= choice.block_n <= 65536
    return not (powers and fine and choice.block_m <= 256 and choice.warps in (1, 2, 4, 8, 16, 32))


def _holds_blocks(op: str, choice: Choice) -> bool:
    """Whether tiles of an NF4 weight hold whole blocks of 64, which lie along what is contracted over; backward they
    lie along the columns.
    """
    return "nf4" not in op or (choice.block_n if "backward" in op else choice.block_k) >= 64


def _fits(op: str, gpu: int, choice: Choice) -> bool:
    """Whether the stages of both tiles fit the shared memory of a block; the input's in at least 16 bits if not 8."""
    nbytes = 1 if op.startswith("matmul") else 2
    return choice.stages * (choice.block_m + choice.block_n) * choice.block_k * nbytes <= SHARED_KIB[gpu] << 10
