"""Finds the file for each part of a run's model.

It looks in this order: the path given for the part, by its option or the config; `models`, which is a folder, an
all-in-one file or a hub id; the environment variable FLUXQ_MODELS. A path that exists is a path; otherwise owner/name
is a hub id.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxq import nano
from fluxq.config import ModelConfig
from fluxq.console import Notify
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.detect import AUTOENCODER, CLIP, FLUX, T5
from fluxq.formats.checkpoint.shards import locate

from .candidates import Candidates, choose, choose_flux, search
from .hub import from_hub, hub_cache, hub_id, in_hub_cache

PARTS = {"flux": FLUX, "ae": AUTOENCODER, "clip_l": CLIP, "t5xxl": T5}
FLAGS = {"flux": "--flux", "ae": "--ae", "clip_l": "--clip-l", "t5xxl": "--t5xxl"}
NANO = {"flux": nano.FLUX, "ae": nano.AE, "clip_l": nano.CLIP_L, "t5xxl": nano.T5XXL}
ENVIRONMENT = "FLUXQ_MODELS"


@dataclass(frozen=True)
class Served:
    """The file, or the index of shards, that serves a part, and why."""

    path: Path
    why: str


class Finder:
    """Finds the files for `config`; a folder is searched only once.

    With `fetch` false nothing is downloaded from the hub; NotFetched is raised instead.
    """

    def __init__(self, config: ModelConfig, notify: Notify, fetch: bool) -> None:
        self.config, self._notify, self._fetch = config, notify, fetch

    def find(self, part: str, format: str, misfit: Callable[[str, Any], str | None]) -> Served:
        """The file for `part`, a key of PARTS.

        format: the transformer's; misfit: see Models.misfit. Raises WrongRequest if there is no file, or several
        equally good ones.
        """
        if self.config.name == "nano":
            return Served(NANO[part], "the bundled toy")
        named: Path | None = getattr(self.config, part)
        if named is not None:
            if repository := hub_id(named):
                return self._from_hub(repository, part)
            return Served(locate(named, PARTS[part]), f"given by {FLAGS[part]} or the config")
        place = self._place
        if place is None:
            missing = [flag for name, flag in FLAGS.items() if getattr(self.config, name) is None]
            raise WrongRequest(
                f"no {', '.join(missing)} was given; pass --models FOLDER (or set {ENVIRONMENT}), name the files, or "
                "try the toy model with --model nano"
            )
        if repository := hub_id(place):
            return self._from_hub(repository, part)
        served = self._choose(part, place, format, misfit)
        self._notify(f"{FLAGS[part].lstrip('-')}: {served.path} ({served.why})")
        return served

    def _from_hub(self, repository: str, part: str) -> Served:
        if self.config.offline and in_hub_cache(repository, PARTS[part]) is None:
            raise WrongRequest(
                f"{PARTS[part]} of {repository} is not in the hub's cache ({hub_cache()}), and --offline forbids "
                f"downloading it; copy its files from a machine that has them and name them with {FLAGS[part]}, or "
                "start once without --offline"
            )
        path = from_hub(repository, PARTS[part], self._notify, self._fetch)
        return Served(path, f"from the hub's {repository}")

    @property
    def _place(self) -> Path | None:
        """Where to look for parts without a path of their own."""
        environment = os.environ.get(ENVIRONMENT)
        return self.config.models or (Path(environment).expanduser() if environment else None)

    @cached_property
    def _candidates(self) -> Candidates:
        assert self._place is not None, "read only if there is a place to search"
        return search(self._place)

    def _choose(self, part: str, place: Path, format: str, misfit: Callable[[str, Any], str | None]) -> Served:
        fitting, unusable = [], list(self._candidates.unusable)
        for source in self._candidates.sources[PARTS[part]]:
            if part != "flux" and (reason := misfit(part, source.config)):
                unusable.append(f"{source.path} {reason}")
            else:
                fitting.append(source)
        try:
            if part == "flux":
                chosen = choose_flux(self._candidates, format)
            else:
                chosen = choose(fitting, PARTS[part], place) if fitting else None
        except WrongRequest as error:
            raise WrongRequest(f"{error} with {FLAGS[part]}") from error
        if chosen is None:
            skipped = f"; skipped: {' | '.join(unusable[:3])}" if unusable else ""
            raise WrongRequest(f"{place} holds no {PARTS[part].split(' ', 1)[1]}; name it with {FLAGS[part]}{skipped}")
        return Served(*chosen)
