"""Locate the tensors of one checkpoint: a safetensors or GGUF file, or a folder with shards and their index.

Only headers are read. A file's name shows only that it is a model file; its first bytes show which kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxq.errors import WrongRequest

from . import detect
from .detect import AUTOENCODER, CLIP, EXAMPLES, FLUX, T5
from .files import Checkpoint, TensorFile, listed, printable, refuse
from .gguf import GgufFile
from .recognize import stored_tensors
from .stored_tensors import FP8, PRECISIONS, Foreign, Plain, Scaled, Stored

FOLDERS = {FLUX: "transformer", AUTOENCODER: "vae", CLIP: "text_encoder", T5: "text_encoder_2"}
SHARD = re.compile(r"-\d{5}-of-(?!00001$)\d{5}$")  # at the end of a file's stem
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
SUFFIXES = (".safetensors", ".sft", ".gguf")
MAX_JSON_BYTES = 16 << 20  # FLUX.1 dev's index is 121 KB


def open_file(path: Path) -> Checkpoint | GgufFile:
    """Read the header of a safetensors or GGUF file; the first bytes decide which it is."""
    is_gguf = False
    with suppress(OSError):  # Checkpoint reports what is wrong
        if path.is_file():  # reading a pipe would block
            with open(path, "rb") as file:
                is_gguf = file.read(4) == b"GGUF"
    return GgufFile(path) if is_gguf else Checkpoint(path)


class Shards:
    """One checkpoint in one file, or in several; `path` is then their index.

    shapes are by the files' own keys and hold the logical tensors only, without scales and the like; nbytes is the
    total size in bytes; metadata is a single file's, {} for shards. Raises WrongRequest if a shard is missing, or if
    the shards' keys differ from the index.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        if path.suffix.lower() != ".json":
            file = open_file(path)
            self._owners: dict[str, TensorFile] = dict.fromkeys(file.keys(), file)
            self.metadata = file.metadata
        else:
            self._owners = dict(_sharded(path))
        self.files = tuple(dict.fromkeys(owner.path for owner in self._owners.values())) or (path,)
        self.nbytes = sum(owner.size(key) for key, owner in self._owners.items())
        self.tensors = stored_tensors(self._owners)
        self.shapes = {key: stored.shape for key, stored in self.tensors.items()}

    def require_readable(self, keys: Iterable[str]) -> None:
        """Raise WrongRequest if a tensor of `keys` is stored in a way that fluxq does not read, or inconsistently."""
        own = {key: self.tensors[key] for key in keys}
        if foreign := [(key, stored.kind) for key, stored in own.items() if isinstance(stored, Foreign)]:
            what = f"stores {len(foreign):,} of its tensors ({printable(foreign[0][0])}; ...) as {foreign[0][1]}"
            refuse(self.path, f"{what}, which fluxq does not read", "use a version in fp8, NF4, GGUF or 16 bits")
        for key, stored in own.items():
            if isinstance(stored, Plain) and stored.dtype not in PRECISIONS:
                what = f"stores {printable(key)} as {stored.kind}, which fluxq does not read"
                refuse(self.path, what, "use a floating-point version in 8 to 32 bits")
        missing, wrong = self._without_scale(own), [stored.wrong for stored in own.values() if stored.wrong]
        if problems := listed(without_a_scale=missing, wrong_scale=wrong):
            what = f"has 8-bit weights whose scales (one number per matrix or per row) do not fit: {problems}"
            refuse(self.path, what, "download it again, or use a 16-bit version")

    def _without_scale(self, own: dict[str, Stored]) -> list[str]:
        """The fp8 tensors without a scale, if others have one or the file is marked as scaled."""
        marked = tuple(key.removesuffix("scaled_fp8") for key in self._owners if key.endswith("scaled_fp8"))
        if not any(isinstance(stored, Scaled) or key.startswith(marked) for key, stored in own.items()):
            return []
        return [printable(key) for key, stored in own.items() if isinstance(stored, Plain) and stored.dtype in FP8]


