"""Which path an op takes and in what tiles: one table, by op, card generation and shape class.

The rows below are shipped. Rows that were measured on a user's card are laid over them (`lay_over`), read from a file
that `write` made; what is worth measuring is in `candidates`. Nothing is searched at run time.

A generation is a compute capability as one number, 89 for 8.9. An unknown card takes the nearest generation's rows and
says so once. Shapes are of two classes, `few` rows of input (up to 64: modulation, embedders) and `large`; none finer
without a measurement that asks for it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

GENERATIONS = (80, 86, 89, 90, 120)
INTERPRETED = 0  # Triton's interpreter on a processor: tiles as small as tests want them
FEW_ROWS = 64
SHAPES = ("few", "large")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # that one block may have (CUDA programming guide, table 24)
FILE_VERSION = 1

PATHS = {
    **{f"lora_linear_{format}": ("extended", "plain", "fused") for format in ("nf4", "fp8", "int8", "bf16")},
    **{f"lora_linear_backward_{format}": ("extended",) for format in ("nf4", "fp8", "int8")},
    "matmul_int8": ("triton",),
    "matmul_fp8": ("triton",),
}
"""Op -> the paths there are; the op's own file says what each is."""


@dataclass(frozen=True)
class Choice:
    """A path and its sizes; 0 where the path has no such size.

    block_m, block_n, block_k: a program's tile of output rows, columns, and what it contracts over at a time. warps and
    stages as Triton means them. chunk: rows of a weight decoded at a time (columns in the backward pass). word: whether
    the row was `predicted` or `measured`; why: from what.
    """

    path: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 1
    chunk: int = 0
    word: str = "predicted"
    why: str = ""


Key = tuple[str, int, str]
"""Op, generation, shape class."""


def _rows() -> Iterator[tuple[Key, Choice]]:
    def row(ops: str, cards: tuple[int, ...], shape: str, choice: Choice) -> Iterator[tuple[Key, Choice]]:
        return (((op, card, shape), choice) for op in ops.split() for card in cards)

    stored, geforce = "lora_linear_nf4 lora_linear_fp8 lora_linear_int8", (86, 89, 120)
    # bf16 products: the tiles are those of the fused kernel, for whoever asks for that path.
    why = "decoding once beats decoding in the loop above 512 rows on every card (bitsandbytes' measured dispatch)"
    long = f"{why}; much memory and many multiprocessors want long products"
    yield from row(stored, geforce, "large", Choice("extended", 128, 128, 64, 8, 3, 3072, why=why))
    yield from row(stored, (80, 90), "large", Choice("extended", 128, 128, 64, 8, 3, 12288, why=long))
    spills = "; with Triton 3.6 a fused tile twice as wide spills"
    yield from row("lora_linear_nf4", geforce, "large", Choice("extended", 128, 64, 64, 8, 3, 3072, why=why + spills))
    yield from row("lora_linear_nf4", (80,), "large", Choice("extended", 128, 64, 64, 8, 3, 12288, why=long + spills))
    why = "a weight in 16 bits needs no decoding, and copying it costs what the LoRA's own pass over y does"
    yield from row("lora_linear_bf16", (80, 90), "large", Choice("plain", 128, 128, 64, 8, 3, why=why))
    yield from row("lora_linear_bf16", geforce, "large", Choice("plain", 128, 128, 32, 8, 3, why=why))
    why = "reading the weight is all the work, so it is read as it is stored; narrow tiles fill the card"
    yield from row(stored, GENERATIONS, "few", Choice("fused", 16, 32, 64, 4, 4, why=why))
    why = "a vendor's product of few rows reads the weight at the memory's speed"
    yield from row("lora_linear_bf16", GENERATIONS, "few", Choice("plain", 16, 32, 64, 4, 4, why=why))
    # Their gradient has no choice where weights are in 16 bits.
    backward = "lora_linear_backward_nf4 lora_linear_backward_fp8 lora_linear_backward_int8"
    why = "as forward; chunks are of columns, since the sum over rows must be rounded once"
    yield from row(backward, geforce, "large", Choice("extended", chunk=3072, why=why))
    yield from row(backward, (80, 90), "large", Choice("extended", chunk=12288, why=why))

    # 8-bit products.
    why = "neither spills nor permutes bytes; each byte read takes part in 128 products"
    yield from row("matmul_int8 matmul_fp8", (80, 86, 89, 120), "large", Choice("triton", 128, 128, 64, 8, 3, why=why))
    why = "a warp group multiplies 64 rows at once; a deep tile pays for its barriers"
    yield from row("matmul_int8 matmul_fp8", (90,), "large", Choice("triton", 128, 128, 128, 8, 4, why=why))

    why = "tests have a hundred rows and still want several programs"
    here = (INTERPRETED,)
    yield from row(stored, here, "large", Choice("extended", 32, 32, 64, chunk=64, why=why))
    yield from row(stored, here, "few", Choice("fused", 16, 32, 64, why=why))
    yield from row("lora_linear_bf16", here, "large", Choice("plain", 32, 32, 64, why=why))
    yield from row(backward, here, "large", Choice("extended", chunk=64, why=why))
    yield from row("matmul_int8 matmul_fp8", here, "large", Choice("triton", 32, 32, 64, why=why))


