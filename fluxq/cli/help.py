"""--help of the commands that take settings: in groups, what matters first; --help-all also has what no option sets."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from textwrap import TextWrapper
from typing import Any

import click

from fluxq.config import keys
from fluxq.settings import ImageSettings

TITLES = {
    "model": "Model",
    "data": "Images",
    "data.folders": "One folder of images, a table [[data.folders]], which may have all of data from trigger on",
    "lora": "LoRA",
    "training": "Training",
    "memory": "Memory",
    "samples": "Previews",
    "output": "Output",
    "": "This command",
}
SHARED = {f"data.folders.{f.name}" for f in dataclasses.fields(ImageSettings)}


def explained(field: dataclasses.Field, help: str = "") -> str:
    """The help text of a setting, or `help`, with its default."""
    unset = field.default is False or field.default in (None, "", (), dataclasses.MISSING)
    return (help or field.metadata["help"]) + ("" if unset else f"  [default: {field.default}]")


class SettingsCommand(click.Command):
    """A command whose options are settings: those of `sections`, without what it has no use for (`unused`).

    first: the options that its --help explains, if not all.
    """

    def __init__(self, *args: Any, first: tuple[str, ...] = (), **more: Any) -> None:
        super().__init__(*args, **more)
        self.first, self.sections = first, getattr(self.callback, "sections", ())
        self.unused = SHARED | getattr(self.callback, "unused", set())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = TITLES if "training" in self.sections else TITLES | {"samples": "Sampling"}
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)  # title -> (what to write, help)
        short: dict[str, list[str]] = defaultdict(list)  # title -> options
        records = {}  # option or key -> (what to write, help)
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                section, _, name = option.name.rpartition("__")
                title = titles[section] if section in self.sections else TITLES[""]
                records[f"{section}.{name}"] = records[option.opts[0]] = record
                groups[title].append(record)
                short[title].append(option.opts[-1])
        if ctx.meta.get("fluxq.all"):
            formatter.write_paragraph()
            formatter.write_text("Names like lora.rank are keys of the file that --config names, and of --set.")
            own = groups.pop(TITLES[""])
            groups.clear()
            for key, field in keys().items():
                section = key.rpartition(".")[0]
                if section.partition(".")[0] in self.sections and key not in self.unused:
                    flag, help = records.get(key, (key.removeprefix("data.folders."), ""))
                    groups[titles[section]].append((flag, f"{help}  [{key}]" if help else explained(field)))
            groups[TITLES[""]] = own
        elif self.first:
            groups = {"What matters most": [records[flag] for flag in self.first]}
            wrapper = TextWrapper(formatter.width - 20, break_on_hyphens=False)
            more = [(title, f"\b\n{wrapper.fill(' '.join(short[title]))}") for title in titles.values() if short[title]]
            groups["All options (--help-all explains them, and all other settings)"] = more
        for title in (title for title in (*titles.values(), *groups) if title in groups):
            with formatter.section(title):
                formatter.write_dl(groups.pop(title), col_max=30 if ctx.meta.get("fluxq.all") else 20)


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["fluxq.all"] = True
        click.echo(ctx.get_help())
        ctx.exit()


HELP_ALL = click.option(
    "--help-all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_all,
    help="Show all options and all keys of a file for --config, and exit.",
)
