"""What owners of images should know about them before they train: one line a kind, with the images it is true of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fluxq.settings import Folder

from .buckets import Size
from .captions import TEXT_SUFFIXES, Caption, has_choice, has_placeholder, has_weight, with_trigger
from .images import PLUGINS, Header
from .looks import Look, copies

ENLARGED, CROPPED = 1.5, 0.2
"""An image is named if it is enlarged more than so many times, or if more than that share of it is cut off."""
BESIDE_IMAGES = {*TEXT_SUFFIXES, ".json", ".jsonl", ".csv", ".npz", ".safetensors", ".pt", ".toml", ".yaml", ".yml"}
BESIDE_IMAGES |= {".db", ".ini", ".md", ".log", ".zip"}
"""Suffixes of files that nobody takes for images."""
KINDS = {
    "held out": "images held out for validation (--validation-split)",
    "twice": "images listed more than once, each counted once",
    "mask": "masks of other images, not trained on (--masks beside uses them)",
    "no mask": "images without a mask, trained whole",
    "unused mask": "masks without an image",
    "second mask": "masks of images that have another mask, which is the one that counts",
    "scaled mask": "masks of another size than their image, scaled to it",
    "unread folder": "folders inside that hold images, not read without --recursive",
    "animated": "animations, of which only the first frame is read",
    "enlarged": f"images enlarged more than {ENLARGED:g} times, which makes them soft",
    "cropped": f"images of which more than {CROPPED:.0%} is cut off",
    "equal": "byte-for-byte identical files",
    "copy": "images that look the same, perhaps copies",
    "blurred": "images that are blurred",
    "plain": "images that are black or of one color",
    "encoding": "captions that are not UTF-8, read in another encoding",
    "no caption": "images without a caption",
    "no image": "files of captions without an image",
    "placeholder": "captions with [trigger], {trigger} or [name] in them, but there is no trigger",
    "weight": "captions that weight words, (red:1.3), which training takes literally",
    "long": "captions that T5 cuts, as they have more tokens than it takes (--t5-length)",
    "long for CLIP": "captions longer than CLIP's 77 tokens, of which only T5 sees the rest",
    "choice": "captions with alternatives {a|b}, taken literally (--wildcards draws one)",
    "trigger added": "captions without the trigger, now added",
}
"""What can be found, in the order in which it is said."""


class Finding(NamedTuple):
    """One kind of thing, the names of what it is true of, and how many that are."""

    what: str
    names: tuple[str, ...]
    count: int

    def line(self, shown: int = 3) -> str:
        names = ", ".join(self.names[:shown]) + (", ..." if len(self.names) > shown else "")
        return f"{self.what}: {self.count:,} ({names})"


class Findings:
    """Collected image by image. unread: files by suffix; sources: captions by the kind of their file."""

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, name: str) -> None:
        """kind: one of KINDS."""
        self._names[kind].append(name)

    def look_at_shape(self, name: str, header: Header, bucket: Size, resized: Size) -> None:
        if header.animated:
            self.add("animated", name)
        if resized[0] > ENLARGED * header.width:
            self.add("enlarged", name)
        if bucket[0] * bucket[1] < (1 - CROPPED) * resized[0] * resized[1]:
            self.add("cropped", name)

    def look_at_images(self, looks: Mapping[Path, Look]) -> None:
        """Images of several folders are named with their folders."""
        folders = {path.parent for path in looks}
        names = {path: path.name if len(folders) == 1 else f"{path.parent.name}/{path.name}" for path in looks}
        for path, look in looks.items():
            if look.is_plain or look.is_blurred:
                self.add("plain" if look.is_plain else "blurred", names[path])
        for first, path, equal in copies(looks):
            self.add("equal" if equal else "copy", f"{names[first]} and {names[path]}")

    def look_at_caption(self, name: str, found: Caption, caption: str, folder: Folder) -> None:
        """caption: what the image is trained on, or a variant of it. folder: filled."""
        self.sources[found.source or "without"] += 1
        if found.encoding:
            self.add("encoding", f"{name} in {found.encoding}")
        if not found.text:
            self.add("no caption", f"{name}: {found.why}")
        elif has_placeholder(caption):
            self.add("placeholder", name)
        else:
            own = " ".join(filter(None, (folder.caption_prefix, found.text, folder.caption_suffix)))
            if not has_placeholder(own) and with_trigger(own, folder.trigger) != own:
                self.add("trigger added", name)
        if has_choice(caption):
            self.add("choice", name)
        if has_weight(caption):
            self.add("weight", name)

    def all(self) -> list[Finding]:
        """In the order of KINDS, after files that are not read."""
        found = [
            Finding(what, tuple(names), len(names)) for kind, what in KINDS.items() if (names := self._names[kind])
        ]
        unread = {suffix: count for suffix, count in self.unread.most_common() if suffix not in BESIDE_IMAGES}
        if unread:
            names = tuple(map(_unread, unread, unread.values()))
            return [Finding("files that are not read", names, sum(unread.values())), *found]
        return found


def _unread(suffix: str, count: int) -> str:
    hint = f" (pip install {PLUGINS[suffix][3]})" if suffix in PLUGINS else ""
    return f"{count} {suffix or 'without a suffix'}{hint}"
