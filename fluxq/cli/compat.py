"""`fluxq kohya` and `fluxq import`: what other trainers' users have, as they have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import JSON, begin, finish

PLACES = click.option(
    "--map",
    "places",
    multiple=True,
    metavar="OLD=NEW",
    help="Take paths that begin with OLD for paths that begin with NEW, like D:\\data=/data; may be repeated.",
)


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=True)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
@click.option(
    "--lint", is_flag=True, help="Only say what becomes of each option. The exit code is 2 if one is refused."
)
@click.option("--script", type=Path, metavar="FILE", help="Read the command in this .bat, .cmd, .ps1 or .sh file.")
@click.option("--write-config", type=Path, metavar="FILE", help="Only write fluxq's own settings to this TOML file.")
@PLACES
@click.option("--overwrite", is_flag=True, help="Replace the run in --output_dir, if there is one.")
@JSON
@click.pass_context
def kohya(context: click.Context, as_json: bool, **given: Any) -> None:
    """Train as kohya's sd-scripts would.

    ARGUMENTS are those of its flux_train_network.py, also with `accelerate launch ...` in front, and with
    --config_file and --dataset_config as they are.

    Example: fluxq kohya --script train.bat --lint
    """
    begin(as_json, computes=not (given["lint"] or given["write_config"]))
    from fluxq.commands.kohya import kohya_command

    answer = kohya_command(**given)
    finish(answer, as_json)
    context.exit(2 if given["lint"] and isinstance(answer, dict) and answer["refused"] else 0)


@click.command("import")
@click.argument("file", type=Path)
@click.option("--out", type=Path, metavar="FILE", help="The TOML file to write; default: FILE with .toml.")
@click.option("--lint", is_flag=True, help="Only say what becomes of each key. The exit code is 2 if one is refused.")
@PLACES
@click.option("--overwrite", is_flag=True, help="Replace the TOML file, if there is one.")
@JSON
@click.pass_context
def import_(context: click.Context, as_json: bool, **given: Any) -> None:
    """Turn a config of another trainer into one of fluxq.

    FILE is a job of ai-toolkit, in YAML or JSON, or a workflow of ComfyUI-FluxTrainer. Each setting that is written has
    a comment that says where it comes from.

    Example: fluxq import my_lora.yaml --map 'D:\\data=/data'
    """
    begin(as_json, computes=False)
    from fluxq.commands.import_config import import_command

    answer = import_command(**given)
    finish(answer, as_json)
    context.exit(2 if answer.get("refused") else 0)
