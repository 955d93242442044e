"""Which files below a folder can serve as which of the four models: told from headers, never from names.

Of several the one whose weights have the most bits is taken, then one that holds no other model, then the original
layout. Where that leaves two, both are named and neither is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.files import refuse
from fluxq.formats.source import OPENERS, Source, meant, units

MAX_DEPTH = 8
MAX_FOLDERS = 20_000
MAX_FILES = 4_000  # a header takes milliseconds; collections of LoRAs have a thousand


@dataclass
class Found:
    """What `search` found below `place`, a folder or one file: for each model the sources that could serve it, and a
    sentence for each file that means to be one of the four but is none that fluxq uses.
    """

    place: Path
    sources: dict[str, list[Source]] = field(default_factory=lambda: {part: [] for part in OPENERS})
    passed_over: list[str] = field(default_factory=list)


def search(place: Path) -> Found:
    """Every model in the file `place`, or in the folder `place` and below. Links are followed, hidden folders are not.

    Raises WrongRequest for a folder that is gone or is too large to be one of models.
    """
    found, seen = Found(place), set()
    for unit in [place] if place.is_file() else _units_below(place):
        if (real := os.path.realpath(unit)) in seen:
            continue
        seen.add(real)
        if len(seen) > MAX_FILES:
            refuse(place, f"holds more than {MAX_FILES:,} .safetensors files", "name a folder further down")
        try:
            parts = meant(unit)
        except WrongRequest as error:
            found.passed_over.append(str(error))
            continue
        for part in parts:
            try:
                found.sources[part].append(OPENERS[part](unit))
            except WrongRequest as error:
                found.passed_over.append(str(error))
    return found


def choose(sources: Sequence[Source], part: str, place: Path) -> tuple[Source, str]:
    """The one to use of several that would do, and why. Raises WrongRequest where the best are alike."""
    ranked = sorted(sources, key=_merit, reverse=True)
    best, others = ranked[0], ranked[1:]
    if not others:
        return best, f"the only one in {place}"
    if _merit(others[0]) == _merit(best):
        what = f"holds {part} in {best.path} and in {others[0].path}, which are alike ({best.precision})"
        refuse(place, what, "name the one to use")
    reasons = (f"the most bits, {best.precision}", "a file of its own", "the original layout")
    first = next(i for i, (a, b) in enumerate(zip(_merit(best), _merit(others[0]), strict=True)) if a != b)
    return best, f"of {len(ranked)} in {place} the one with {reasons[first]}"


def _merit(source: Source) -> tuple[int, bool, bool]:
    return source.dtype.itemsize, source.alone, not source.diffusers


def _units_below(folder: Path) -> Iterator[Path]:
    """Files and indices of shards, folder by folder, the nearest first."""
    if not folder.is_dir():
        refuse(folder, "does not exist", "check the path")
    level, seen = [folder], {os.path.realpath(folder)}
    for _ in range(MAX_DEPTH):
        deeper: list[Path] = []
        for place in level:
            try:
                yield from units(place)
                inside = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
            except (WrongRequest, OSError):
                continue  # what may not be read holds nothing for us
            for path in inside:
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    deeper.append(path)
            if len(seen) > MAX_FOLDERS:
                refuse(folder, f"holds more than {MAX_FOLDERS:,} folders", "name one further down")
        level = deeper
