"""An image's caption, wherever its folder keeps it, and what becomes of it before it is encoded.

The first of these that has text: a file of the image's name (`a.txt`, `a.caption`, `a.png.txt`), a JSON file of its
name, the folder's `metadata.jsonl` or `metadata.csv` (`file_name`, `text`: the imagefolder layout of Hugging Face's
datasets), a JSON file of captions by image (sd-scripts', ai-toolkit's), and if asked for the image's own name. Suffixes
count in any case. White space of any kind becomes single spaces.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fluxq.errors import WrongRequest

from .images import readable

TEXT_SUFFIXES = (".txt", ".caption")
FIELDS = ("caption", "text", "prompt")
"""Where a JSON object or a row of a table keeps a caption, the first that has text."""
NAME = "file name"

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
"""Alternatives in a caption, `{red|blue}`, the innermost of nested ones."""
_PLACEHOLDER = re.compile(r"\[trigger\]|\{trigger\}|\[name\]", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # white space, or nothing that a text should hold


class Caption(NamedTuple):
    """What was found for an image. source: the file's suffix or name, or "file name", "" without a caption. why: why
    there is none. encoding: that of the file, "" for UTF-8. more: other captions of the same image. file: the name of
    the text file that it is in.
    """

    text: str
    source: str = ""
    why: str = ""
    encoding: str = ""
    more: tuple[str, ...] = ()
    file: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them."""
        return (self.text, *self.more) if self.text else ()