SHIPPED: Mapping[Key, Choice] = dict(_rows())
_measured: dict[Key, Choice] = {}
_forced: dict[str, Choice] = {}


def choose(op: str, device: torch.device, rows: int) -> Choice:
    """The row for an input of that many rows on the card `device`; that of large inputs where few have none."""
    if op in _forced:
        return _forced[op]
    card = generation(device)
    key = (op, card, "few" if rows <= FEW_ROWS else "large")
    if key not in _measured and key not in SHIPPED:
        key = (op, card, "large")
    return _measured.get(key) or SHIPPED[key]


@contextmanager
def using(op: str, choice: Choice) -> Iterator[None]:
    """Inside, `op` takes `choice`, whatever the card and the shape: how a tuner and tests try one."""
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
    """The generation whose rows the card `device` takes."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(10 * major + minor)


@cache  # so it is said once
def nearest(capability: int) -> int:
    """The known generation nearest to `capability`; of two as near, the older."""
    known = min(GENERATIONS, key=lambda card: (abs(card - capability), card))
    if known != capability:
        logging.getLogger(__name__).warning(
            "no kernel choices are known for cards of compute capability %.1f; those of %.1f are taken",
            capability / 10,
            known / 10,
        )
    return known


def candidates(op: str, card: int, shape: str = "large") -> list[Choice]:
    """What is worth measuring for `op` on a card of that generation, the row in use first."""
    shipped = SHIPPED.get((op, card, shape)) or SHIPPED[op, card, "large"]
    tiles = itertools.product((16,) if shape == "few" else (64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8))
    found = [shipped]
    for path in PATHS[op]:
        if path in ("extended", "plain"):
            found += [replace(shipped, path=path, chunk=chunk) for chunk in (1536, 3072, 6144, 12288, 24576)]
            continue
        for (m, n, k, warps), stages in itertools.product(tiles, (2, 3, 4)):
            choice = Choice(path, m, n, k, warps, stages, shipped.chunk)
            enough = m * n >= 32 * 32 * warps if shape == "large" else n >= 8 * warps
            if _fits(op, card, choice) and enough and m * n <= 128 * 32 * warps and not (k < 64 and "nf4" in op):
                found.append(choice)
    return list(dict.fromkeys(replace(choice, word="measured", why="") for choice in found))


def write(path: Path, rows: Mapping[Key, Choice], card: str) -> None:
    """Keep what was measured on the card of that name, for `lay_over`; in one piece or not at all."""
    listed = [dict(op=op, card=generation, shape=shape, **asdict(c)) for (op, generation, shape), c in rows.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps({"version": FILE_VERSION, "measured_on": card, "rows": listed}, indent=1)
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
    key = (row["op"], row["card"], row["shape"])
    choice = Choice(**{field.name: row[field.name] for field in fields(Choice)})
    op, card, shape = key
    if op not in PATHS or card not in GENERATIONS or shape not in SHAPES or choice.path not in PATHS[op]:
        raise ValueError(f"there is no {op} {choice.path} for {shape} shapes on sm_{card}")
    sizes = (choice.block_m, choice.block_n, choice.block_k, choice.warps, choice.stages, choice.chunk)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"the sizes of {op} are {sizes}")
    tiles = sizes[:3] if choice.path in ("fused", "triton") else ()
    if any(size not in (16, 32, 64, 128, 256) for size in tiles) or choice.warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"{op} has tiles {tiles} and {choice.warps} warps")
    if choice.chunk % 64:
        raise ValueError(f"{op} has chunks of {choice.chunk}, not of a multiple of 64")
    if not 1 <= choice.stages <= 8 or not _fits(op, card, choice):
        raise ValueError(f"the tiles of {op} do not fit the shared memory of sm_{card}")
    return key, choice


def _fits(op: str, card: int, choice: Choice) -> bool:
    """Whether the stages of both tiles fit the shared memory of a block; the input's in at least 16 bits if not 8."""
    nbytes = 1 if op.startswith("matmul") else 2
    return choice.stages * (choice.block_m + choice.block_n) * choice.block_k * nbytes <= SHARED_KIB[card] << 10
