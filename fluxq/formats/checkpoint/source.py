"""Read one of the four models from any kind of checkpoint: its own file, an all-in-one file, or a folder of shards.

`open_flux`, `open_autoencoder`, `open_clip` and `open_t5` read only headers, compare every name and shape with what the
model must have, and return a `Source`. A `Source` reads one tensor at a time, under the name that the model uses, with
positioned reads of only its bytes. A folder has diffusers' layout: it is the part's folder (`transformer`, `vae`,
`text_encoder`, `text_encoder_2`) or the one above it. diffusers' names are mapped to the original ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.kernels import Weight, dequantize
from fluxq.model.config import AutoEncoderConfig, FluxConfig

from . import detect, keys, sizes
from .detect import AUTOENCODER, CLIP, DIFFUSERS_FLUX, DIFFUSERS_OTHER, EXAMPLES, FLUX, T5
from .files import printable, refuse
from .keys import RowRange
from .shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from .shards import Shards, locate, read_json
from .stored_tensors import OnRead, Plain, ignore_bytes, joined

BAND = 1 << 24
"""How many weights are decoded at a time: 64 MiB of fp32."""

# Keys next to the text model in OpenCLIP's own files: the image encoder, and values that are not weights of the model.
OPENCLIP_IGNORED = re.compile(
    r"visual\.|logit_(scale|bias)$|text_projection$|attn_mask$|(input_resolution|context_length|vocab_size)$"
)

Config = TypeVar("Config")


class Source(Generic[Config]):
    """The tensors of one model.

    config     what the model is built from
    path       the file, or the index of its shards
    files      all files with tensors
    diffusers  whether the files have diffusers' layout
    shapes     name -> shape, with the model's names, always in the original layout
    sizes      name -> stored bytes, without scales and the like
    precision  how most weights are stored, as text: "bf16", "fp8 e4m3, scaled", "nf4", "Q4_K"
    bits       bits per weight of that storage
    alone      whether the files hold none of the other three models
    """

    def __init__(
        self,
        shards: Shards,
        config: Config,
        pieces: Mapping[str, tuple[RowRange, ...]],
        shapes: sizes.Shapes,
        diffusers: bool = False,
    ) -> None:
        self.config, self.path, self.files, self.diffusers = config, shards.path, shards.files, diffusers
        self.shapes: dict[str, tuple[int, ...]] = {name: shapes[name] for name in pieces}
        self.alone = len(detect.models_in(shards.shapes)) == 1
        self._tensors, self._pieces = shards.tensors, pieces
        self.sizes = {name: sum(map(self._size, parts)) for name, parts in pieces.items()}
        weights: Counter[tuple[str, float]] = Counter()
        for name, parts in pieces.items():
            stored = self._tensors[parts[0].key]
            weights[stored.kind, stored.bits] += math.prod(self.shapes[name])
        ((self.precision, self.bits),) = (most for most, _ in weights.most_common(1))

    def get(self, name: str, rows: range | None = None, on_read: OnRead = ignore_bytes) -> Weight:
        """A copy of the tensor as it is stored, or of only its `rows`.

        Formats with a container in fluxq keep their exact bytes, all others become fp32. `on_read` is called with all
        bytes as they are read.
        """
        shape = self.shapes[name]
        rows = range((*shape, 1)[0]) if rows is None else rows
        parts, start = [], 0
        for key, first, count in self._pieces[name]:
            own = range(max(rows.start - start, 0), min(rows.stop - start, count))
            if own:
                parts.append(self._tensors[key].rows(range(first + own.start, first + own.stop), on_read))
            start += count
        whole = joined(parts)
        return whole.reshape(len(rows), *shape[1:]) if isinstance(whole, Tensor) and shape else whole

    def is_plain(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the tensor is stored unchanged, in one piece of this dtype, so that `read_into` can read it."""
        (key, _, rows), *more = self._pieces[name]
        stored = self._tensors[key]
        return isinstance(stored, Plain) and stored.dtype == dtype and not more and rows == (*stored.shape, 1)[0]

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, flat uint8 of the tensor's length, with the bytes of a plain tensor (see `is_plain`)."""
        stored = self._tensors[self._pieces[name][0].key]
        assert isinstance(stored, Plain)
        stored.file.read_into(stored.key, out)

    def bands(self, name: str) -> Iterator[range]:
        """The tensor's rows in ranges of about `BAND` weights, to be decoded one at a time."""
        rows, *others = (*self.shapes[name], 1)
        step = max(1, BAND // math.prod(others))
        return (range(start, min(start + step, rows)) for start in range(0, rows, step))

    def value(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The decoded tensor, in `dtype` on `device`. The stored bytes are copied there and then decoded."""
        bands = list(self.bands(name))
        if len(bands) == 1:
            return dequantize(self.get(name).to(device), dtype)
        whole = torch.empty(self.shapes[name], dtype=dtype, device=device)
        for rows in bands:
            whole[rows.start : rows.stop] = dequantize(self.get(name, rows).to(device), dtype)
        return whole

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """`value` of a matrix, only the rows `indices`; nothing else is read. The tensor must be in one piece."""
        (piece,) = self._pieces[name]
        weight = self._tensors[piece.key].rows([piece.first + i for i in indices])
        return dequantize(weight.to(device), dtype)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def _size(self, piece: RowRange) -> int:
        stored = self._tensors[piece.key]
        return stored.nbytes * piece.rows // max((*stored.shape, 1)[0], 1)


def open_flux(path: str | Path) -> Source[FluxConfig]:
    """The transformer at `path`. Raises WrongRequest unless it is a complete, plain FLUX.1 dev or schnell."""
    shards = Shards(locate(path, FLUX))
    if "fluxq" in shards.metadata:
        what = "is already quantized by fluxq"
        refuse(shards.path, what, "pass it with --flux, and with the --format that it was made with")
    if detect.kind(shards.shapes) != DIFFUSERS_FLUX:
        names = sizes.flux_keys(shards.shapes, shards.path)
        shards.require_readable(names.values())
        config = sizes.flux_config(shards.shapes, shards.path)
        return _whole(shards, config, names, flux_shapes(config))
    settings = _settings(shards, "FluxTransformer2DModel", FLUX)
    shards.require_readable(shards.shapes)
    config = sizes.flux_sizes(keys.flux_original_names(shards.shapes), shards.path)
    if axes := settings.get("axes_dims_rope"):
        config = _with_axes(config, axes, shards.path)
    sizes.compare(shards.shapes, keys.flux_diffusers_shapes(config), FLUX, shards.path)
    return Source(shards, config, keys.flux_pieces(config), flux_shapes(config), diffusers=True)


def open_autoencoder(path: str | Path) -> Source[AutoEncoderConfig]:
    """The autoencoder at `path`. Raises WrongRequest unless it is a complete FLUX.1 autoencoder."""
    shards = Shards(locate(path, AUTOENCODER))
    if detect.kind(shards.shapes) != DIFFUSERS_OTHER or "decoder.conv_in.weight" not in shards.shapes:
        names = sizes.autoencoder_keys(shards.shapes, shards.path)
        shards.require_readable(names.values())
        config = sizes.autoencoder_config(shards.shapes, shards.path)
        return _whole(shards, config, names, autoencoder_shapes(config))
    settings = _settings(shards, "AutoencoderKL", AUTOENCODER)
    shards.require_readable(shards.shapes)
    config = sizes.autoencoder_sizes(keys.autoencoder_original_names(shards.shapes), shards.path)
    if isinstance(groups := settings.get("norm_num_groups"), int):
        if groups < 1 or config.ch % groups:
            what = f"has norm_num_groups {printable(str(groups))}, which does not divide {config.ch} channels"
            refuse(shards.path.parent / "config.json", what, "download it again")
        config = replace(config, groups=groups)
    for ours, theirs in (("scale_factor", "scaling_factor"), ("shift_factor", "shift_factor")):
        if settings.get(theirs, getattr(config, ours)) != getattr(config, ours):
            what = f"belongs to another model's autoencoder ({theirs} {settings[theirs]}, not {getattr(config, ours)})"
            refuse(shards.path.parent / "config.json", what, "use FLUX.1's autoencoder")
    sizes.compare(shards.shapes, keys.autoencoder_diffusers_shapes(config), AUTOENCODER, shards.path)
    names = keys.autoencoder_diffusers_names(config)
    return _whole(shards, config, names, autoencoder_shapes(config), diffusers=True)


def open_clip(path: str | Path) -> Source[dict[str, Any]]:
    """The CLIP text model at `path`, with transformers 5's names; config is `sizes.clip_config`.

    Raises WrongRequest unless it is a complete CLIP text model.
    """
    shards = Shards(locate(path, CLIP))
    if detect.kind(shards.shapes) != detect.OPENCLIP:
        return _open_text(shards, CLIP, sizes.clip_keys, sizes.clip_config, clip_shapes)
    pieces = keys.openclip_pieces(shards.shapes)
    used = {piece.key for parts in pieces.values() for piece in parts}
    shards.require_readable(used)
    own = {name: (piece.rows, *shards.shapes[piece.key][1:]) for name, (piece,) in pieces.items()}
    own |= {key: shape for key, shape in shards.shapes.items() if key not in used and not OPENCLIP_IGNORED.match(key)}
    config = sizes.clip_config(own, shards.path)
    sizes.compare(own, clip_shapes(config), CLIP, shards.path)
    return Source(shards, config, pieces, clip_shapes(config))


def open_t5(path: str | Path) -> Source[dict[str, Any]]:
    """The T5 encoder at `path`, its embedding once, as `shared.weight`; config is `sizes.t5_config`.

    Raises WrongRequest unless it is a complete T5 encoder.
    """
    return _open_text(Shards(locate(path, T5)), T5, sizes.t5_keys, sizes.t5_config, t5_shapes)


OPENERS = {FLUX: open_flux, AUTOENCODER: open_autoencoder, CLIP: open_clip, T5: open_t5}


# --- helpers ---


def _whole(
    shards: Shards, config: Config, names: Mapping[str, str], shapes: sizes.Shapes, diffusers: bool = False
) -> Source[Config]:
    """A source in which every tensor is exactly one tensor of the files."""
    pieces = {name: (RowRange(key, 0, (*shards.shapes[key], 1)[0]),) for name, key in names.items()}
    return Source(shards, config, pieces, shapes, diffusers)


def _open_text(shards: Shards, wanted: str, keys_of: Any, config_of: Any, shapes_of: Any) -> Source[dict[str, Any]]:
    names: dict[str, str] = keys_of(shards.shapes, shards.path)
    shards.require_readable(names.values())
    config = config_of(shards.shapes, shards.path)
    sizes.compare({name: shards.shapes[key] for name, key in names.items()}, shapes_of(config), wanted, shards.path)
    return _whole(shards, config, names, shapes_of(config))


def _settings(shards: Shards, wanted: str, what: str) -> dict[str, Any]:
    """The config.json next to diffusers' files, or {}. Raises WrongRequest if it is for another class."""
    path = shards.path.parent / "config.json"
    if not path.is_file():
        return {}
    settings = read_json(path)
    if settings.get("quantization_config") and (method := _method(settings["quantization_config"])) != "bitsandbytes":
        problem = f"describes {what} quantized by {method}, which fluxq does not read"
        refuse(path, problem, f"use {EXAMPLES[what]}, or the folder of a 16-bit model")
    if (actual := settings.get("_class_name", wanted)) != wanted:
        refuse(path, f"is for the class {printable(str(actual))}, not {wanted}", f"use {EXAMPLES[what]}")
    return settings


def _method(quantized: Any) -> str:
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    return printable(method) if isinstance(method, str) else "an unknown method"


def _with_axes(config: FluxConfig, axes: Any, path: Path) -> FluxConfig:
    try:
        return replace(config, axes_dim=tuple(map(int, axes)))
    except (TypeError, ValueError, OverflowError) as error:
        what = f"has axes_dims_rope {printable(str(axes))}, which does not fit heads of width {config.head_dim}"
        raise WrongRequest(f"{path.parent / 'config.json'} {what}; download it again") from error
