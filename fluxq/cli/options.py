"""Command-line options made from the config's fields, and what every command starts and ends with."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fluxq.config import SECTIONS, TrainConfig, own_names
from fluxq.config_files import FORMER_KEYS, config_from_dict, read_toml, set_values
from fluxq.errors import WrongRequest
from fluxq.names import meaning, unknown
from fluxq.settings import kind_of, type_hints

from .help import HELP_ALL, explained

JSON = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result as one line of JSON on stdout; everything else goes to stderr.",
)


def options(*sections: str, renamed: dict[str, str] | None = None, helps: dict[str, str] | None = None) -> Callable:
    """The command-line options of these sections of the config, and --config and --set for their other keys.

    renamed: option -> its name in this command, "" to leave it out. helps: option -> its help where this command does
    something else with it than training.
    """

    def decorate(command: Any) -> Any:
        command.sections, command.unused = sections, set()
        command = click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Set any key of the config file, like lora.targets=attention; may be repeated.",
        )(command)
        command = HELP_ALL(command)
        command = click.option(
            "--config",
            "config_file",
            type=Path,
            metavar="FILE",
            help="Read settings from this TOML file; options and --set override it.",
        )(command)
        for section in reversed(sections):
            hints = type_hints(SECTIONS[section])
            for field in reversed(dataclasses.fields(SECTIONS[section])):
                flag = field.metadata.get("flag") or ""
                help = (helps or {}).get(flag) or field.metadata["help"]
                key, flag = f"{section}.{field.name}", (renamed or {}).get(flag, flag)
                if flag:
                    command = _option(flag, key, field, hints[field.name], help)(command)
                elif field.metadata["flag"]:
                    command.unused.add(key)
        return command

    return decorate


def _option(flag: str, key: str, field: dataclasses.Field, hint: Any, help: str) -> Callable:
    """One click option for a config field. It is None if not given, so that the config file or the default counts."""
    (kind, several), name = kind_of(hint), key.replace(".", "__")
    choices, help = field.metadata["choices"], explained(field, help)
    if kind is bool:
        return click.option(flag, name, is_flag=True, default=None, help=help)
    kind = str if field.metadata["parse"] else kind
    metavar = None if choices else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
    allowed = click.Choice(choices) if choices else kind
    return click.option(flag, name, type=allowed, metavar=metavar, multiple=several, help=help)


def unknown_option(error: click.NoSuchOption) -> str:
    """The sentence about an option that the command does not have, with the option or the key that it was meant for."""
    context = typing.cast(click.Context, error.ctx)
    options = {p.name or "": p.opts[0] for p in context.command.params}
    flags = {flag.lstrip("-").replace("-", "_"): flag for flag in options.values()}
    sections = {name.partition("__")[0] for name in options if "__" in name}
    found, here = meaning(error.option_name, own_names() | flags, flags), ""
    if found and found.here.startswith("-"):
        here = found.here if found.here in options.values() else ""
    elif found and found.exists:
        section, _, name = found.here.rpartition(".")
        here = options.get(f"{section}__{name}", "")
        if section == "data.folders" and "data" in sections:
            here = f"{name} in [[data.folders]] of a file for --config"
        elif not here and section in sections:
            here = f"--set {found.here}=VALUE"
        elif not sections:
            here = next(
                (flags[other] for other, key in own_names().items() if key == found.here and other in flags), ""
            )
    if found and found.exists and not here:
        found = None  # a setting that this command does not have
    return unknown(f"option {error.option_name}", found, here, f"{context.command_path} --help lists all")


def config_option(key: str, help: str, name: str = "", without: str = "", **more: Any) -> Callable:
    """An option that accepts the same values as the config's `key`, like "model.format", except the choice `without`.

    name: the function's argument, by default the field's name. more: passed to click.
    """
    section, _, field = key.partition(".")
    allowed = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == field).metadata
    if allowed["choices"]:
        kind: click.ParamType = click.Choice([choice for choice in allowed["choices"] if choice != without])
    else:
        kind = click.IntRange(allowed["minimum"], None if allowed["maximum"] == math.inf else allowed["maximum"])
    shown = more.get("default") is not None
    return click.option(allowed["flag"], name or field, type=kind, show_default=shown, help=help, **more)


def read_config(
    config_file: Path | None, assignments: tuple[str, ...], given: dict[str, Any], base: Path | None = None
) -> TrainConfig:
    """The config: defaults, overridden by `base` (the config of a run to resume) or the preset, the file, options and
    --set.
    """
    values: dict[str, Any] = read_toml(base) if base else {}
    config_from_dict(values, str(base))
    if config_file:
        source = str(config_file)
        for section, table in read_toml(config_file).items():
            old = values.get(section)
            values[section] = {**old, **table} if isinstance(old, dict) and isinstance(table, dict) else table
        config_from_dict(values, source)
    for key, value in given.items():
        section, _, name = key.partition("__")
        if value is not None and value != ():
            table = values.setdefault(section, {})
            table[name] = value
    set_values(values, assignments)
    config = config_from_dict(values, "the command line")
    if config.training.preset is None or base:  # a run that resumes has all that its preset set
        return config
    from fluxq.training.presets import fill

    fill(values)
    return config_from_dict(values, "the command line")


def folder_settings(folders: tuple[Path, ...], *files: Path | None) -> list[dict[str, Any]]:
    """`folders` as [data] has them. One that a config in `files` has by that name keeps its settings.

    Raises WrongRequest for a config file in place of a folder.
    """
    for path in folders:
        if path.suffix.lower() in (".toml", ".json", ".yaml", ".yml") and path.is_file():
            read_toml(path)
            raise WrongRequest(f"{path} is a file of settings, not a folder of images; pass it with --config {path}")
    known: dict[str, dict[str, Any]] = {}
    for file in filter(None, files):
        for folder in config_from_dict(read_toml(file), str(file)).data.folders:
            settings = {key: value for key, value in dataclasses.asdict(folder).items() if value is not None}
            known[folder.path.resolve().name] = settings
    return [{**known.get(folder.resolve().name, {}), "path": str(folder)} for folder in folders]


def asked_for(config_file: Path | None, assignments: tuple[str, ...], given: dict[str, Any]) -> set[str]:
    """The keys, like "output.keep", that the user has set. Of a file, [samples] is left out, which is for two commands,
    and what is set to its default, as in files that fluxq writes.
    """
    keys = {key.replace("__", ".") for key, value in given.items() if value is not None and value != ()}
    for path in (assignment.partition("=")[0].strip() for assignment in assignments):
        keys.add(FORMER_KEYS.get(path, path))
    if config_file is not None:
        tables, default = read_toml(config_file), TrainConfig()
        config = config_from_dict(tables, str(config_file))
        for section, table in tables.items():
            values = [getattr(one, section) for one in (config, default)]
            set_here = (key for key in table if getattr(values[0], key) != getattr(values[1], key))
            keys |= {f"{section}.{key}" for key in set_here if section != "samples"}
    return keys


def begin(as_json: bool, computes: bool = True) -> None:
    """Print notes about this machine on stderr. With --json, everything meant for people goes to stderr.

    Raises WrongRequest if the command `computes` and the GPU cannot be used.
    """
    from fluxq.console import console
    from fluxq.memory.machine import notes, obstacle, read_machine

    console.stderr = as_json
    machine = read_machine()
    for note in notes(machine):
        click.echo(f"note: {note}", err=True)
    if computes and (problem := obstacle(machine)):
        raise WrongRequest(problem)


def finish(result: Any, as_json: bool) -> None:
    """With --json, print the command's result as one line."""
    if as_json:
        click.echo(json.dumps(result if isinstance(result, dict) else dataclasses.asdict(result)))
