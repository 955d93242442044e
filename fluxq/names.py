"""What other trainers call the settings of fluxq, and the setting that a wrong name was meant for.

The table is names.csv, one line per setting: its key in fluxq, or an option, or why there is none ("not for FLUX.1",
"not needed", "not supported"); its names in each of TRAINERS, with the path that nested files have; and a note on
values. The names were read in the sources of these programs in 2026. docs/coming-from.md shows the table. A config file
of these programs is recognized by the names in it.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TRAINERS = ("sd-scripts", "ai-toolkit", "OneTrainer", "SimpleTuner", "diffusers")
ALL = "fluxq train --help-all lists all settings"


@dataclass(frozen=True)
class Meaning:
    """What a name stands for. here: a key like "lora.rank", an option like "--resume", or "not ..."; note: on its
    values, or the reason; names: those in TRAINERS, in that order.
    """

    here: str
    note: str = ""
    names: tuple[tuple[str, ...], ...] = ()

    @property
    def exists(self) -> bool:
        return not self.here.startswith("not ")


@cache
def table() -> tuple[Meaning, ...]:
    with (Path(__file__).parent / "names.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return tuple(Meaning(r["fluxq"], r["note"], tuple(tuple(r[t].split()) for t in TRAINERS)) for r in rows)


def meaning(name: str, own: Mapping[str, str], near: Iterable[str] = ()) -> Meaning | None:
    """What the unknown `name` was meant for, None if nothing is like it.

    own: every name of a setting here -> its key. near: those of them that fit its place best, like its section's.
    """
    name = name.lstrip("-").replace("-", "_").lower()
    near = list(near)
    for row in table():
        if any(name in (known, known.rpartition(".")[2]) for names in row.names for known in names):
            return row
    if name in own:
        return Meaning(own[name])
    close = difflib.get_close_matches(name, near, 1) or difflib.get_close_matches(name, own, 1, cutoff=0.8)
    return Meaning(own.get(close[0], close[0])) if close else None


def trainer_of(text: str, own: Collection[str]) -> str | None:
    """What `text`, a config file of another trainer, is: known by two of its names in JSON, YAML or TOML, not `own`."""
    if '"class_type"' in text or ('"nodes"' in text and '"links"' in text):
        return "a workflow of ComfyUI"
    found = set(re.findall(r"""(?:^|[{,"'])[ \t-]*+(\w++)["']?[ \t]*+[:=]""", text, re.MULTILINE)) - set(own)
    hits = [
        sum(any(name.rpartition(".")[2] in found for name in row.names[i]) for row in table())
        for i in range(len(TRAINERS))
    ]
    return f"a config of {TRAINERS[hits.index(max(hits))]}" if max(hits) > 1 else None


def unknown(what: str, found: Meaning | None, here: str = "", instead: str = ALL) -> str:
    """The sentence about a setting, like "key 'lora.rnak' in my.toml", that is not known.

    here: what it was meant for, as one has to write it in that place. instead: what to do if that is not known.
    """
    if found is None:
        return f"unknown {what}; {instead}"
    if not found.exists:
        return f"{what.partition(' ')[2]} is {found.here}: {found.note}"
    return f"unknown {what}; did you mean {here}{f' ({found.note})' if found.note else ''}?"