def locate(path: str | Path, wanted: str) -> Path:
    """The file, or the index of shards, that holds the model `wanted` at `path`, which may be a folder.

    Raises WrongRequest if a folder holds none or several, or if `path` is a single shard.
    """
    path = Path(path)
    if not path.is_dir():
        refuse_shard(path)
        return path
    inner = path / FOLDERS[wanted]
    folder = inner if inner.is_dir() else path
    candidates = units(folder)
    fitting = candidates if len(candidates) == 1 else [unit for unit in candidates if _holds(unit, wanted)]
    if len(fitting) > 1:
        what = f"holds {wanted} in {' and in '.join(unit.name for unit in fitting)}"
        refuse(folder, what, "name the file to use")
    if not fitting and any(SHARD.search(file.stem) for file in folder.glob("*.safetensors")):
        refuse(folder, "has shards but no .safetensors.index.json that lists them", "download the folder again")
    if not fitting:
        refuse(folder, f"has no .safetensors or .gguf file with {wanted}", f"use {EXAMPLES[wanted]}")
    return fitting[0]


def refuse_shard(path: Path) -> None:
    """Raise WrongRequest if `path` is named like one shard of several."""
    if not SHARD.search(path.stem) or not path.is_file():
        return
    index = f"{SHARD.sub('', path.stem)}.safetensors.index.json"
    if not (path.parent / index).is_file():
        what = f"is one shard of {int(path.stem[-5:])}, and {index}, which lists them, is not in its folder"
        refuse(path, what, "download the whole folder again")
    refuse(path, "is one shard of several", f"name its folder, {path.parent}")


def units(folder: Path) -> list[Path]:
    """The checkpoints directly in `folder`, sorted: every index of shards, and every file that is not a shard."""
    try:
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        refuse(folder, f"cannot be read ({error.strerror or error})", "check its permissions")
    return sorted(path for path in files if _is_unit(path))


def _is_unit(path: Path) -> bool:
    name = path.name.lower()
    return INDEX.search(name) is not None or (name.endswith(SUFFIXES) and not SHARD.search(path.stem))


def models_in(unit: Path) -> list[str]:
    """Which of the four models a file or an index is meant to hold. Raises WrongRequest if it is damaged."""
    return detect.models_in(_weight_map(unit) if unit.suffix == ".json" else Shards(unit).shapes)


def _holds(unit: Path, wanted: str) -> bool:
    try:
        return wanted in models_in(unit)
    except WrongRequest:
        return False


def _sharded(index: Path) -> dict[str, Checkpoint]:
    """Key -> the shard that holds it."""
    listing = _weight_map(index)
    shards = {}
    for name in dict.fromkeys(listing.values()):
        if not (index.parent / name).is_file():
            refuse(index, f"lists {printable(name)}, which does not exist", "download that shard too")
        shards[name] = Checkpoint(index.parent / name)
    missing = [f"{printable(key)} in {name}" for key, name in listing.items() if key not in shards[name].shapes]
    unexpected = [
        f"{printable(key)} in {name}"
        for name, shard in shards.items()
        for key in shard.keys()
        if listing.get(key) != name
    ]
    if missing or unexpected:
        what = f"and its shards disagree: {listed(missing=missing, unlisted=unexpected)}"
        refuse(index, what, "download the index and the shards again, from the same place")
    return {key: shards[name] for key, name in listing.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> file name of its shard, from the index."""
    listing = read_json(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        refuse(index, "has no weight_map, which lists each tensor's shard", "download it again")
    for name in listing.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            what = f"lists {printable(str(name))}, which is not a .safetensors file in the same folder"
            refuse(index, what, "download it again")
    return listing


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises WrongRequest for anything else."""
    try:
        nbytes = path.stat().st_size
        text = path.read_bytes() if nbytes <= MAX_JSON_BYTES else b""
    except FileNotFoundError:
        refuse(path, "does not exist", "check the path")
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror or error})", "check its permissions")
    if nbytes > MAX_JSON_BYTES:
        refuse(path, f"has {nbytes:,} bytes, the limit is {MAX_JSON_BYTES:,}", "download it again")
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        refuse(path, f"is not valid JSON ({printable(str(error))})", "download it again")
    if not isinstance(content, dict):
        refuse(path, f"is a JSON {type(content).__name__}, not an object", "download it again")
    return content