class Captions:
    """The captions of one folder.

    lines: "all" of a text file is the caption, or its "first" line with text, as in sd-scripts, or "each" line is one.
    A list in a JSON file is several captions, too. from_names: an image
    without a caption is called by its file's name, without the number ("red_dress_02.png" -> "red dress").
    """

    def __init__(self, folder: Path, lines: str = "all", from_names: bool = False) -> None:
        self.folder, self.lines, self.from_names = folder, lines, from_names
        self.used: set[str] = set()
        """Names of the files that gave or should have given an image its caption."""

    @cached_property
    def files(self) -> dict[str, str]:
        """Name in lower case -> name, of the folder's files."""
        names = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_file())
        return {name.lower(): name for name in reversed(names) if not name.startswith(".")}

    def of(self, image: Path) -> Caption:
        """The caption of `image`, of this folder. Raises WrongRequest for a file that is not text or cannot be read."""
        why = "none in its folder"
        stem = image.stem.lower()
        for name in (*(stem + suffix for suffix in TEXT_SUFFIXES), *(image.name.lower() + s for s in TEXT_SUFFIXES)):
            if (real := self.files.get(name)) is not None:
                self.used.add(real)
                text, encoding = self._decoded(real)
                if texts := _texts(text, self.lines):
                    suffix = name[name.rindex(".") :]
                    return Caption(texts[0], suffix, encoding=encoding, more=texts[1:], file=real)
                why = f"{real} is empty"
        if (real := self.files.get(f"{stem}.json")) is not None:
            self.used.add(real)
            if texts := captions_in(self._json(real)):
                return Caption(texts[0], ".json", more=texts[1:])
            why = f"{real} has no {', '.join(FIELDS[:-1])} or {FIELDS[-1]}"
        for name, captions in self._tables:
            if texts := captions.get(image.name.lower()) or captions.get(stem):
                return Caption(texts[0], name, more=texts[1:])
        if self.from_names and (text := _folded(re.sub(r"[\s_-]*\d*$", "", image.stem).replace("_", " "))):
            return Caption(text, NAME)
        return Caption("", why=why)

    def lines_of(self, name: str) -> list[str]:
        """The lines of the text file `name` that have text. Raises WrongRequest as `of` does."""
        return [line for text in _lines(self._decoded(name)[0]) if (line := _folded(text))]

    def unused(self, images: Sequence[Path]) -> list[str]:
        """Text files that look like captions but belong to none of `images`."""
        stems = {part.lower() for image in images for part in (image.stem, image.name)}
        suffixes = (*TEXT_SUFFIXES, ".json")
        texts = ((name, real) for name, real in self.files.items() if name.endswith(suffixes))
        used = self.used | {name for name, _ in self._tables}
        return sorted(r for n, r in texts if n.rpartition(".")[0] not in stems and r not in used)

    @cached_property
    def _tables(self) -> list[tuple[str, Mapping[str, tuple[str, ...]]]]:
        """(file, image's name in lower case, perhaps without its suffix -> captions) of each file for many images."""
        stems = {name.rpartition(".")[0] for name in self.files if readable(f".{name.rpartition('.')[2]}")}
        images, found = stems | self.files.keys(), []
        for name, real in self.files.items():
            read = {"metadata.jsonl": self._rows_of_jsonl, "metadata.csv": self._rows_of_csv}.get(name)
            if read is None and name.endswith(".json") and name.removesuffix(".json") not in stems:
                read = self._rows_of_json
            if read and (captions := {key: texts for key, texts in read(real) if key in images and texts}):
                found.append((real, captions))
        return found

    def _rows_of_jsonl(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for number, line in enumerate(self._decoded(name)[0].split("\n"), 1):
            if line.strip():
                row = _parsed(line, f"{self.folder / name}, line {number},")
                yield _key(row.get("file_name") if isinstance(row, dict) else None), captions_in(row)

    def _rows_of_csv(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        try:
            for row in csv.DictReader(io.StringIO(self._decoded(name)[0], newline="")):
                yield _key(row.get("file_name")), captions_in(row)
        except csv.Error as error:
            raise WrongRequest(f"{self.folder / name} is not a table ({error}); correct it or move it away") from error

    def _rows_of_json(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        try:
            data = self._json(name)
        except WrongRequest:
            return  # some other program's
        if isinstance(data, list):
            data = {_key(row.get("file_name")): row for row in data if isinstance(row, dict)}
        for key, value in data.items() if isinstance(data, dict) else ():
            yield _key(key), captions_in(value, tags=True)

    def _json(self, name: str) -> Any:
        return _parsed(self._decoded(name)[0], str(self.folder / name))

    def _decoded(self, name: str) -> tuple[str, str]:
        path = self.folder / name
        try:
            return decoded(path.read_bytes())
        except UnicodeError as error:
            raise WrongRequest(f"{path} is not text; save it as UTF-8, or pass --skip-bad to do without it") from error
        except OSError as error:
            raise WrongRequest(
                f"{path} cannot be read ({error.strerror}); make it readable, or pass --skip-bad to do without it"
            ) from error


def decoded(data: bytes) -> tuple[str, str]:
    """Text, and the name of its encoding if it is not UTF-8: UTF-16 (as some editors on Windows write), or cp1252.

    Raises UnicodeError for what is none of these.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16"), "UTF-16"
    zeros = data[::2].count(0), data[1::2].count(0)
    if sum(zeros) > len(data) // 4:  # of letters in UTF-16 every second byte is 0
        return data.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"), "UTF-16"
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8-sig"), ""
    if any(zeros):
        raise UnicodeError("holds bytes that are 0")
    return data.decode("cp1252"), "cp1252"


def captions_in(row: Any, tags: bool = False) -> tuple[str, ...]:
    """The captions in a JSON value or a table's row: a text, a list of texts, or the first of its FIELDS that has some.

    tags: sd-scripts' field of that name is put behind each.
    """
    if not isinstance(row, dict):
        texts = (_folded(value) for value in (row if isinstance(row, list) else [row]) if isinstance(value, str))
        return tuple(dict.fromkeys(filter(None, texts)))
    captions = next(filter(None, (captions_in(row.get(f)) for f in FIELDS if not isinstance(row.get(f), dict))), ())
    more = _folded(value) if tags and isinstance(value := row.get("tags"), str) else ""
    return tuple(", ".join(filter(None, (caption, more))) for caption in captions or ("",) if caption or more)


def in_class(caption: str, trigger: str | None, name: str) -> str:
    """`caption` with `name`, of what the trigger is one of, in place of `trigger` wherever `with_trigger` sees it."""
    words = " ".join((trigger or "").split())
    return re.sub(_whole(words), lambda _: name, caption, flags=re.IGNORECASE) if words else caption


def _whole(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def with_trigger(caption: str, trigger: str | None) -> str:
    """`caption` with `trigger` in place of [trigger], {trigger} or [name], or in front unless it already contains that
    word. Either may be empty.
    """
    trigger = " ".join((trigger or "").split())
    if not trigger:
        return caption
    filled = _PLACEHOLDER.sub(lambda _: trigger, caption)
    if re.search(_whole(trigger), filled, re.IGNORECASE):
        return filled
    return f"{trigger}, {filled}" if filled else trigger


def has_placeholder(caption: str) -> bool:
    return _PLACEHOLDER.search(caption) is not None


def has_choice(caption: str) -> bool:
    """Whether the caption has alternatives, `{red|blue}`."""
    return CHOICE.search(caption) is not None


def has_weight(caption: str) -> bool:
    """Whether the caption weights words, "(red:1.3)": training takes that literally."""
    return re.search(r"\([^()]+:\s*(\d+(\.\d+)?|\.\d+)\s*\)", caption) is not None


def _texts(text: str, lines: str) -> tuple[str, ...]:
    """The captions in a file's text; lines as for `Captions`."""
    if lines == "all":
        return tuple(filter(None, [_folded(text)]))
    texts = tuple(dict.fromkeys(filter(None, map(_folded, _lines(text)))))
    return texts[:1] if lines == "first" else texts


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)  # not at other characters, which sd-scripts does not take for line ends


def _folded(text: str) -> str:
    """`text` with every run of white space as one space. Control characters count as white space."""
    return " ".join(_CONTROL.sub(" ", text).split())


def _key(name: object) -> str:
    """The last part of a path, with / or \\, in lower case."""
    return re.split(r"[/\\]", name)[-1].lower() if isinstance(name, str) else ""


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongRequest(
            f"{where} is not JSON ({error}); correct it or move it away, or pass --skip-bad to do without it"
        ) from error
