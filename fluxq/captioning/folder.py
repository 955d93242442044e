"""The captions of folders of images: which there are, and the files that they are in, written whole or not at all.

A caption is written into the text file that it came from. One from a JSON file or a table, or a new one, gets a .txt
file of the image's name, which comes before those wherever captions are read. Before a file changes it is copied into
the folder `captions-backup-N` beside it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fluxq.console import plural
from fluxq.data.caption_edits import phrase_pattern, removed, replaced
from fluxq.data.captions import Caption, Captions, has_placeholder, with_trigger
from fluxq.data.folders import expand
from fluxq.data.images import image_files
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.settings import Folder

BACKUP, NEW = "captions-backup", ".new"
NAMED = 5
"""So many names are in one sentence."""


class Captioned(NamedTuple):
    """An image, its caption, which may be empty, and the lines of the text that it came from. file: where the caption
    is, if it is in a text file, else where it would be written.
    """

    image: Path
    caption: Caption
    file: Path
    lines: tuple[str, ...]


class Change(NamedTuple):
    """What becomes of a caption, each as its lines."""

    before: tuple[str, ...]
    after: tuple[str, ...]


def captioned(folders: Sequence[Path], recursive: bool = False) -> list[Captioned]:
    """Every image of `folders` with its caption, in order, each once.

    Raises WrongRequest for a folder that is missing or has no images, and one for all captions that cannot be read.
    """
    if not folders:
        raise WrongRequest("no folder of images was given; name at least one")
    found: dict[Path, Captioned] = {}
    bad: dict[str, None] = {}
    for folder in folders:
        if not folder.is_dir():
            problem = "is a file, not a folder of images" if folder.exists() else "does not exist"
            raise WrongRequest(f"{folder} {problem}; name a folder of images")
        inside = [part.path for part in expand(Folder(folder), recursive)]
        if not any(image_files(path) for path in inside):
            raise WrongRequest(f"{folder} holds no images that fluxq reads; name a folder with some")
        for path in inside:
            _read(path, found, bad)
    if bad:
        more = f", and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise WrongRequest(f"{', '.join([*bad][:NAMED])}{more}; correct or remove the file first")
    return [*found.values()]


def _read(folder: Path, found: dict[Path, Captioned], bad: dict[str, None]) -> None:
    """Add what is in `folder`, and why captions in it cannot be read."""
    captions, images = Captions(folder), image_files(folder)
    stems = Counter(image.stem.lower() for image in images)
    for image in images:
        try:
            caption = captions.of(image)
        except WrongRequest as error:
            bad[str(error).rpartition("; ")[0]] = None
            continue
        own = image.stem if stems[image.stem.lower()] == 1 else image.name  # a.jpg and a.png share a.txt
        file = folder / (caption.file or captions.files.get(f"{own.lower()}.txt", f"{own}.txt"))
        lines = captions.lines_of(caption.file) if caption.file else [caption.text] if caption.text else []
        found.setdefault(image.resolve(), Captioned(image, caption, file, tuple(lines)))


def edits(
    items: Sequence[Captioned],
    remove: Sequence[str] = (),
    replace: Sequence[tuple[str, str]] = (),
    trigger: str | None = None,
) -> dict[Path, Change]:
    """File -> change, of the captions that change: first `remove` is taken out, then (old, new) replaced, then the
    trigger put in place.

    Raises WrongRequest if nothing would be left of a caption.
    """
    changes, empty = {}, []
    for item in items:
        if not item.caption.text or item.file in changes:
            continue
        lines = [line for before in item.lines if (line := removed(before, remove))]
        for old, new in replace:
            lines = [replaced(line, old, new) for line in lines]
        after = _triggered(lines, trigger)
        if not after:
            empty.append(item.file.name)
        if after != item.lines:
            changes[item.file] = Change(item.lines, after)
    if empty:
        names = ", ".join(empty[:NAMED]) + (", ..." if len(empty) > NAMED else "")
        raise WrongRequest(
            f"--remove would leave nothing of {plural(len(empty), 'caption')} ({names}); remove less, or pass "
            "--trigger, which stays"
        )
    return changes


def _triggered(lines: Sequence[str], trigger: str | None) -> tuple[str, ...]:
    """`lines` with the trigger in its places, or in front of the first unless one has it."""
    filled = [with_trigger(line, trigger) if has_placeholder(line) else line for line in lines]
    whole = " ".join(filled)
    if with_trigger(whole, trigger) != whole or not filled:
        filled[:1] = [with_trigger(filled[0] if filled else "", trigger)]
    return tuple(filter(None, filled))


def without_effect(items: Sequence[Captioned], phrases: Sequence[str]) -> list[str]:
    """Those of `phrases` that are in no caption."""
    return [p for p in phrases if not any(phrase_pattern(p).search(line) for item in items for line in item.lines)]


def write_edits(changes: dict[Path, Change]) -> list[Path]:
    """Write what `edits` has found. Returns the folders with the former files."""
    backup = Backup("edit")
    for file, change in changes.items():
        backup.keep(file)
        write_caption(file, "\n".join(change.after))
    return backup.finish()


def write_caption(file: Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


class Backup:
    """Copies of files before they change, each in a folder beside it, and until everything is done a mark for each new
    file.

    The folder is called `captions-backup-unfinished-KEY`, and `captions-backup-N` once everything is done.
    """

    def __init__(self, key: str) -> None:
        self._name = f"{BACKUP}-unfinished-{key}"
        self._folders: dict[Path, None] = {}

    def keep(self, file: Path) -> None:
        """Copy `file`, or mark it as new if there is none, unless an earlier attempt has done so."""
        copy, mark = self._copy(file), self._mark(file)
        if copy.exists() or mark.exists():
            return
        with atomic_path(copy if file.exists() else mark) as temporary:
            if file.exists():
                shutil.copyfile(file, temporary)
            else:
                temporary.touch()

    def is_done(self, file: Path) -> bool:
        """Whether an earlier attempt, which was interrupted, has changed `file`."""
        copy = self._copy(file)
        if not file.exists():
            return False
        return self._mark(file).exists() or (copy.exists() and copy.read_bytes() != file.read_bytes())

    def finish(self) -> list[Path]:
        """Give the folders their last names, and return them."""
        finished = []
        for folder in self._folders:
            unfinished = folder / self._name
            for mark in unfinished.glob(f"*{NEW}"):
                mark.unlink()
            if unfinished.is_dir() and not any(unfinished.iterdir()):
                unfinished.rmdir()
            if unfinished.is_dir():
                numbers = (int(n) for old in folder.glob(f"{BACKUP}-*") if (n := old.name.rpartition("-")[2]).isdigit())
                finished.append(unfinished.rename(folder / f"{BACKUP}-{max(numbers, default=0) + 1}"))
        return finished

    def _copy(self, file: Path) -> Path:
        self._folders[file.parent] = None
        return file.parent / self._name / file.name

    def _mark(self, file: Path) -> Path:
        copy = self._copy(file)
        return copy.with_name(copy.name + NEW)
