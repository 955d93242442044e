"""Config files, dictionaries and `--set section.key=value` -> TrainConfig (config.py), and back to TOML.

Unknown keys are refused with the nearest known one, also by the names that other trainers have (names.py). pydantic was
tried: the same sentences took 80 lines instead of 45, and importing the command line 0.3 s of CPU instead of 0.1 s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxq.config import SECTIONS, TrainConfig, own_names
from fluxq.errors import WrongRequest
from fluxq.names import meaning, trainer_of, unknown
from fluxq.settings import Folder, kind_of, type_hints

FORMER_KEYS = {
    "data.size": "data.resolution",
    "training.rate": "training.learning_rate",
    "training.text_rate": "training.text_learning_rate",
}
"""Former key -> its name today. Config files, saved runs and --set may still use former keys."""

FORMER_OPTIONS = {"size": "resolution", "rate": "lr", "text-rate": "text-lr", "card": "gpu"}
"""Former command-line option -> its name today, without dashes."""


def current_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a config's tables with former keys renamed. Raises WrongRequest if a table has both names of a key."""
    renamed = {name: dict(table) if isinstance(table, Mapping) else table for name, table in values.items()}
    for former, current in FORMER_KEYS.items():
        (section, old), new = former.split("."), current.split(".")[1]
        table = renamed.get(section)
        if isinstance(table, dict) and old in table:
            if new in table:
                raise WrongRequest(f"{source}: {former} is the former name of {current}; keep only one of them")
            table[new] = table.pop(old)
    return renamed


def config_from_dict(values: Mapping[str, Any], source: str, cls: type = TrainConfig, prefix: str = "") -> Any:
    """A `cls` with `values`; `source` is named in errors.

    Raises WrongRequest for unknown keys (naming the nearest known one), missing keys and wrong values.
    """
    if not isinstance(values, Mapping):
        raise WrongRequest(f"{source}: {prefix.rstrip('.') or 'the file'} must be a table, not {values!r}")
    if cls is TrainConfig:
        values = current_names(values, source)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            raise WrongRequest(_unknown(key, value, prefix, source, fields))
    read = {k: _typed(v, hints[k], f"{prefix}{k}", source, fields[k].metadata) for k, v in values.items()}
    missing = [n for n, f in fields.items() if n not in read and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise WrongRequest(f"{source}: {prefix}{missing[0]} is missing")
    return cls(**read)


def _unknown(key: str, value: Any, prefix: str, source: str, fields: Mapping[str, Any]) -> str:
    """The sentence about an unknown key, or about the first key in an unknown section."""
    own = own_names()
    while not (found := meaning(key, own, fields)) and isinstance(value, Mapping) and value:
        prefix, (key, value) = f"{prefix}{key}.", next(iter(value.items()))
    here, name = found.here if found else "", found.here.rpartition(".")[2] if found else ""
    return unknown(f"key '{prefix}{key}' in {source}", found, f"'{prefix}{name}'" if name in fields else f"'{here}'")


def _typed(value: Any, hint: Any, key: str, source: str, allowed: Mapping[str, Any]) -> Any:
    """`value`, as TOML reads it, as an instance of `hint`. Raises WrongRequest if it is not one or not `allowed`."""
    if (parse := allowed.get("parse")) is not None:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise WrongRequest(f"{source}: {key} must be {error}, not {value!r}") from error
    kind, several = kind_of(hint)
    if value is None and isinstance(hint, types.UnionType):
        return None
    if several:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(item, kind, f"{key}.{i}", source, allowed) for i, item in enumerate(items))
    if dataclasses.is_dataclass(kind):
        value = {"path": value} if kind is Folder and isinstance(value, str) else value
        return config_from_dict(value, source, kind, f"{key}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        value = float(value)
    if kind is Path and isinstance(value, str):
        if "\0" in value:
            raise WrongRequest(f"{source}: {key} must be a path, not {value!r}")
        value = Path(os.path.expanduser(value))
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise WrongRequest(f"{source}: {key} must be {TYPE_NAMES[kind]}, not {value!r}")
    choices, minimum = allowed.get("choices", ()), allowed.get("minimum")
    if choices and value not in choices:
        raise WrongRequest(f"{source}: {key} must be one of {', '.join(choices)}, not {value!r}")
    if minimum is not None and not minimum <= value <= min(allowed["maximum"], sys.float_info.max):
        at_most = f" and at most {allowed['maximum']}" if allowed["maximum"] < math.inf else ""
        raise WrongRequest(f"{source}: {key} must be at least {minimum}{at_most}, not {value!r}")
    return value


def file_and_strength(text: str) -> tuple[Path, float]:
    """(file, strength) from "FILE" or "FILE=STRENGTH". Raises WrongRequest if the strength is not a number."""
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise WrongRequest(f"the strength in {text} is not a number; write FILE=0.8")
    return Path(path), strength


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises WrongRequest if it is missing, malformed or another trainer's."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise WrongRequest(f"the config file {path} cannot be read ({error.strerror})") from error
    try:
        tables, problem = tomllib.loads(text), None
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        tables, problem = {}, error
    if not tables.keys() & SECTIONS.keys() and (what := trainer_of(text, own_names())):
        if "sd-scripts" in what:
            raise WrongRequest(
                f"{path} is {what}; fluxq kohya takes it as it is, with --config_file or --dataset_config"
            )
        if "ai-toolkit" in what or "ComfyUI" in what:
            raise WrongRequest(f"{path} is {what}; fluxq import {path} writes a TOML file with its settings")
        raise WrongRequest(
            f"{path} is {what}; write its settings into a TOML file by fluxq's names, which fluxq settings --names "
            "lists beside those of other trainers"
        )
    if problem:
        raise WrongRequest(f"{path} is not valid TOML: {problem}") from problem
    return current_names(tables, str(path))


def set_values(values: dict[str, Any], assignments: tuple[str, ...]) -> None:
    """Put `--set section.key=value` assignments into `values`. A value that is not valid TOML is plain text."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *sections, key = FORMER_KEYS.get(path.strip(), path.strip()).split(".")
        if not equals or not key:
            raise WrongRequest(f"--set takes SECTION.KEY=VALUE, not {assignment!r}")
        try:
            value = tomllib.loads(f"v = {text.strip()}")["v"]
        except (ValueError, RecursionError):
            value = text.strip()
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise WrongRequest(f"--set {path}: {section} is a value, not a section")
        table[key] = value


def to_toml(config: TrainConfig) -> str:
    """`config` as TOML that reads back to an equal config. Fields that are None are omitted."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        lines.append(f"[{section.name}]")
        found = ((f.name, getattr(values, f.name)) for f in dataclasses.fields(values))
        lines += [f"{name} = {toml_value(value)}" for name, value in found if value is not None]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value of a field of the config in TOML."""
    if dataclasses.is_dataclass(value):
        fields = sorted(dataclasses.fields(value), key=lambda f: f.default is not dataclasses.MISSING)
        pairs = [(f.name, getattr(value, f.name)) for f in fields]
        return "{ " + ", ".join(f"{name} = {toml_value(v)}" for name, v in pairs if v is not None) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")  # the only character that JSON does not escape and TOML forbids
