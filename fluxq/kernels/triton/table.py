"""Which path an op uses and with what tiles: one table, by op, GPU generation and shape class.

Its rows are in shipped.py. Rows measured on a user's GPU take precedence over them (`use_measured`); they come from a
file that `write` made, and `candidates` lists what is worth measuring. Nothing is searched at run time. An unknown GPU
uses the rows of the nearest generation, with one warning.
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

from ..chunks import FEW_ROWS, MILLION
from .launch import ceildiv, shaped
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
_chosen: dict[tuple[str, int, int], Choice] = {}
"""What `choose` found so far, since a launch should not wait for it."""


def choose(op: str, device: torch.device, size: int = FEW_ROWS + 1) -> Choice:
    """The row for an input of that many rows (for `row_quantize`, of that width) on the GPU `device`; the row for large
    inputs if there is none for few.
    """
    asked = op, generation(device), size
    found = _chosen.get(asked)
    if found is None:
        found = _chosen[asked] = _choose(*asked)
    return found


def _choose(op: str, gpu: int, size: int) -> Choice:
    if op in _forced:
        return _forced[op]
    key = (op, gpu, shape_class(op, size))
    if key not in _measured and key not in SHIPPED:
        key = (op, gpu, "large")
    return _measured.get(key) or SHIPPED[key]


def choose_tile(op: str, device: torch.device, rows: int, columns: int) -> Choice:
    """The row for a product of that many rows and columns. A tile of 256 rows is cut to 128 if it would leave so much
    of the GPU idle that the smaller one takes less time.
    """
    choice = choose(op, device, rows)
    return choice if op in _forced else fitted(choice, rows, columns, multiprocessors(device))


@shaped
def fitted(choice: Choice, rows: int, columns: int, sms: int) -> Choice:
    """`choice`, or with 128 of its 256 rows. sms: how many multiprocessors there are; 0: unknown."""
    if choice.block_m != 256 or not sms:
        return choice
    taller, lower = (waves(rows, columns, height, choice.block_n, sms) * height for height in (256, 128))
    return choice if taller <= TALL_GAIN * lower else replace(choice, block_m=128)


TALL_GAIN = 1.1
"""How much more of a multiprocessor's peak a tile of 256 rows reaches than one of 128 (predicted)."""


def waves(rows: int, columns: int, block_m: int, block_n: int, sms: int) -> int:
    """How many tiles the busiest multiprocessor computes, one at a time."""
    return ceildiv(ceildiv(rows, block_m) * ceildiv(columns, block_n), sms)


def fills(programs: int, sms: int) -> bool:
    """Whether that many programs fill a GPU, two on each of its multiprocessors. sms 0: unknown, so they do."""
    return programs >= 2 * sms


@cache
def multiprocessors(device: torch.device) -> int:
    """0 if it is not a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def shape_class(op: str, size: int) -> str:
    if op == "row_quantize":
        return next((str(width) for width in WIDTHS if width >= size), "wider")
    return "few" if size <= FEW_ROWS else "large"


@contextmanager
def using(op: str, choice: Choice) -> Iterator[None]:
    """Inside, `op` uses `choice` whatever the GPU and the shape. The tuner and tests try choices this way."""
    before = _forced.get(op)
    _forced[op] = choice
    _chosen.clear()
    try:
        yield
    finally:
        _chosen.clear()
        del _forced[op]
        if before is not None:
            _forced[op] = before


@cache
def generation(device: torch.device) -> int:
    """The generation whose rows the GPU `device` uses."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


def truncates_fp8(device: torch.device) -> bool:
    """Whether the GPU's tensor cores truncate sums of e4m3 products (matmul_8bit.py). The interpreter does what such a
    GPU does.
    """
    return generation(device) < 100


@cache  # so it warns once
def nearest(capability: int) -> int:
    """The known generation nearest to `capability`; of two equally near, the older."""
    known = min(GENERATIONS, key=lambda gpu: (abs(gpu - capability), gpu))
    if known != capability:
        logging.getLogger(__name__).warning(
            "no kernel choices are known for GPUs of compute capability %.1f; using those of %.1f",
            capability / 10,
            known / 10,
        )
    return known


