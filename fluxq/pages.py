"""What is made from the list of settings: a JSON schema for editors, docs/settings.md, and of names.csv
docs/coming-from.md. `fluxq settings` prints them; tests hold the copies in docs/ to that.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from fluxq.config import SECTIONS
from fluxq.config_files import FORMER_KEYS, TYPE_NAMES
from fluxq.names import TRAINERS, table
from fluxq.settings import DEFAULTS, Folder, ImageSettings, kind_of, type_hints

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}


def json_schema() -> dict[str, Any]:
    """What a config file may have, as a JSON schema (draft 7). A value of a kind that `parse` reads is not checked."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A config file of fluxq"}
    sections = {name: _object(cls) for name, cls in SECTIONS.items()}
    for former, current in FORMER_KEYS.items():
        (section, old), new = former.split("."), current.split(".")[1]
        properties = sections[section]["properties"]
        properties[old] = {**properties[new], "description": f"The former name of {new}.", "deprecated": True}
    return schema | {"type": "object", "additionalProperties": False, "properties": sections}


def _object(cls: type) -> dict[str, Any]:
    hints, fields = type_hints(cls), dataclasses.fields(cls)
    return {
        "type": "object",
        "description": str(cls.__doc__).partition("] ")[2],
        "additionalProperties": False,
        "properties": {f.name: _property(hints[f.name], f) for f in fields},
        "required": [f.name for f in fields if f.default is dataclasses.MISSING],
    }


def _property(hint: Any, field: dataclasses.Field) -> dict[str, Any]:
    about, (kind, several) = field.metadata, kind_of(hint)
    made: dict[str, Any] = {"type": TYPES.get(kind, "object")}
    if kind is Folder:
        made = {"anyOf": [{"type": "string"}, _object(Folder)]}
    elif about["parse"]:
        made, several = {"type": ["string", "integer", "number", "array"]}, False
    if about["choices"]:
        made["enum"] = list(about["choices"])
    if about["minimum"] is not None:
        made |= {"minimum": about["minimum"]} | ({} if about["maximum"] == math.inf else {"maximum": about["maximum"]})
    if several:
        made = {"anyOf": [made, {"type": "array", "items": made}]}
    if field.default not in (None, dataclasses.MISSING):
        made["default"] = str(field.default) if kind is Path else field.default
    return made | {"description": about["help"]}


HEAD = """# Settings

Every setting of a run has a key, like `lora.rank`. It is set, from the weakest to the strongest, by its default, by a
TOML file (`--config my.toml`), by its option if it has one (`--rank 8`), or by `--set lora.rank=8`. The file has a
table for each section:

```toml
#:schema ./fluxq.schema.json
[data]
folders = ["photos"]
trigger = "zqx"
[lora]
rank = 8
```

The first line is optional: with it, editors that read TOML's schemas (Even Better TOML in VS Code, taplo) complete and
check keys. `fluxq settings --schema > fluxq.schema.json` writes the schema beside the file; a clone has it as
[settings.schema.json](settings.schema.json), which `configs/` name. Names of other trainers are in
[coming-from.md](coming-from.md), images and captions are explained in [datasets.md](datasets.md).
`fluxq train --help-all` shows all of this in a terminal.
"""


def settings_page() -> str:
    """docs/settings.md"""
    lines = [HEAD]
    for name, cls in {**SECTIONS, "data.folders": Folder}.items():
        shared = {f.name for f in dataclasses.fields(ImageSettings)} if cls is Folder else ()
        title = "[[data.folders]]" if cls is Folder else f"[{name}]"
        more = (
            " It may also have each key of `[data]` from `trigger` to `mask_normalize` for its images."
            if shared
            else ""
        )
        lines += [f"## {title}", "", str(cls.__doc__).partition("] ")[2].partition("\n")[0] + more, ""]
        lines += ["| Key | Option | Values | Default | |", "| --- | --- | --- | --- | --- |"]
        hints = type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name not in shared:
                option = f"`{f.metadata['flag']}`" if f.metadata["flag"] else ""
                cells = (f"`{f.name}`", option, _values(hints[f.name], f), _default(f), f.metadata["help"])
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _values(hint: Any, field: dataclasses.Field) -> str:
    kind, several = kind_of(hint)
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if field.metadata["choices"]:
        word = ", ".join(field.metadata["choices"])
    elif kind is Folder:
        word = "path or table"
    elif parse := field.metadata["parse"]:
        try:
            word = str(parse(object()))
        except ValueError as error:
            word = str(error)
    else:
        word = TYPE_NAMES[kind].removeprefix("a ") + (
            "" if low is None else f", {low:g} or more" if high == math.inf else f", {low:g} to {high:g}"
        )
    return f"list: {word}" if several else word


def _default(field: dataclasses.Field) -> str:
    value = DEFAULTS.get(field.name) if field.default is None else field.default
    if value is None or value in ("", (), dataclasses.MISSING):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


NAMES = """# Coming from another trainer

What sd-scripts (and fluxgym and kohya_ss, which call it), ai-toolkit, OneTrainer, SimpleTuner and diffusers' example
scripts call the settings of fluxq. All settings are in [settings.md](settings.md). If one of these names is in a config
file or on the command line, the error says the name here. [fluxq kohya](kohya.md) takes commands and configs of
sd-scripts, and [fluxq import](import.md) turns jobs of ai-toolkit and workflows of
ComfyUI-FluxTrainer into TOML files.
"""


def names_page() -> str:
    """docs/coming-from.md"""
    lines = [NAMES, f"| fluxq | {' | '.join(TRAINERS)} | |", "| --- " * (len(TRAINERS) + 2) + "|"]
    for row in table():
        names = (", ".join(f"`{name}`" for name in names) for names in row.names)
        lines.append(" | ".join(("| " + (f"`{row.here}`" if row.exists else row.here), *names, row.note)) + " |")
    return "\n".join([*lines, ""])
