"""Which files below a folder can serve as which of the four models: told from headers, never from names.

Of several the one whose weights have the most bits is taken, then one that holds no other model, then the original
layout. Where that leaves two, both are named and neither is taken. A file of `fluxq quantize` is another form of the
transformer that it was made from, and serves in its place where its format is the one wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.detect import FLUX
from fluxq.formats.checkpoint.files import refuse
from fluxq.formats.checkpoint.shards import models_in, units
from fluxq.formats.checkpoint.source import OPENERS, Source
from fluxq.formats.quantized import QuantizedFile, fingerprint, is_quantized

MAX_DEPTH = 8
MAX_FOLDERS = 20_000
MAX_FILES = 4_000  # a header takes milliseconds; collections of LoRAs have a thousand


@dataclass
class Found:
    """What `search` found below `place`, a folder or one file: for each model the sources that could serve it, the
    transformers that fluxq has quantized, and a sentence for each file that means to be one of the four but is none
    that fluxq uses.
    """

    place: Path
    sources: dict[str, list[Source]] = field(default_factory=lambda: {part: [] for part in OPENERS})
    quantized: list[QuantizedFile] = field(default_factory=list)
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
            refuse(place, f"holds more than {MAX_FILES:,} model files", "name a folder further down")
        try:
            parts = models_in(unit)
        except WrongRequest as error:
            found.passed_over.append(str(error))
            continue
        for part in parts:
            try:
                if part == FLUX and is_quantized(unit):
                    found.quantized.append(QuantizedFile.open(unit))
                else:
                    found.sources[part].append(OPENERS[part](unit))
            except WrongRequest as error:
                found.passed_over.append(str(error))
    return found


def choose(sources: Sequence[Source], part: str, place: Path) -> tuple[Path, str]:
    """The file of the one to use of several that would do, and why. Raises WrongRequest where the best are alike."""
    source, why = _best(sources, part, place)
    return source.path, why


def _best(sources: Sequence[Source], part: str, place: Path) -> tuple[Source, str]:
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


def choose_flux(found: Found, format: str) -> tuple[Path, str] | None:
    """The transformer's file for training in `format`, and why; None where there is none.

    Where nothing but quantized ones of other formats is there, it is one of those. Raises WrongRequest where the best
    are alike, and where one in `format` was made from none of the originals that are there: which is meant?
    """
    made_from = {file.path: file.source.get("fingerprint", file.path) for file in found.quantized}
    fitting, originals = [file for file in found.quantized if file.format == format], found.sources[FLUX]
    if not originals:
        if len({made_from[file.path] for file in fitting}) > 1:
            what = f"holds {FLUX} in {fitting[0].path} and in {fitting[1].path}, which are alike ({format})"
            refuse(found.place, what, "name the one to use")
        served = [*fitting, *found.quantized][:1]
        return (served[0].path, f"the only one in {found.place} in {served[0].format}") if served else None
    source, why = _best(originals, FLUX, found.place)
    if not found.quantized:
        return source.path, why
    known = {fingerprint(original.files) for original in originals}
    if strangers := [file.path for file in fitting if made_from[file.path] not in known]:
        what = f"holds {FLUX} in {source.path}, and one in {format} that was made from another file in {strangers[0]}"
        refuse(found.place, what, "name the one to use")
    forms = [file for file in found.quantized if made_from[file.path] == fingerprint(source.files)]
    for file in forms:
        if file.format == format:
            return file.path, f"{source.path.name} in {format} already"
    return source.path, why + "".join(f"; {file.path.name} is it in {file.format}" for file in forms)


def _merit(source: Source) -> tuple[float, bool, bool]:
    return source.bits, source.alone, not source.diffusers


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
                if place == folder:
                    raise
                continue  # what may not be read holds nothing for us
            for path in inside:
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    deeper.append(path)
            if len(seen) > MAX_FOLDERS:
                refuse(folder, f"holds more than {MAX_FOLDERS:,} folders", "name one further down")
        level = deeper
