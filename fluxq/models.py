"""The four models of a run: which file serves which part, and loading each when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from fluxq import nano
from fluxq.config import ModelConfig
from fluxq.errors import WrongRequest
from fluxq.formats.detect import autoencoder_config, clip_config, flux_config, t5_config, variant
from fluxq.formats.files import Checkpoint
from fluxq.formats.load import load_autoencoder, load_flux, load_text_encoders
from fluxq.formats.tokenizers import find_tokenizers
from fluxq.model.autoencoder import AutoEncoder
from fluxq.model.config import FluxConfig
from fluxq.model.flux import Flux
from fluxq.model.text import TextEncoders

FLAGS = {"flux": "--flux", "ae": "--ae", "clip_l": "--clip-l", "t5xxl": "--t5xxl"}
T5_LENGTHS = {"dev": 512, "schnell": 256}


class Models:
    """What `config` names, on `device`. Files are looked up when they are asked for; nothing is kept once loaded."""

    def __init__(
        self, config: ModelConfig, device: torch.device | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.config, self._say = config, say
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_nano = config.name == "nano"

    @property
    def flux_file(self) -> Path:
        return nano.FLUX if self.is_nano else self._named("flux")

    @property
    def ae_file(self) -> Path:
        return nano.AE if self.is_nano else self._named("ae")

    @property
    def clip_l_file(self) -> Path:
        return nano.CLIP_L if self.is_nano else self._named("clip_l")

    @property
    def t5xxl_file(self) -> Path:
        return nano.T5XXL if self.is_nano else self._named("t5xxl")

    def tokenizer_files(
        self, known: Callable[[Path], bool] = Path.is_file
    ) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The files of CLIP's and of T5's tokenizer, as `find_tokenizers` finds them from the text encoders' folders.

        A file that is gone counts as found where `known` says so. Raises WrongRequest where one is nowhere.
        """
        clip, t5 = self.config.clip_tokenizer, self.config.t5_tokenizer
        return find_tokenizers((self.clip_l_file, self.t5xxl_file), clip, t5, known, self._say)

    @cached_property
    def flux_config(self) -> FluxConfig:
        """The transformer's sizes, read from its file's header."""
        return flux_config(Checkpoint(self.flux_file).shapes, self.flux_file)

    def check(self) -> None:
        """Read the headers of all files: WrongRequest where one is not what it should be or does not fit the others.

        Encoder files that are gone are left out: a complete cache does without them.
        """
        flux = self.flux_config
        parts = (
            (self.ae_file, autoencoder_config, "z_channels", flux.in_channels // 4),
            (self.clip_l_file, clip_config, "hidden_size", flux.vec_in_dim),
            (self.t5xxl_file, t5_config, "d_model", flux.context_in_dim),
        )
        for path, config_of, field, wanted in parts:
            if path.is_file():
                found = config_of(Checkpoint(path).shapes, path)
                width = found[field] if isinstance(found, dict) else getattr(found, field)
                if width != wanted:
                    raise WrongRequest(
                        f"{path} gives vectors of {width} where {self.flux_file} takes {wanted}; use one model's files"
                    )

    @property
    def variant(self) -> str:
        """ "dev" or "schnell"."""
        return variant(self.flux_config)

    @property
    def t5_length(self) -> int:
        """T5 tokens a caption."""
        return self.config.t5_length or (nano.T5_LENGTH if self.is_nano else T5_LENGTHS[self.variant])

    @property
    def default_size(self) -> tuple[int, str]:
        """The training size in pixels where none was asked for, and why."""
        if self.is_nano:
            return nano.SIZE, "the size that nano was made at"
        if self.device.type != "cuda":
            return 512, "no CUDA card was found"
        gib = torch.cuda.get_device_properties(self.device).total_memory / 2**30
        return (512 if gib < 11.5 else 768), f"the card has {gib:.0f} GiB; 512 below 12, 768 from there"

    def load_flux(self) -> Flux:
        return load_flux(self.flux_file, self.config.format, self.device)

    def load_autoencoder(self) -> AutoEncoder:
        return load_autoencoder(self.ae_file, self.device)

    def load_text_encoders(self) -> TextEncoders:
        files = self.clip_l_file, self.t5xxl_file, *self.tokenizer_files()
        return load_text_encoders(*files, self.t5_length, self.device)

    def _named(self, part: str) -> Path:
        missing = [flag for name, flag in FLAGS.items() if getattr(self.config, name) is None]
        if missing:
            raise WrongRequest(
                f"no {', '.join(missing)} was given; name all four model files, or run the toy by --model nano"
            )
        return getattr(self.config, part)
