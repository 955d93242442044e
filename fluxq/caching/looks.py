"""How the images of a cache look, remembered by the hashes of their files: looking decodes a whole image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from fluxq.data.looks import AREAS, Look, look_at
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import MALFORMED

LOOKS = "looks.json"


@cache
def _look_at(path: Path, mtime_ns: int) -> Look:
    return look_at(path)


class Looks:
    """The looks remembered in the JSON file at `path`; a damaged file counts as empty."""

    def __init__(self, path: Path) -> None:
        self.path, self._new = path, False
        self._known: dict[str, Look] = {}
        with suppress(OSError, *MALFORMED):
            for key, (areas, detail, contrast) in json.loads(path.read_text(encoding="utf-8")).items():
                if len(bytes.fromhex(areas)) == AREAS:
                    self._known[key] = Look(areas, float(detail), float(contrast))

    def of(
        self, images: Mapping[Path, str], tick: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[Path, Look]:
        """How `images` (path -> hash of its file) look; those that cannot be decoded are left out."""
        looks = {}
        for done, (path, hashed) in enumerate(images.items(), 1):
            tick(done, len(images))
            if hashed not in self._known:
                with suppress(OSError, WrongRequest):
                    self._known[hashed], self._new = _look_at(path, path.stat().st_mtime_ns), True
            if look := self._known.get(hashed):
                looks[path] = look
        return looks

    def save(self) -> None:
        """Remember new ones for later processes; this one does in any case."""
        if self._new:
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self._known), encoding="utf-8")
            self._new = False
