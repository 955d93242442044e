"""The four models of a run: checking that their files fit together, and loading each model when it is needed.

fluxq/models/finder.py finds the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fluxq import nano
from fluxq.config import ModelConfig
from fluxq.config_files import file_and_strength
from fluxq.console import Notify, byte_bar, silent, working
from fluxq.errors import WrongRequest
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
from fluxq.formats.tokenizers import Kind, find_tokenizers, load_clip_tokenizer, load_t5_tokenizer
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.clip import Clip
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.text import TextEncoders, clip_tokens

from .finder import FLAGS, PARTS, Finder, Served
from .hub import NotFetched
from .tuning import use_tuned

ENCODER_WIDTHS = {
    "ae": "z_channels",
    "clip_l": "hidden_size",
    "t5xxl": "d_model",
}  # config keys of the widths that must fit
TOKENIZERS = ("clip_tokenizer", "t5_tokenizer")
DEFAULT_FORMAT = "nf4"  # the smallest
T5_LENGTHS = {"dev": 512, "schnell": 256}


class Models:
    """The models of `config`, on `device`. Files are looked up on demand; loaded models are not kept.

    If `config` has no format, it is that of the transformer's file if that is quantized, else the smallest format until
    `use_format` is called.

    With `fetch` false nothing is downloaded from the hub; `hub.NotFetched` is raised instead.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | None = None,
        notify: Notify = print,
        fetch: bool = True,
    ) -> None:
        self.config, self.format, self.format_is_open = config, config.format or DEFAULT_FORMAT, config.format is None
        self._notify, self._fetch = notify, fetch
        self._finder = Finder(config, notify, fetch)
        self._served: dict[str, Served] = {}
        self._text_tokens: int | None = None
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_nano = config.name == "nano"
        if self.is_nano and (given := [FLAGS[part] for part in FLAGS if getattr(config, part)]):
            raise WrongRequest(f"--model nano brings its own files; leave out {', '.join(given)}, or --model nano")

    def served(self, part: str) -> Served:
        """The file for `part`, a key of PARTS. Raises WrongRequest if there is none, or several equally good ones."""
        if part not in self._served:
            self._served[part] = self._finder.find(part, self.format, self.misfit)
        return self._served[part]

    def open(self, part: str) -> Source[Any]:
        """The part's tensors, with only the header read. Raises WrongRequest if they are not a model of this kind."""
        return OPENERS[PARTS[part]](self.served(part).path)

    def files(self, part: str) -> tuple[Path, ...]:
        """All files with the part's tensors, even if they no longer exist."""
        path = self.served(part).path
        return self.open(part).files if path.suffix == ".json" else (path,)

    def resolved(self) -> ModelConfig:
        """The config with an absolute path for every part and the `format` and `compute` in use.

        A run that is resumed from another directory needs it.
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
        """The arithmetic for frozen weights. Raises WrongRequest for fp8 on a GPU that has none."""
        requested, capability = self.config.compute, None
        if self.device.type == "cuda" and requested.startswith("fp8"):
            capability = torch.cuda.get_device_capability(self.device)
        if capability is None or capability >= (8, 9):
            return requested
        raise WrongRequest(
            f"--compute {requested} needs a GPU with fp8 arithmetic, an RTX 40 or newer, and this one "
            f"(sm_{capability[0]}{capability[1]}) has none; pass --compute {requested.replace('fp8', 'int8')}, or bf16 "
            "(a run that was started in fp8 goes on only on such a GPU, or as another run from its LoRA: --from-lora)"
        )

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
        """The files of CLIP's and T5's tokenizers, from `find_tokenizers`, which starts at the text encoders' folders.

        A missing file counts as found if `known` returns true for it. Raises WrongRequest if one is not found.
        """
        clip, t5 = self.config.clip_tokenizer, self.config.t5_tokenizer
        fetch = None if self._fetch else _not_fetched
        near = self.clip_l_file, self.t5xxl_file
        return find_tokenizers(near, clip, t5, known, self._notify, fetch, self.config.offline)

    @cached_property
    def flux_config(self) -> FluxConfig:
        """The transformer's sizes, read from its file's header."""
        return self.quantized.config if self.quantized else self.open("flux").config

    def check(self) -> None:
        """Read the headers of all files. Raises WrongRequest if one is of the wrong kind or does not fit the others.

        Missing encoder files are ignored: with a complete cache they are not needed.
        """
        for part in PARTS:  # look up every file before reading any
            self.served(part)
        _ = self.flux_config
        for part in ENCODER_WIDTHS:
            if self.served(part).path.exists():
                source = self.open(part)
                if misfit := self.misfit(part, source.config):
                    raise WrongRequest(f"{source.path} {misfit}; use one model's files")

        if self.base_loras:
            _ = self._merged(self._notify)
        if not self.is_quantized:
            path = cached_path(self.files("flux"), self.format, self._identity)
            require_disk_space(path, stored_bytes(self.open("flux").shapes, self.format))

    def misfit(self, part: str, config: Any) -> str | None:
        """Why an encoder with this config does not fit the transformer as `part`; None if it does."""
        flux = self.flux_config
        expected = {"ae": flux.in_channels // 4, "clip_l": flux.vec_in_dim, "t5xxl": flux.context_in_dim}[part]
        width = config[ENCODER_WIDTHS[part]] if isinstance(config, dict) else getattr(config, ENCODER_WIDTHS[part])
        return None if width == expected else f"gives vectors of width {width}, but {self.flux_file} takes {expected}"

    @property
    def variant(self) -> str:
        """ "dev" or "schnell"."""
        return variant(self.flux_config)

    @property
    def t5_length(self) -> int:
        """T5 tokens per caption."""
        return self.config.t5_length or (nano.T5_LENGTH if self.is_nano else T5_LENGTHS[self.variant])

    @property
    def text_tokens(self) -> int:
        """The most T5 tokens, padding included, that text has in the transformer."""
        return self._text_tokens or self.t5_length

    def use_captions(self, captions: Iterable[str]) -> int | None:
        """Count tokens: if padding is masked, `text_tokens` are from now on those of the longest of these captions.

        Returns their number; None if padding is not masked or T5's tokenizer is not on this machine.
        """
        with suppress(WrongRequest):  # captions may be cached, and the tokenizer gone
            if self.config.text_mask and self.t5xxl_file.is_file():
                self._text_tokens = max(self.tokens_of(captions), default=None)
        return self._text_tokens

    def tokens_of(self, captions: Iterable[str]) -> list[int]:
        """The T5 tokens of each caption, end token included, at most `t5_length`."""
        tokenize = load_t5_tokenizer(self.tokenizer_files()[1])
        return [min(len(tokenize(caption)) + 1, self.t5_length) for caption in captions]

    def too_long(self, captions: Iterable[str]) -> Iterator[tuple[bool, bool]]:
        """For each caption, whether T5 and whether CLIP cuts it. Raises WrongRequest without their tokenizers."""
        clip, t5 = self.tokenizer_files()
        (tokenize_clip, special), tokenize_t5 = load_clip_tokenizer(clip), load_t5_tokenizer(t5)
        for caption in captions:
            cut_by_clip = clip_tokens([caption], tokenize_clip, special)[2][0]
            yield len(tokenize_t5(caption)) + 1 > self.t5_length, cut_by_clip

    def fingerprint(self) -> str:
        """Identifies the transformer's file and the LoRAs merged into it."""
        return fingerprint(self.files("flux"), self._identity)

    @cached_property
    def base_loras(self) -> list[tuple[Path, float]]:
        """The LoRAs to merge into the transformer, each with its strength."""
        return [file_and_strength(lora) for lora in self.config.base_loras]

    @cached_property
    def _identity(self) -> str:
        return lora_hashes(self.base_loras)

    def _merged(self, notify: Notify = silent) -> Source[FluxConfig]:
        """The transformer's tensors with `base_loras` merged in. Raises WrongRequest if those do not fit."""
        source = self.open("flux")
        if not self.base_loras:
            return source
        loras = [(load_lora(path, source.config), strength) for path, strength in self.base_loras]
        for lora, strength in loras:
            lora.require_transformer()
            clip = [f"its CLIP-L part ({len(lora.clip)} modules) is left out"] if lora.clip else []
            notify(
                f"{lora.path.name}: {len(lora.adapters)} layers, merged into the transformer at strength {strength:g}"
            )
            for note in (*lora.notes, *clip):
                notify(f"{lora.path.name}: {note}")
        return MergedSource(source, combined([(lora.adapters, strength) for lora, strength in loras]))

    def require_original(self) -> None:
        """Raise WrongRequest if the transformer's file was written by `fluxq quantize`."""
        if self.quantized is not None:
            raise WrongRequest(f"{self.flux_file} holds only quantized weights; name the file that it was made from")

    def original(self) -> Source[FluxConfig]:
        """The transformer's weights as its file has them, with `base_loras` merged in."""
        return self._merged()

    @property
    def is_quantized(self) -> bool:
        """Whether the transformer needs no quantizing: it was quantized before, or it stays in bf16."""
        if self.format == "bf16" or self.quantized is not None:
            return True
        return cached_path(self.files("flux"), self.format, self._identity).is_file()

    def use_format(self, format: str) -> None:
        """Use this format for the transformer's weights from now on; this may change which file serves it."""
        self.format, self.format_is_open = format, False
        self._served.pop("flux", None)
        self.__dict__.pop("quantized", None)

    def fits_on_disk(self, format: str) -> bool:
        """Whether the transformer exists in `format`, or the disk has room to quantize it."""
        path = cached_path(self.files("flux"), format, self._identity)
        if format == "bf16" or path.is_file():
            return True
        try:
            require_disk_space(path, stored_bytes(self.open("flux").shapes, format))
        except WrongRequest:
            return False
        return True

    @property
    def default_resolution(self) -> tuple[int, str]:
        """The default training resolution in pixels, and why."""
        if self.is_nano:
            return nano.SIZE, "the size that nano was trained at"
        if self.device.type != "cuda":
            return 512, "no CUDA GPU was found"
        gib = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return (512 if gib < 11.5 else 768), f"the GPU has {gib:.0f} GiB; 512 below 12 GiB, else 768"

    def load_flux(self, resident: Collection[str] | None = None, slots: int = 0, ahead: bool = True) -> Flux:
        """The transformer in its stored format, with the arithmetic of `compute`.

        resident: the units that stay on the device, None for all; slots: for streaming the others; ahead: see
        load_streamed.
        """
        use_tuned(self.device, self._notify)
        if not self.can_stream and resident is not None:
            raise WrongRequest("weights in bf16 are not streamed yet; choose --format nf4, int8 or fp8")
        stored = self._stored_flux() if self.can_stream else None
        with working("loading the transformer"):
            if stored is None:
                flux = load_flux(self._merged(), "bf16", self.device)
            elif resident is None:
                flux = load_quantized(stored, self.device)
            else:
                flux = load_streamed(stored, self.device, resident, slots, notify=self._notify, ahead=ahead)
        flux.set_compute(self.compute)
        return flux

    @property
    def can_stream(self) -> bool:
        """Whether the transformer's frozen weights can be streamed in their stored format."""
        return self.format != "bf16" or self.quantized is not None

    def place_units(self, flux: Flux, resident: Collection[str], slots: int, ahead: bool) -> None:
        """Make `flux`, from `load_flux`, keep these units on the device and stream the others; arguments as there."""
        load_streamed(self._stored_flux(), self.device, resident, slots, notify=self._notify, ahead=ahead, into=flux)

    def _stored_flux(self) -> QuantizedFile:
        """The transformer's quantized file: its own if `fluxq quantize` wrote it, else quantized now, once.

        A newly quantized file is kept in FLUXQ_CACHE (fluxq/formats/quantized.py), so the next start only reads it.
        """
        if (own := self.quantized) is not None:
            return own
        source = self.open("flux") if self.is_quantized else self._merged()
        if not self.is_quantized:
            size_gb = stored_bytes(source.shapes, self.format) / 1e9
            self._notify(f"quantizing {source.path.name} to {self.format}, once: {size_gb:.1f} GB in {cache_folder()}")
        with byte_bar("quantizing") as progress:
            return cached(source, self.format, self.device, progress, self._identity)

    @cached_property
    def quantized(self) -> QuantizedFile | None:
        """The transformer's file if `fluxq quantize` wrote it, else None.

        Raises WrongRequest if its format is not the requested one.
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
        """The autoencoder, working on `band` rows at a time (None: all), unless the config sets the band."""
        with working("loading the autoencoder"):
            return load_autoencoder(self.served("ae").path, self.device).in_bands(self.config.ae_band or band)

    def load_clip(self, dtype: torch.dtype | None = None) -> Clip:
        """CLIP-L for training, completely on the device, in `dtype` (by default the one for training on it)."""
        with working("loading CLIP-L"):
            return load_clip(self.clip_l_file, self.tokenizer_files()[0], self.device, dtype)

    def load_text_encoders(self, budget: int | None = None) -> TextEncoders:
        """The text encoders, within `budget` bytes of GPU memory (None: no limit)."""
        files = self.clip_l_file, self.t5xxl_file, *self.tokenizer_files()
        with working("loading the text encoders"):
            return load_text_encoders(*files, self.t5_length, self.device, budget=budget, masked=self.config.text_mask)


def _not_fetched(kind: Kind, notify: Notify) -> tuple[Path, ...]:
    raise NotFetched(kind.hub[0][0], list(kind.forms[0]), 2_000_000)
