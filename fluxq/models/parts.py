"""The four models of a run: which file serves which part and why, and loading each when it is needed.

A part is found, in this order: where its option or the config says; below `models`, a folder, an all-in-one file or a
hub id; below the environment's FLUXQ_MODELS. A path that exists is a path; else owner/name is a hub id.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fluxq import nano
from fluxq.config import ModelConfig, file_and_strength
from fluxq.console import byte_bar
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.detect import AUTOENCODER, CLIP, FLUX, T5
from fluxq.formats.checkpoint.shards import locate
from fluxq.formats.checkpoint.sizes import variant
from fluxq.formats.checkpoint.source import OPENERS, Source
from fluxq.formats.load import load_autoencoder, load_clip, load_flux, load_text_encoders
from fluxq.formats.lora.algebra import combined
from fluxq.formats.lora.base import MergedSource, lora_hashes
from fluxq.formats.lora.read import load_lora
from fluxq.formats.quantized import (
    QuantizedFile,
    cache_folder,
    cached,
    cached_path,
    fingerprint,
    is_quantized,
    load_quantized,
    require_disk_space,
    stored_bytes,
)
from fluxq.formats.stream import load_streamed
from fluxq.formats.tokenizers import Kind, find_tokenizers
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.clip import Clip
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.text import TextEncoders

from .find import Found, choose, choose_flux, search
from .hub import NotFetched, from_hub, hub_id
from .tuning import use_tuned

PARTS = {"flux": FLUX, "ae": AUTOENCODER, "clip_l": CLIP, "t5xxl": T5}
FLAGS = {"flux": "--flux", "ae": "--ae", "clip_l": "--clip-l", "t5xxl": "--t5xxl"}
NANO = {"flux": nano.FLUX, "ae": nano.AE, "clip_l": nano.CLIP_L, "t5xxl": nano.T5XXL}
ENCODERS = {"ae": "z_channels", "clip_l": "hidden_size", "t5xxl": "d_model"}  # and what must fit the transformer
ENVIRONMENT = "FLUXQ_MODELS"
TOKENIZERS = ("clip_tokenizer", "t5_tokenizer")
LEANEST = "nf4"
T5_LENGTHS = {"dev": 512, "schnell": 256}


@dataclass(frozen=True)
class Served:
    """The file, or the index of shards, that serves a part, and why it does."""

    path: Path
    why: str


class Models:
    """What `config` names, on `device`. Files are looked up when they are asked for; nothing is kept once loaded.

    A format that `config` leaves open is that of the transformer's file, if it is quantized, else the leanest until
    `use_format` is told another.

    With `fetch` false nothing is fetched from the hub: `hub.NotFetched` is raised in its place.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | None = None,
        notify: Callable[[str], None] = print,
        fetch: bool = True,
    ) -> None:
        self.config, self.format, self.format_is_open = config, config.format or LEANEST, config.format is None
        self._notify, self._fetch = notify, fetch
        self._served: dict[str, Served] = {}
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_nano = config.name == "nano"
        if self.is_nano and (given := [FLAGS[part] for part in FLAGS if getattr(config, part)]):
            raise WrongRequest(f"--model nano brings its own files; leave out {', '.join(given)}, or --model nano")

    def served(self, part: str) -> Served:
        """What serves `part`, a key of PARTS. Raises WrongRequest where nothing does, or several files alike."""
        if part not in self._served:
            self._served[part] = self._find(part)
        return self._served[part]

    def open(self, part: str) -> Source[Any]:
        """The part's tensors, of which only the header has been read. Raises WrongRequest where they do not fit it."""
        return OPENERS[PARTS[part]](self.served(part).path)

    def files(self, part: str) -> tuple[Path, ...]:
        """All files that the part's tensors lie in, whether they are there (any more) or not."""
        path = self.served(part).path
        return self.open(part).files if path.suffix == ".json" else (path,)

    def resolved(self) -> ModelConfig:
        """The config with every part named by its absolute path, as a run that is resumed elsewhere needs it, and
        with the `format` and `compute` in use.
        """
        base_loras = tuple(f"{path.absolute()}={strength!r}" for path, strength in self.base_loras)
        config = replace(self.config, format=self.format, compute=self.compute, base_loras=base_loras)
        if self.is_nano:
            return config
        named = {part: self.served(part).path for part in PARTS}
        named |= {key: path for key in TOKENIZERS if (path := getattr(self.config, key))}
        return replace(config, models=None, **{key: path.absolute() for key, path in named.items()})

    @cached_property
    def compute(self) -> str:
        """How frozen weights are multiplied on this device: as asked, or what stands in where it has no fp8."""
        asked, capability = self.config.compute, None
        if self.device.type == "cuda" and asked.startswith("fp8"):
            capability = torch.cuda.get_device_capability(self.device)
        if capability is None or capability >= (8, 9):
            return asked
        instead = asked.replace("fp8", "int8")
        self._notify(
            f"compute {instead}: sm_{capability[0]}{capability[1]} has no fp8 arithmetic; 8 bits there are int8"
        )
        return instead

    @property
    def flux_file(self) -> Path:
        return self.served("flux").path

    @property
    def clip_l_file(self) -> Path:
        return self.served("clip_l").path

    @property
    def t5xxl_file(self) -> Path:
        return self.served("t5xxl").path

    def tokenizer_files(
        self, known: Callable[[Path], bool] = Path.is_file
    ) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The files of CLIP's and of T5's tokenizer, as `find_tokenizers` finds them from the text encoders' folders.

        A file that is gone counts as found where `known` says so. Raises WrongRequest where one is nowhere.
        """
        clip, t5 = self.config.clip_tokenizer, self.config.t5_tokenizer
        fetch = None if self._fetch else _not_fetched
        return find_tokenizers((self.clip_l_file, self.t5xxl_file), clip, t5, known, self._notify, fetch)

    @cached_property
    def flux_config(self) -> FluxConfig:
        """The transformer's sizes, read from its file's header."""
        return self.quantized.config if self.quantized else self.open("flux").config

    def check(self) -> None:
        """Read the headers of all files: WrongRequest where one is not what it should be or does not fit the others.

        Encoder files that are gone are left out: a complete cache does without them.
        """
        for part in PARTS:  # that each has a file, before any is read
            self.served(part)
        _ = self.flux_config
        for part in ENCODERS:
            if self.served(part).path.exists():
                source = self.open(part)
                if misfit := self.misfit(part, source.config):
                    raise WrongRequest(f"{source.path} {misfit}; use one model's files")

        if self.base_loras:
            _ = self._merged(self._notify)
        if not self.is_quantized:
            place = cached_path(self.files("flux"), self.format, self._identity)
            require_disk_space(place, stored_bytes(self.open("flux").shapes, self.format))

    def misfit(self, part: str, config: Any) -> str | None:
        """What is wrong with an encoder of this config in the place of `part`; None if it fits the transformer."""
        flux = self.flux_config
        wanted = {"ae": flux.in_channels // 4, "clip_l": flux.vec_in_dim, "t5xxl": flux.context_in_dim}[part]
        width = config[ENCODERS[part]] if isinstance(config, dict) else getattr(config, ENCODERS[part])
        return None if width == wanted else f"gives vectors of {width} where {self.flux_file} takes {wanted}"

    @property
    def variant(self) -> str:
        """ "dev" or "schnell"."""
        return variant(self.flux_config)

    @property
    def t5_length(self) -> int:
        """T5 tokens a caption."""
        return self.config.t5_length or (nano.T5_LENGTH if self.is_nano else T5_LENGTHS[self.variant])

    def fingerprint(self) -> str:
        """What tells this transformer's file, and what is merged into it, from any other."""
        return fingerprint(self.files("flux"), self._identity)

    @cached_property
    def base_loras(self) -> list[tuple[Path, float]]:
        """What is merged into the transformer, each LoRA at its strength."""
        return [file_and_strength(lora) for lora in self.config.base_loras]

    @cached_property
    def _identity(self) -> str:
        return lora_hashes(self.base_loras)

    def _merged(self, notify: Callable[[str], None] = lambda line: None) -> Source[FluxConfig]:
        """The transformer's tensors with `base_loras` in them. Raises WrongRequest where those do not fit."""
        source = self.open("flux")
        if not self.base_loras:
            return source
        read = [(load_lora(path, source.config), strength) for path, strength in self.base_loras]
        for lora, strength in read:
            clip = [f"its CLIP-L part ({len(lora.clip)} modules) is left out"] if lora.clip else []
            notify(f"{lora.path.name}: {len(lora.adapters)} layers are merged into the transformer at {strength:g}")
            for note in (*lora.notes, *clip):
                notify(f"{lora.path.name}: {note}")
        return MergedSource(source, combined([(lora.adapters, strength) for lora, strength in read]))

    @property
    def is_quantized(self) -> bool:
        """Whether the transformer only has to be read: it was quantized before, or is not to be."""
        if self.format == "bf16" or self.quantized is not None:
            return True
        return cached_path(self.files("flux"), self.format, self._identity).is_file()

    def use_format(self, format: str) -> None:
        """Store the transformer's weights so from now on; perhaps another of the files found serves then."""
        self.format, self.format_is_open = format, False
        self._served.pop("flux", None)
        self.__dict__.pop("quantized", None)

    def has_room_for(self, format: str) -> bool:
        """Whether the transformer is there in `format`, or there is room on the disk to quantize it."""
        place = cached_path(self.files("flux"), format, self._identity)
        if format == "bf16" or place.is_file():
            return True
        try:
            require_disk_space(place, stored_bytes(self.open("flux").shapes, format))
        except WrongRequest:
            return False
        return True

    @property
    def default_resolution(self) -> tuple[int, str]:
        """The training size in pixels where none was asked for, and why."""
        if self.is_nano:
            return nano.SIZE, "the size that nano was made at"
        if self.device.type != "cuda":
            return 512, "no CUDA GPU was found"
        gib = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return (512 if gib < 11.5 else 768), f"the GPU has {gib:.0f} GiB; 512 below 12, 768 from there"

    def load_flux(self, resident: Collection[str] | None = None, slots: int = 0, ahead: bool = True) -> Flux:
        """The transformer as it is stored, multiplying as `compute` says. `resident`: the units that stay on the
        device, the others are streamed through `slots`; None for all. `ahead`: see load_streamed.
        """
        use_tuned(self.device, self._notify)
        if not self.streams:
            if resident is not None:
                raise WrongRequest("weights in bf16 are not streamed yet; choose --format nf4, int8 or fp8")
            flux = load_flux(self._merged(), "bf16", self.device)
        elif resident is None:
            flux = load_quantized(self._stored_flux(), self.device)
        else:
            flux = load_streamed(self._stored_flux(), self.device, resident, slots, notify=self._notify, ahead=ahead)
        flux.set_compute(self.compute)
        return flux

    @property
    def streams(self) -> bool:
        """Whether the transformer's frozen weights can be streamed as they are stored."""
        return self.format != "bf16" or self.quantized is not None

    def place_units(self, flux: Flux, resident: Collection[str], slots: int, ahead: bool) -> None:
        """Have what `load_flux` gave keep these units on the device and stream the others; see there."""
        load_streamed(self._stored_flux(), self.device, resident, slots, notify=self._notify, ahead=ahead, into=flux)

    def _stored_flux(self) -> QuantizedFile:
        """A file of `fluxq quantize` as it is, any other quantized once.

        What was quantized is kept in FLUXQ_CACHE (fluxq/formats/quantized.py), so that the next start only reads it.
        """
        if (own := self.quantized) is not None:
            return own
        source = self.open("flux") if self.is_quantized else self._merged()
        if not self.is_quantized:
            room = stored_bytes(source.shapes, self.format) / 1e9
            self._notify(f"quantizing {source.path.name} to {self.format}, once: {room:.1f} GB in {cache_folder()}")
        with byte_bar("quantizing") as progress:
            return cached(source, self.format, self.device, progress, self._identity)

    @cached_property
    def quantized(self) -> QuantizedFile | None:
        """The transformer's file, if `fluxq quantize` wrote it. Raises WrongRequest if its format is not the one
        wanted.
        """
        path = self.flux_file
        if not is_quantized(path):
            return None
        file = QuantizedFile.open(path)
        if self.format_is_open:
            self.format, self.format_is_open = file.format, False
        if file.format != self.format:
            raise WrongRequest(f"{path} holds {file.format}, not {self.format}; pass --format {file.format}")
        if self.base_loras:
            raise WrongRequest(f"{path} is quantized, so --base-lora cannot be merged into it; give the original file")
        return file

    def load_autoencoder(self, band: int | None = None) -> AutoEncoder:
        """Working on `band` rows at a time (None: on all), unless the user says on how many."""
        return load_autoencoder(self.served("ae").path, self.device).in_bands(self.config.ae_band or band)

    def load_clip(self, dtype: torch.dtype | None = None) -> Clip:
        """CLIP-L as it is trained, all of it on the device; in `dtype`, by default as it trains there."""
        return load_clip(self.clip_l_file, self.tokenizer_files()[0], self.device, dtype)

    def load_text_encoders(self, budget: int | None = None) -> TextEncoders:
        """Within `budget` bytes of the GPU, if any are said."""
        files = self.clip_l_file, self.t5xxl_file, *self.tokenizer_files()
        return load_text_encoders(*files, self.t5_length, self.device, budget=budget)

    def _find(self, part: str) -> Served:
        if self.is_nano:
            return Served(NANO[part], "the bundled toy")
        named: Path | None = getattr(self.config, part)
        if named is not None:
            if repository := hub_id(named):
                return Served(
                    from_hub(repository, PARTS[part], self._notify, self._fetch), f"from the hub's {repository}"
                )
            return Served(locate(named, PARTS[part]), f"named by {FLAGS[part]} or the config")
        place = self._place
        if place is None:
            missing = [flag for name, flag in FLAGS.items() if getattr(self.config, name) is None]
            raise WrongRequest(
                f"no {', '.join(missing)} was given; name the files, or the folder to look for all four in by --models "
                f"or {ENVIRONMENT}, or run the toy by --model nano"
            )
        if repository := hub_id(place):
            return self._from_hub(repository, part)
        served = self._choose(part, place)
        self._notify(f"{FLAGS[part].lstrip('-')}: {served.path} ({served.why})")
        return served

    def _from_hub(self, repository: str, part: str) -> Served:
        path = from_hub(repository, PARTS[part], self._notify, self._fetch)
        return Served(path, f"from the hub's {repository}")

    @property
    def _place(self) -> Path | None:
        """Where parts that are not named are looked for."""
        environment = os.environ.get(ENVIRONMENT)
        return self.config.models or (Path(environment).expanduser() if environment else None)

    @cached_property
    def found(self) -> Found:
        """All that lies where parts are looked for."""
        assert self._place is not None, "asked only where parts are looked for"
        return search(self._place)

    def _choose(self, part: str, place: Path) -> Served:
        fitting, passed_over = [], list(self.found.passed_over)
        for source in self.found.sources[PARTS[part]]:
            if part != "flux" and (misfit := self.misfit(part, source.config)):
                passed_over.append(f"{source.path} {misfit}")
            else:
                fitting.append(source)
        try:
            if part == "flux":
                chosen = choose_flux(self.found, self.format)
            else:
                chosen = choose(fitting, PARTS[part], place) if fitting else None
        except WrongRequest as error:
            raise WrongRequest(f"{error}, by {FLAGS[part]}") from error
        if chosen is None:
            more = f"; passed over: {' | '.join(passed_over[:3])}" if passed_over else ""
            raise WrongRequest(f"{place} holds no {PARTS[part].split(' ', 1)[1]}; name it by {FLAGS[part]}{more}")
        return Served(*chosen)


def _not_fetched(kind: Kind, notify: Callable[[str], None]) -> tuple[Path, ...]:
    raise NotFetched(kind.hub[0][0], list(kind.forms[0]), 2_000_000)
