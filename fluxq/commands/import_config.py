"""`fluxq import`: another trainer's file becomes a commented TOML file of fluxq's settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxq.compat.ai_toolkit import read_job
from fluxq.compat.flux_trainer import read_workflow
from fluxq.compat.kohya.texts import parsed, read_text
from fluxq.compat.yaml_text import parsed_yaml
from fluxq.config import own_names
from fluxq.console import console
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.names import trainer_of


def import_command(
    file: Path, out: Path | None = None, lint: bool = False, places: Sequence[str] = (), overwrite: bool = False
) -> dict[str, Any]:
    """Write `out`, by default FILE with .toml, from another trainer's `file`; print what becomes of each of its keys.

    lint: only print that. places: OLD=NEW, how paths begin. Raises WrongRequest for what cannot be imported.
    """
    pairs = [place.partition("=") for place in places]
    if wrong := [old for old, equals, _ in pairs if not (old and equals)]:
        raise WrongRequest(f"--map takes OLD=NEW, not {wrong[0]!r}")
    text = read_text(file)
    is_json = text.lstrip()[:1] in ("{", "[")
    document = parsed(text, str(file), "json") if is_json else parsed_yaml(text, str(file))
    maps = [(old, new) for old, _, new in pairs]
    if isinstance(document, dict) and trainer_of(text, own_names()) == "a workflow of ComfyUI":
        job = read_workflow(document, maps)
    elif isinstance(document, dict) and "config" in document:
        job = read_job(document, maps)
    else:
        what = trainer_of(text, own_names()) or "of a program that fluxq does not know"
        raise WrongRequest(f"{file} is {what}; fluxq import reads jobs of ai-toolkit and workflows of FluxTrainer")
    refused = job.refusals()
    for line in (*job.lines, *(f"refused: {text}" for text in refused)):
        console.print(line)
    if lint:
        return {"lines": job.lines, "refused": refused}
    if refused:
        raise WrongRequest("; ".join(refused))
    out = out or file.with_suffix(".toml")
    if out.exists() and not overwrite:
        raise WrongRequest(f"{out} exists; name another --out, or replace it with --overwrite")
    toml = job.toml(file.name)
    with atomic_path(out) as temporary:
        temporary.write_text(toml, encoding="utf-8", errors="surrogateescape")
    console.print(f"wrote {out}; train with: fluxq train --config {out}")
    return {"lines": job.lines, "config": str(out)}
