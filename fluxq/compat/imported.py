"""What another program's file becomes: fluxq's settings, each with where it came from, and what is not taken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxq.config import TrainConfig
from fluxq.config_files import config_from_dict, toml_value

from .kohya.setup import Setup

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
"""What a comment in TOML may not contain, and what would change how a terminal shows it."""


@dataclass
class Imported(Setup):
    """A Setup whose settings know their sources. program: whose file it is.

    sources: "section.key", or "data.folders.0.key" -> what it came from. lines: what becomes of each key, the lint.
    """

    program: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, source: str) -> None:
        """Set `key`, like "lora.rank"; None stays unset."""
        section, _, name = key.partition(".")
        self.set(section, **{name: value})
        if value is not None:
            self.sources[key] = source

    def refusals(self) -> list[str]:
        found = [f"{name}: {text}" for name, text in dict.fromkeys(self.refused)]
        if self.missing:
            found.append(f"not on this machine: {', '.join(self.missing)}; --map OLD=NEW replaces how paths begin")
        return found

    def config(self) -> TrainConfig:
        """Raises WrongRequest for values that fluxq does not take."""
        return config_from_dict(self.values, f"this {self.program} file")

    def toml(self, file: str) -> str:
        """The settings as TOML that reads back to `config()`, commented; what became nothing is listed at the end."""
        config = self.config()
        lines = [comment(f"From {file}, of {self.program}. Train with: fluxq train --config THIS_FILE"), ""]
        for section, values in ((section, values) for section, values in self.values.items() if values):
            own = getattr(config, section)
            lines.append(f"[{section}]")
            lines += [self._line(f"{section}.{key}", getattr(own, key)) for key in values if key != "folders"]
            for i, folder in enumerate(values.get("folders", ())):
                lines += ["", "[[data.folders]]"]
                lines += [self._line(f"data.folders.{i}.{key}", getattr(own.folders[i], key)) for key in folder]
            lines.append("")
        lines += [comment(line) for line in self.lines if " becomes " not in line]
        return "\n".join([*lines, ""])

    def _line(self, key: str, value: Any) -> str:
        return f"{key.rpartition('.')[2]} = {toml_value(value)}  {comment(self.sources.get(key, ''))}".rstrip(" #")


def comment(text: str) -> str:
    return f"# {printable(text)}"


def printable(text: str) -> str:
    """`text` on one line, without what a file may hold to lead a terminal or TOML astray."""
    return UNSAFE.sub(" ", text)


def shown(value: Any) -> str:
    """`value` of a YAML or JSON file on one line, cut if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")


def flattened(table: Mapping[str, Any], prefix: str = "", whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is named in `whole` stays a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and value and name not in whole
        flat |= flattened(value, f"{name}.", whole) if inner else {name: value}
    return flat
