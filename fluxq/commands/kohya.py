"""`fluxq kohya`: what flux_train_network.py is asked, read, and done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxq.compat.kohya.command import PROGRAM, read_command
from fluxq.compat.kohya.mapping import read_options
from fluxq.compat.kohya.scripts import script_command
from fluxq.config import TrainConfig
from fluxq.config_files import to_toml
from fluxq.console import console, silent
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.models.parts import Models
from fluxq.train import Result, train


def kohya_command(
    arguments: Sequence[str],
    lint: bool = False,
    script: Path | None = None,
    write_config: Path | None = None,
    places: Sequence[str] = (),
    overwrite: bool = False,
) -> Result | dict[str, Any]:
    """Train as the arguments of flux_train_network.py say, after those in `script`.

    lint: only say what becomes of them. write_config: only write the config. places: OLD=NEW, how paths begin. Raises
    WrongRequest for what is refused.
    """
    argv = [*(script_command(script, PROGRAM) if script else ()), *arguments]
    if not argv:
        raise WrongRequest(f"give the arguments of {PROGRAM}, or a script that has them with --script FILE")
    pairs = [place.partition("=") for place in places]
    if wrong := [old for old, equals, _ in pairs if not (old and equals)]:
        raise WrongRequest(f"--map takes OLD=NEW, not {wrong[0]!r}")
    read = read_options(read_command(argv), [(old, new) for old, _, new in pairs])
    for line in read.lines:
        console.print(line)
    if lint:
        return {"lines": read.lines, "refused": read.refused}
    if read.config is None:
        raise WrongRequest(read.refused)
    config = with_blocks_there_are(read.config)
    if write_config is None:
        return train(config, overwrite=overwrite)
    with atomic_path(write_config) as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8", errors="surrogateescape")
    console.print(f"wrote {write_config}; train with: fluxq train --config {write_config}")
    return {"lines": read.lines, "config": str(write_config)}


def with_blocks_there_are(config: TrainConfig) -> TrainConfig:
    """`config` with at most as many blocks to swap as the transformer has: nano has three."""
    if not config.memory.blocks_to_swap:
        return config
    flux = Models(config.model, notify=silent).flux_config
    blocks = min(config.memory.blocks_to_swap, flux.depth + flux.depth_single_blocks // 2)
    if blocks < config.memory.blocks_to_swap:
        console.print(f"--blocks_to_swap {config.memory.blocks_to_swap}: this transformer has only {blocks}")
    return replace(config, memory=replace(config.memory, blocks_to_swap=blocks))
