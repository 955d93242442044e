"""What the files of a run say, without the times in them, and what is wrong with a folder of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

TEMPORARY = re.compile(r"\..*\.tmp-|\.lock\.json$")
"""Names that nothing may have once a run is over; a process that was ended leaves some."""
STATE_ELSEWHERE = re.compile(r"-state-step\d{8}\.safetensors$")
EARLIER_LORA = re.compile(r"-step\d{8}\.safetensors$")
LOCKS = re.compile(r"\.lock$")

Contents = dict[str, Any]
"""path below the folder -> what the file says"""


def files(root: Path) -> Iterator[str]:
    """Those that are no locks."""
    for path in sorted(root.rglob("*")):
        if not path.is_dir() and not LOCKS.search(path.name):
            yield str(path.relative_to(root))


def contents(root: Path) -> Contents:
    """Of every file under its final name. Raises an exception of any kind for one that is not whole."""
    return {name: says(root / name) for name in files(root) if not TEMPORARY.search(Path(name).name)}


def says(path: Path, name: str = "", ended: bool = False) -> Any:
    """What the file at `path`, or one that is to become `name`, says; nothing of when it was written.

    ended: the process ended without cleaning up, which may have cut the last line of the log.
    """
    name = name or path.name
    if name == "log.jsonl":
        *lines, last = path.read_text().split("\n")
        if last and not ended:
            raise ValueError("its last line does not end")
        return [timeless(json.loads(line)) for line in lines]
    if name == "result.json":
        return timeless(json.loads(path.read_text()))
    if name == "hashes.json":
        return json.loads(path.read_text())
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    if name == "loss.png":
        return None  # of as many steps as there were at the time
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "fluxq_state" in metadata or "ss_network_module" in metadata:
                about = json.loads(metadata.get("fluxq_state", "{}"))
                about |= {"facts": timeless(about.get("facts", {}))}
                about |= {key: metadata.get(key) for key in ("ss_steps", "ss_max_train_steps", "fluxq_changes")}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                return [about, {key: [str(t.dtype), [*t.shape], digest(raw(t))] for key, t in tensors.items()}]
    return digest(path.read_bytes())


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "peak_bytes")}


def raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def versions(*of: Contents) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for each in of:
        for name, what in each.items():
            found.setdefault(name, []).append(what)
    return found


def unsound(root: Path, known: Mapping[str, list[Any]], ended: bool) -> Iterator[str]:
    """The files under final names that say what no file of that name says in an undisturbed run, or are not whole."""
    for name in files(root):
        if TEMPORARY.search(Path(name).name) or STATE_ELSEWHERE.search(name):
            continue
        try:
            found = says(root / name, ended=ended)
        except Exception as error:
            yield f"{name} is not whole ({error})"
            continue
        if name.endswith("log.jsonl"):
            if not any(found == one[: len(found)] for one in known.get(name, [])):
                yield f"{name} has other records"
        elif name.endswith("hashes.json"):
            if not any(found.items() <= one.items() for one in known.get(name, [])):
                yield f"{name} has other hashes"
        elif found not in known.get(name, []):
            yield f"{name} says something else"


def differences(root: Path, expected: Contents, output: str, may_stay: str) -> Iterator[str]:
    """How a folder after its last command differs from an undisturbed one, but for what `output` says is missing, and
    the file `may_stay`.
    """
    excused = []
    if "no preview at step" in output:
        excused.append(re.compile(r"samples/"))
    if "could not be saved" in output:
        excused.append(EARLIER_LORA)
    if "could not write loss.png" in output:
        excused.append(re.compile(r"loss\.png$"))
    present = {*files(root)}
    for name in sorted(present - expected.keys()):
        told = STATE_ELSEWHERE.search(name) and name in output
        instead = EARLIER_LORA.search(name) and "could not be saved" in output  # of that which it was to make way for
        if not (name == may_stay or told or instead):
            yield f"{name} is left over"
    for name, what in expected.items():
        if name not in present:
            if not any(each.search(name) for each in excused):
                yield f"{name} is missing"
            continue
        try:
            if says(root / name) != what:
                yield f"{name} differs"
        except Exception as error:
            yield f"{name} is not whole ({error})"
