"""The files below a folder that can serve as one of the four models, judged by their headers, never by their names.

If several can, the one with the most bits per weight wins, then one that holds no other model, then the original
layout. If two are still equal, both are named and neither is chosen. A file from `fluxq quantize` is another form of
the transformer that it was made from, and is used in its place if its format is the requested one.
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
class Candidates:
    """The result of `search` in `place`, a folder or one file.

    sources: for each model, the sources that could serve it; quantized: transformers that fluxq has quantized;
    unusable: a sentence for each file that looks like one of the four models but that fluxq cannot use.
    """

    place: Path
    sources: dict[str, list[Source]] = field(default_factory=lambda: {part: [] for part in OPENERS})
    quantized: list[QuantizedFile] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def search(place: Path) -> Candidates:
    """Every model in `place`, a file or a folder, and below. Follows links; skips hidden folders.

    Raises WrongRequest for a folder that does not exist or has too many files or subfolders.
    """
    candidates, seen = Candidates(place), set()
    for unit in [place] if place.is_file() else _model_files_below(place):
        if (real := os.path.realpath(unit)) in seen:
            continue
        seen.add(real)
        if len(seen) > MAX_FILES:
            refuse(place, f"holds more than {MAX_FILES:,} model files", "name a folder further down")
        try:
            parts = models_in(unit)
        except WrongRequest as error:
            candidates.unusable.append(str(error))
            continue
        for part in parts:
            try:
                if part == FLUX and is_quantized(unit):
                    candidates.quantized.append(QuantizedFile.open(unit))
                else:
                    candidates.sources[part].append(OPENERS[part](unit))
            except WrongRequest as error:
                candidates.unusable.append(str(error))
    return candidates


def choose(sources: Sequence[Source], part: str, place: Path) -> tuple[Path, str]:
    """The best file of `sources`, and why. Raises WrongRequest if the best two are equal."""
    source, why = _best(sources, part, place)
    return source.path, why


def _best(sources: Sequence[Source], part: str, place: Path) -> tuple[Source, str]:
    ranked = sorted(sources, key=_merit, reverse=True)
    best, others = ranked[0], ranked[1:]
    if not others:
        return best, f"the only one in {place}"
    if _merit(others[0]) == _merit(best):
        what = f"holds {part} in {best.path} and in {others[0].path}, which are equally good ({best.precision})"
        refuse(place, what, "name the one to use")
    reasons = (f"it has the most bits ({best.precision})", "it holds no other model", "it has the original layout")
    first = next(i for i, (a, b) in enumerate(zip(_merit(best), _merit(others[0]), strict=True)) if a != b)
    return best, f"the best of {len(ranked)} in {place}: {reasons[first]}"


def choose_flux(candidates: Candidates, format: str) -> tuple[Path, str] | None:
    """The transformer's file for training in `format`, and why; None if there is none.

    If there are only quantized files of other formats, it is one of those. Raises WrongRequest if the best two are
    equal, and if a file in `format` was made from none of the originals here: then it is unclear which one is meant.
    """
    made_from = {file.path: file.source.get("fingerprint", file.path) for file in candidates.quantized}
    originals = candidates.sources[FLUX]
    fitting = [file for file in candidates.quantized if file.format == format]
    if not originals:
        if len({made_from[file.path] for file in fitting}) > 1:
            what = f"holds {FLUX} in {fitting[0].path} and in {fitting[1].path}, which are equally good ({format})"
            refuse(candidates.place, what, "name the one to use")
        served = [*fitting, *candidates.quantized][:1]
        return (served[0].path, f"the only one in {candidates.place} in {served[0].format}") if served else None
    source, why = _best(originals, FLUX, candidates.place)
    if not candidates.quantized:
        return source.path, why
    known = {fingerprint(original.files) for original in originals}
    if unknown := [file.path for file in fitting if made_from[file.path] not in known]:
        what = f"holds {FLUX} in {source.path}, and {unknown[0]} in {format}, which was made from another file"
        refuse(candidates.place, what, "name the one to use")
    forms = [file for file in candidates.quantized if made_from[file.path] == fingerprint(source.files)]
    for file in forms:
        if file.format == format:
            return file.path, f"{source.path.name}, already quantized to {format}"
    return source.path, why + "".join(f"; {file.path.name} is the same in {file.format}" for file in forms)


def _merit(source: Source) -> tuple[float, bool, bool]:
    return source.bits, source.alone, not source.diffusers


def _model_files_below(folder: Path) -> Iterator[Path]:
    """Model files and indices of shards, folder by folder, the top level first."""
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
                continue  # skip a subfolder that cannot be read
            for path in inside:
                if (real := os.path.realpath(path)) not in seen:
                    seen.add(real)
                    deeper.append(path)
            if len(seen) > MAX_FOLDERS:
                refuse(folder, f"holds more than {MAX_FOLDERS:,} folders", "name one further down")
        level = deeper
