"""The dataset file: the examples that a run trains on, and the keys of their records in the store."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import well_formed

DATASET_VERSION = 1
RECORD = re.compile(r"[\w-]+")
"""What the key of a record looks like: no path leaves the cache's folders."""


@dataclass(frozen=True)
class Entry:
    """One example of a dataset. Several latents or text keys are variants; each step picks one at random."""

    name: str
    path: str
    size: int  # bytes
    mtime_ns: int
    repeats: int
    bucket: tuple[int, int]  # (w, h) in pixels
    latents: tuple[str, ...]
    text: tuple[str, ...]
    masks: tuple[str, ...] = ()  # one for each of the latents, if the image has a mask
    mask_outside: float = 0.0  # how much the area outside the mask counts
    mask_normalize: bool = False  # the image counts as much as one without a mask
    weight: float = 1.0  # how much the loss counts
    caption_dropout: float = 0.0  # chance of a step without the caption
    caption_dropout_epochs: int = 0  # all epochs whose number (from 1) this divides are without captions
    batch: int = 0  # images per forward pass; 0: as many as the run has
    held_out: bool = False  # by data.validation_split

    def extras(self) -> dict[str, object]:
        """What the example has beyond images, captions and repeats."""
        fields = (f for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}


@dataclass(frozen=True)
class Dataset:
    """What a run trains on: the examples, and the text records of its prompts.

    The prompts include "" unless the text encoders were missing when the cache was built. `skipped` and `notes` are
    lines for the user: images left out, truncated captions and the like.
    """

    examples: tuple[Entry, ...]
    prompts: dict[str, str]  # prompt -> text key
    t5_length: int
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def records(self) -> set[tuple[str, str]]:
        """(kind, key) of every record in use."""
        latents = {("latents", key) for example in self.examples for key in example.latents}
        text = {("text", key) for example in self.examples for key in example.text}
        masks = {("masks", key) for example in self.examples for key in example.masks}
        return latents | text | masks | {("text", key) for key in self.prompts.values()}

    def part(self, folders: Sequence[Path], held_out: bool = False) -> Dataset:
        """The dataset with only the examples from `folders`, without those that are held out or only those. Raises
        WrongRequest if there are none.
        """
        wanted = {os.path.abspath(folder) for folder in folders}
        examples = tuple(e for e in self.examples if os.path.dirname(e.path) in wanted and e.held_out == held_out)
        if not examples:
            names = ", ".join(str(folder) for folder in folders)
            raise WrongRequest(f"{names} has no usable image of its own; an image listed in two folders counts once")
        return replace(self, examples=examples)

    def digest(self) -> str:
        """A hash of what identifies a dataset: its images, captions, shapes and encoders, but not their paths."""
        facts = sorted(
            (e.name, e.repeats, e.bucket, e.latents, e.text, *sorted(e.extras().items())) for e in self.examples
        )
        return blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    CONTENTS: ClassVar = ("image of", "caption of", "repeats of", "mask or settings of")

    def contents(self) -> dict[str, list]:
        """Name -> [keys of its latents, keys of its captions, repeats, extras], in the order of CONTENTS."""
        return {e.name: [list(e.latents), list(e.text), e.repeats, _as_json(e.extras())] for e in self.examples}

    def save(self, path: Path) -> None:
        examples = [vars(example) for example in self.examples]
        data = {"version": DATASET_VERSION, **vars(self), "examples": examples}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Dataset:
        """The dataset in `path`. Raises WrongRequest if the file is missing or not a dataset of this version."""
        try:
            with well_formed(path, "is not a dataset file", "delete it and run `fluxq cache` again"):
                data = json.loads(path.read_text(encoding="utf-8"))
                if data.pop("version") != DATASET_VERSION:
                    raise ValueError("written by another version of fluxq")
                examples = tuple(Entry(**_lists_to_tuples(example)) for example in data.pop("examples"))
                dataset = cls(examples, **_lists_to_tuples(data))
                for kind, key in dataset.records():
                    if not RECORD.fullmatch(key):
                        raise ValueError(f"{key!r} is not the key of {kind}")
                return dataset
        except OSError as error:
            raise WrongRequest(f"{path} cannot be read ({error.strerror}); run `fluxq cache` again") from error


def _as_json(values: dict[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _lists_to_tuples(data: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
