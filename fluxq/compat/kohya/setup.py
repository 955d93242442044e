"""What has been read from sd-scripts' options so far: fluxq's settings, what is said of them, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Setup:
    """options: all of them, as `prepared` gives them. values: section -> key -> value, for fluxq.config_files.

    notes, refused: (option, text). places: (how paths of another machine begin, what to put there instead). missing:
    paths that do not exist.
    """

    options: dict[str, Any]
    places: Sequence[tuple[str, str]] = ()
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def set(self, section: str, **values: Any) -> None:
        """Set these keys; what is None stays unset."""
        self.values.setdefault(section, {}).update({key: v for key, v in values.items() if v is not None})

    def note(self, option: str, text: str) -> None:
        self.notes.append((option, text))

    def refuse(self, option: str, text: str) -> None:
        self.refused.append((option, text))

    def mapped(self, text: str) -> str:
        """`text` with what `places` puts in place of its beginning."""
        for begins, instead in self.places:
            if text.replace("\\", "/").lower().startswith(begins.replace("\\", "/").lower()):
                return instead + text[len(begins) :].replace("\\", "/")
        return text

    def path(self, text: str | None) -> str | None:
        """`text` on this machine. If nothing is there, it goes to `missing`."""
        if not text:
            return None
        text = self.mapped(text)
        slashed = text.replace("\\", "/")
        text = os.path.expanduser(slashed if os.path.exists(os.path.expanduser(slashed)) else text)
        if not os.path.exists(text) and text not in self.missing:
            self.missing.append(text)
        return text