def candidates(op: str, gpu: int, shape: str = "large") -> list[Choice]:
    """The choices worth measuring for `op` on a GPU of that generation, the one in use first."""
    shipped = SHIPPED.get((op, gpu, shape)) or SHIPPED[op, gpu, "large"]
    rows = (16,) if shape == "few" else (64, 128, 256)
    tiles = [*itertools.product(rows, (32, 64, 128, 256), (32, 64, 128), (4, 8))]
    choices = [shipped, *(_neighbors(shipped) if op in STREAMING else ())]
    for path in paths(op, gpu) if op not in STREAMING else ():
        if path in ("extended", "plain"):
            choices += [replace(shipped, path=path, chunk=n * MILLION) for n in (4, 9, 18, 27, 45)]
            continue
        for (m, n, k, warps), stages in itertools.product(tiles, (2, 3, 4)):
            choice = Choice(path, m, n, k, warps, stages, shipped.chunk)
            enough = m * n >= 32 * 32 * warps if shape == "large" else n >= 8 * warps
            if _fits(op, gpu, choice) and enough and m * n <= 128 * 32 * warps and _holds_blocks(op, choice):
                choices.append(choice)
    return list(dict.fromkeys(replace(choice, word="measured", why="") for choice in choices))


def _neighbors(tile: Choice) -> Iterator[Choice]:
    """`tile` with one size doubled or halved, if the kernels support it: they wait for memory, and little depends on
    their tiles.
    """
    for name in ("warps", "block_m", "block_n", "step"):
        size = getattr(tile, name)
        for other in (size // 2, size * 2):
            choice = replace(tile, **{name: other})
            if size and not (name == "block_n" and not tile.block_m) and not _wrong_sizes(choice, tile):
                yield choice


def write(path: Path, rows: Mapping[Key, Choice], gpu: str) -> None:
    """Save what was measured on the GPU of that name, for `use_measured`: the complete file or none."""
    listed = [dict(op=op, gpu=generation, shape=shape, **asdict(c)) for (op, generation, shape), c in rows.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps({"version": FILE_VERSION, "measured_on": gpu, "rows": listed}, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> dict[Key, Choice]:
    """The rows in a file that `write` made. Raises ValueError with the file's name for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FILE_VERSION:
            raise ValueError(f"it has version {content['version']}, not {FILE_VERSION}")
        return dict(_checked(row) for row in content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a table of kernel choices ({what}); delete it, or tune again") from None


def use_measured(rows: Mapping[Key, Choice]) -> None:
    """From now on, prefer these rows to the shipped ones. They replace earlier measured rows."""
    _chosen.clear()
    _measured.clear()
    _measured.update(rows)


def _checked(row: Mapping[str, Any]) -> tuple[Key, Choice]:
    """A row of a file, after checking every value."""
    key = (row["op"], row["card"] if "card" in row else row["gpu"], row["shape"])  # "card" in files of before
    choice = Choice(**{field.name: row[field.name] for field in fields(Choice)})
    op, gpu, shape = key
    if op not in PATHS or gpu not in GENERATIONS or shape not in shape_classes(op) or choice.path not in paths(op, gpu):
        raise ValueError(f"{op} has no path {choice.path} for {shape} shapes on sm_{gpu}")
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
        raise ValueError(f"{op} has chunks of {choice.chunk}, which is not a multiple of 64")
    if not 1 <= choice.stages <= 8 or op not in STREAMING and not _fits(op, gpu, choice):
        raise ValueError(f"the tiles of {op} do not fit the shared memory of sm_{gpu}")
    return key, choice


def _wrong_sizes(choice: Choice, shipped: Choice) -> bool:
    """Whether a kernel that waits for memory cannot use these sizes.

    Each must be a power of two, or 0 if `shipped` has none; rows at least 16 for a tensor core, and columns such that
    blocks of NF4 and of rotations divide them if there are that many.
    """
    sizes = [(getattr(choice, name), getattr(shipped, name)) for name in ("block_m", "block_n", "block_k", "step")]
    powers = all((size > 0 and size & (size - 1) == 0) if theirs else size == 0 for size, theirs in sizes)
    least = 16 if shipped.block_k else 1
    fine = choice.block_m >= max(choice.step, least if shipped.block_m else 0)
    fine &= min(256, shipped.block_n) <= choice.block_n <= 65536
    return not (powers and fine and choice.block_m <= 256 and choice.warps in (1, 2, 4, 8, 16, 32))


def _holds_blocks(op: str, choice: Choice) -> bool:
    """Whether tiles of an NF4 weight hold whole blocks of 64. Blocks lie along the contracted side; in the backward
    pass, along the columns.
    """
    return "nf4" not in op or (choice.block_n if "backward" in op else choice.block_k) >= 64


def _fits(op: str, gpu: int, choice: Choice) -> bool:
    """Whether the stages of both tiles fit a block's shared memory; an input that is not 8-bit counts as 16-bit."""
    nbytes = 1 if op.startswith("matmul") else 2
    return choice.stages * (choice.block_m + choice.block_n) * choice.block_k * nbytes <= SHARED_KIB[gpu] << 10
