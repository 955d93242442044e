"""`fluxq init`: five answers, from the command line or a terminal, become a commented TOML file to train with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from fluxq.config import PRESET_NAMES
from fluxq.config_files import config_from_dict, read_toml
from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.training.presets import LEARNING_RATE, LEARNING_RATE_REASON, PRESETS, STRENGTH

QUESTIONS = {
    "folder": "The folder of images",
    "preset": "What the LoRA teaches",
    "trigger": "The word that will call it in prompts, ideally a made-up one",
    "models": "The models: a folder of ComfyUI, Forge or diffusers, a hub id, or nano for the bundled toy",
    "out": "The folder for the LoRA, the log and what --resume needs",
}
FLAGS = {"folder": "FOLDER", "preset": "--preset", "trigger": "--trigger", "models": "--models"}


def init_command(given: dict[str, str | None], file: Path, overwrite: bool) -> dict[str, str]:
    """Write `file` from the answers that are `given` and those that the terminal gives. Returns how to train with it.

    Raises WrongRequest if an answer is missing and nobody can be asked, for a folder that does not exist, and for a
    file that exists unless `overwrite` or the terminal allows it.
    """
    given = {name: given[name] or (name == "models" and os.environ.get("FLUXQ_MODELS")) or None for name in QUESTIONS}
    missing = [flag for name, flag in FLAGS.items() if given[name] is None]
    if missing and not is_terminal():
        raise WrongRequest(f"questions need a terminal; without one, give {', '.join(missing)}")
    answers: dict[str, str] = {}
    for name, question in QUESTIONS.items():
        answers[name] = given[name] or (_ask(name, question, answers) if missing else _default(name, answers))
    folder = Path(answers["folder"]).expanduser()
    if not folder.is_dir():
        raise WrongRequest(f"{folder} is not a folder; name the folder of images")
    if file.exists() and not overwrite:
        if not is_terminal():
            raise WrongRequest(f"{file} exists; name another --file, or replace it with --overwrite")
        click.confirm(f"{file} exists. Replace it?", abort=True, err=True)
    with atomic_path(file) as temporary:
        text = toml(str(folder.resolve()), *(answers[name] for name in ("preset", "trigger", "models", "out")))
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        config_from_dict(read_toml(temporary), str(file))
    train = f"fluxq train --config {file}"
    console.print(f"{file} is written; change in it what you like. Then: fluxq check --config {file}; {train}")
    return {"file": str(file), "train": train}


def is_terminal() -> bool:
    return sys.stdin.isatty()


def _ask(name: str, question: str, answers: dict[str, str]) -> str:
    kind = {"preset": click.Choice(PRESET_NAMES), "folder": click.Path(exists=True, file_okay=False)}.get(name)
    return click.prompt(question, default=_default(name, answers) or None, type=kind, err=True)


def _default(name: str, answers: dict[str, str]) -> str:
    return f"runs/{answers['trigger']}" if name == "out" else ""


def toml(folder: str, preset: str, trigger: str, models: str, out: str) -> str:
    """The file: what is answered, and what the preset sets, each with its reason."""
    chosen, is_nano = PRESETS[preset], models == "nano"
    set_by_preset = {choice.key: choice for choice in chosen.choices}
    images = ""
    if chosen.images is not None:
        least, most = chosen.images
        images = f"  # guides advise {least} {f'to {most}' if most else 'or more'}"

    def line(key: str, unit: str = "") -> str:
        choice = set_by_preset[key]
        return f"{key.split('.')[1]} = {_quoted(choice.value)}  # {unit}{choice.reason}"

    resolution = "# resolution: nano has its own" if is_nano else line("data.resolution", "pixels; ")
    return "\n".join(
        [
            f"# For {chosen.teaches}. Train with: fluxq train --config THIS_FILE",
            "# What is not set here has a default (fluxq train --help); options override what is set here.",
            "",
            "[model]",
            f"name = {_quoted(models)}  # the bundled toy" if is_nano else f"models = {_quoted(models)}",
            "",
            "[data]",
            f"folders = [{{ path = {_quoted(folder)}, trigger = {_quoted(trigger)} }}]{images}",
            resolution,
            line("data.caption_dropout", "the share of steps without a caption; "),
            "",
            "[lora]",
            line("lora.rank"),
            "",
            "[training]",
            f"preset = {_quoted(preset)}  # sets what is not set here, as it is here",
            f"steps = {chosen.seen}  # optimizer steps, of one image each; {chosen.why}",
            f"learning_rate = {LEARNING_RATE}  # {LEARNING_RATE_REASON}",
            line("training.timesteps"),
            "",
            "[samples]",
            f"prompts = [{_quoted(trigger)}]  # one image each while it trains",
            "every = 250  # steps between previews; 0: none",
            "",
            "[output]",
            f"{'# ' if out == _default('out', {'trigger': trigger}) else ''}out = {_quoted(out)}",
            "save_every = 250  # steps between saves: an earlier LoRA may be the best",
            "",
            f"# When it is done, try the LoRA at a strength of about {STRENGTH}.",
            "",
        ]
    )


def _quoted(value: Any) -> str:
    """`value` in TOML. DEL is the only character that JSON does not escape and TOML forbids."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
