"""One of the four models, wherever its tensors lie: a file of its own, an all-in-one file, a folder of shards.

`open_flux`, `open_autoencoder`, `open_clip` and `open_t5` read headers only, hold every name and shape against what the
model must have, and give a `Source`, which then reads one tensor at a time, under the name that the model uses, by
positioned reads of just its bytes. A folder is diffusers' layout: the part's own (`transformer`, `vae`, `text_encoder`,
`text_encoder_2`) or the one above it. diffusers' names are mapped back to the original ones.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fluxq.errors import WrongRequest
from fluxq.formats import detect, keys
from fluxq.formats.detect import AUTOENCODER, CLIP, DIFFUSERS_FLUX, DIFFUSERS_OTHER, EXAMPLES, FLUX, T5
from fluxq.formats.files import DTYPE_NAMES, Checkpoint, listed, printable, refuse
from fluxq.formats.keys import Piece
from fluxq.formats.shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from fluxq.model.config import AutoEncoderConfig, FluxConfig

FOLDERS = {FLUX: "transformer", AUTOENCODER: "vae", CLIP: "text_encoder", T5: "text_encoder_2"}
PRECISIONS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8 e4m3",
    torch.float8_e5m2: "fp8 e5m2",
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # of a file's stem
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")

# Comfy's scaled fp8, in its two spellings: scales of weights, and what says nothing about a weight's value.
SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
BESIDE_SCALES = re.compile(r"(.+\.)?(scale_input|input_scale|comfy_quant|scaled_fp8)")

Config = TypeVar("Config")


class Source(Generic[Config]):
    """The tensors of one model. `config` is what the model is built from; `path` the file, or the index of its shards.

    files are all files that tensors lie in; shapes and dtypes are by the names that the model uses, in the original
    layout whatever the files' is, which `diffusers` says; `alone`, that the files hold no other of the four models.
    """

    def __init__(
        self,
        shards: Shards,
        config: Config,
        pieces: Mapping[str, tuple[Piece, ...]],
        shapes: detect.Shapes,
        diffusers: bool = False,
        scales: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.path, self.files = config, shards.path, shards.files
        self.shapes: dict[str, tuple[int, ...]] = {name: shapes[name] for name in pieces}
        self.dtypes = {name: _common_dtype(shards, parts) for name, parts in pieces.items()}
        self.alone = len(detect.meant(shards.shapes)) == 1
        self.diffusers = diffusers
        self._shards, self._pieces, self._scales = shards, pieces, scales or {}
        _refuse_dtypes(self)

    def get(self, name: str) -> Tensor:
        """The tensor as it is stored, fp8 as fp8, in memory of its own; for its value see `scale`."""
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return self._shards.get(pieces[0].key).reshape(self.shapes[name])
        result, row = torch.empty(self.shapes[name], dtype=self.dtypes[name]), 0
        for key, first, rows in pieces:
            result[row : row + rows] = self._shards.get(key, first, first + rows)
            row += rows
        return result

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, flat uint8 of the tensor's length, with the bytes of `get(name)`."""
        if len(pieces := self._pieces[name]) == 1:
            self._shards.read_into(pieces[0].key, out)
        else:
            out.copy_(self.get(name).view(-1).view(torch.uint8))

    def scale(self, name: str) -> Tensor | None:
        """What `get(name)` is to be multiplied by: fp32, () or (rows, 1); None for 1, which every plain file has."""
        if name not in self._scales:
            return None
        scale = self._shards.get(self._scales[name]).float()
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)

    def value(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """What the tensor stands for, in `dtype` on `device`: it travels as it is stored, and is scaled in fp32."""
        tensor, scale = self.get(name).to(device), self.scale(name)
        return tensor.to(dtype) if scale is None else tensor.float().mul_(scale.to(device)).to(dtype)

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """`value` of a matrix at the rows `indices` alone; nothing else is read. The tensor must lie in one piece."""
        (piece,) = self._pieces[name]
        tensor, scale = self._shards.rows(piece.key, [piece.first + i for i in indices]).to(device), self.scale(name)
        if scale is None:
            return tensor.to(dtype)
        return tensor.float().mul_((scale[indices] if scale.ndim else scale).to(device)).to(dtype)

    @cached_property
    def nbytes(self) -> int:
        """Of all tensors as they are stored, scales left out."""
        return sum(_numel(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    @property
    def precision(self) -> str:
        """How most of the weights are stored, for people: "bf16", "fp8 e4m3", "fp8 e4m3, scaled"."""
        return PRECISIONS[self.dtype] + (", scaled" if self._scales else "")

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which most of the weights are stored."""
        counts: Counter[torch.dtype] = Counter()
        for name, shape in self.shapes.items():
            counts[self.dtypes[name]] += _numel(shape)
        return counts.most_common(1)[0][0]


def open_flux(path: str | Path) -> Source[FluxConfig]:
    """The transformer at `path`. Raises WrongRequest for everything that is no whole, plain FLUX.1 dev or schnell."""
    path = locate(path, FLUX)
    if path.suffix != ".json" and "fluxq" in Checkpoint(path).metadata:
        refuse(path, "is quantised by fluxq already", "give it by --flux, with the --format that it was made with")
    shards = Shards(path)
    if detect.kind(shards.shapes) != DIFFUSERS_FLUX:
        config = detect.flux_config(shards.shapes, shards.path)
        return _plain(shards, config, detect.flux_keys(shards.shapes, shards.path), flux_shapes(config))
    settings = _settings(shards, "FluxTransformer2DModel", FLUX)
    config = detect.flux_sizes(keys.flux_telling(shards.shapes), shards.path)
    if axes := settings.get("axes_dims_rope"):
        config = _with_axes(config, axes, shards.path)
    detect.compare(shards.shapes, keys.flux_diffusers_shapes(config), FLUX, shards.path)
    return Source(shards, config, keys.flux_pieces(config), flux_shapes(config), diffusers=True)


def open_autoencoder(path: str | Path) -> Source[AutoEncoderConfig]:
    """The autoencoder at `path`. Raises WrongRequest for everything that is no whole FLUX.1 autoencoder."""
    shards = Shards(locate(path, AUTOENCODER))
    if detect.kind(shards.shapes) != DIFFUSERS_OTHER or "decoder.conv_in.weight" not in shards.shapes:
        config = detect.autoencoder_config(shards.shapes, shards.path)
        names = detect.autoencoder_keys(shards.shapes, shards.path)
        return _plain(shards, config, names, autoencoder_shapes(config))
    settings = _settings(shards, "AutoencoderKL", AUTOENCODER)
    config = detect.autoencoder_sizes(keys.autoencoder_telling(shards.shapes), shards.path)
    if isinstance(groups := settings.get("norm_num_groups"), int):
        config = replace(config, groups=groups)
    for ours, theirs in (("scale_factor", "scaling_factor"), ("shift_factor", "shift_factor")):
        if settings.get(theirs, getattr(config, ours)) != getattr(config, ours):
            what = f"is the autoencoder of another model ({theirs} {settings[theirs]}, not {getattr(config, ours)})"
            refuse(shards.path.parent / "config.json", what, "give FLUX.1's")
    detect.compare(shards.shapes, keys.autoencoder_diffusers_shapes(config), AUTOENCODER, shards.path)
    names = keys.autoencoder_diffusers_names(config)
    return _plain(shards, config, names, autoencoder_shapes(config), diffusers=True)


def open_clip(path: str | Path) -> Source[dict[str, Any]]:
    """The CLIP text model at `path`, under transformers 5's names; config is `detect.clip_config`. Raises
    WrongRequest.
    """
    return _open_text(path, CLIP, detect.clip_keys, detect.clip_config, clip_shapes)


def open_t5(path: str | Path) -> Source[dict[str, Any]]:
    """The T5 encoder at `path`, its embedding once, as `shared.weight`; config is `detect.t5_config`. Raises
    WrongRequest.
    """
    return _open_text(path, T5, detect.t5_keys, detect.t5_config, t5_shapes)


OPENERS = {FLUX: open_flux, AUTOENCODER: open_autoencoder, CLIP: open_clip, T5: open_t5}


# --- where the tensors lie ---


class Shards:
    """One checkpoint in one file or in several, whose index `path` then is. shapes are by the files' own keys.

    Raises WrongRequest for a missing shard, and for shards that hold other keys than the index says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() != ".json":
            checkpoint = Checkpoint(path)
            self._owners = dict.fromkeys(checkpoint.keys(), checkpoint)
        else:
            self._owners = _sharded(path)
        self.files = tuple(dict.fromkeys(owner.path for owner in self._owners.values())) or (path,)
        self.shapes = {key: owner.shape(key) for key, owner in self._owners.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self._owners[key].dtype(key)

    def get(self, key: str, begin: int = 0, end: int | None = None) -> Tensor:
        return self._owners[key].get(key, begin, end)

    def read_into(self, key: str, out: Tensor) -> None:
        self._owners[key].read_into(key, out)

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        return self._owners[key].rows(key, indices)


def locate(path: str | Path, wanted: str) -> Path:
    """The file, or the index of shards, that holds the model `wanted` at `path`, which may be a folder.

    Raises WrongRequest if a folder holds none or several, and for one shard in the place of all.
    """
    path = Path(path)
    if not path.is_dir():
        if SHARD.search(path.stem) and path.is_file():
            refuse(path, "is one shard of several", f"give its folder, {path.parent}")
        return path
    inner = path / FOLDERS[wanted]
    folder = inner if inner.is_dir() else path
    found = units(folder)
    fitting = found if len(found) == 1 else [unit for unit in found if _means(unit, wanted)]
    if len(fitting) > 1:
        what = f"holds {wanted} in {' and in '.join(unit.name for unit in fitting)}"
        refuse(folder, what, "name the one to use")
    if not fitting and any(SHARD.search(file.stem) for file in folder.glob("*.safetensors")):
        refuse(folder, "holds shards but no .safetensors.index.json, which lists them", "download it again")
    if not fitting:
        refuse(folder, f"holds no .safetensors file with {wanted}", f"give {EXAMPLES[wanted]}")
    return fitting[0]


def units(folder: Path) -> list[Path]:
    """The checkpoints that lie directly in `folder`: every index of shards, and every file that is no shard; sorted."""
    try:
        files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        refuse(folder, f"cannot be read ({error.strerror})", "check its permissions")
    return sorted(path for path in files if _is_unit(path))


def _is_unit(path: Path) -> bool:
    name = path.name.lower()
    return INDEX.search(name) is not None or (name.endswith(".safetensors") and not SHARD.search(path.stem))


def meant(unit: Path) -> list[str]:
    """Which of the four models a file or an index means to hold. Raises WrongRequest where it is damaged."""
    return detect.meant(_weight_map(unit) if unit.suffix == ".json" else Checkpoint(unit).keys())


def _means(unit: Path, wanted: str) -> bool:
    try:
        return wanted in meant(unit)
    except WrongRequest:
        return False


def _sharded(index: Path) -> dict[str, Checkpoint]:
    """Key -> the shard that holds it."""
    listing = _weight_map(index)
    shards = {}
    for name in dict.fromkeys(listing.values()):
        if not (index.parent / name).is_file():
            refuse(index, f"lists {printable(name)}, which is not there", "download that shard too")
        shards[name] = Checkpoint(index.parent / name)
    missing = [f"{printable(key)} in {name}" for key, name in listing.items() if key not in shards[name].shapes]
    unexpected = [
        f"{printable(key)} in {name}"
        for name, shard in shards.items()
        for key in shard.keys()
        if listing.get(key) != name
    ]
    if missing or unexpected:
        what = f"and its shards disagree: {listed(missing=missing, unlisted=unexpected)}"
        refuse(index, what, "download index and shards again, from one place")
    return {key: shards[name] for key, name in listing.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> name of its shard, as the index says."""
    listing = _json(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        refuse(index, "has no weight_map, which says what lies in which shard", "download it again")
    for name in listing.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            refuse(index, f"lists {printable(str(name))}, which is no .safetensors file beside it", "download it again")
    return listing


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        refuse(path, "does not exist", "check the path")
    except OSError as error:
        refuse(path, f"cannot be read ({error.strerror})", "check its permissions")
    except (ValueError, RecursionError) as error:
        refuse(path, f"is no valid JSON ({printable(str(error))})", "download it again")
    if not isinstance(content, dict):
        refuse(path, f"is a JSON {type(content).__name__}, not an object", "download it again")
    return content


# --- what they are ---


def _plain(
    shards: Shards,
    config: Config,
    names: Mapping[str, str],
    shapes: detect.Shapes,
    diffusers: bool = False,
    scales: Mapping[str, str] | None = None,
) -> Source[Config]:
    """A source each of whose tensors is one tensor of the files."""
    pieces = {name: (Piece(key, 0, (*shards.shapes[key], 1)[0]),) for name, key in names.items()}
    return Source(shards, config, pieces, shapes, diffusers, scales)


def _open_text(path: str | Path, wanted: str, keys_of: Any, config_of: Any, shapes_of: Any) -> Source[dict[str, Any]]:
    """A text encoder, whose fp8 weights may have scales."""
    shards = Shards(locate(path, wanted))
    scales = {f"{match[1]}.weight": key for key in shards.shapes if (match := SCALE.fullmatch(key))}
    plain = {
        key: shape
        for key, shape in shards.shapes.items()
        if not SCALE.fullmatch(key) and not BESIDE_SCALES.fullmatch(key)
    }
    names: dict[str, str] = keys_of(plain, shards.path)
    config = config_of(plain, shards.path)
    detect.compare({name: plain[key] for name, key in names.items()}, shapes_of(config), wanted, shards.path)
    marked = tuple(key.removesuffix("scaled_fp8") for key in shards.shapes if key.endswith("scaled_fp8"))
    if not (scales.keys() & set(names.values()) or any(key.startswith(marked) for key in names.values())):
        return _plain(shards, config, names, shapes_of(config))
    checked = _checked_scales(shards, names, scales)
    return _plain(shards, config, names, shapes_of(config), scales=checked)


def _checked_scales(shards: Shards, names: Mapping[str, str], scales: Mapping[str, str]) -> dict[str, str]:
    """Name -> the key of its scale, one for every fp8 tensor. Raises WrongRequest where they do not fit."""
    found = {name: scales[key] for name, key in names.items() if key in scales}
    missing = [key for name, key in names.items() if shards.dtype(key) in FP8 and name not in found]
    orphans = [scale for key, scale in scales.items() if key not in shards.shapes]
    wrong = []
    for name, scale in found.items():
        of, shape, dtype = shards.shapes[names[name]], shards.shapes[scale], shards.dtype(scale)
        if shape not in ((), (1,), (1, 1), of[:1], (*of[:1], 1)) or dtype in FP8 or dtype not in PRECISIONS:
            wrong.append(f"{scale} of {of} is {shape} {DTYPE_NAMES[dtype]}")
    if problems := listed(without_a_scale=missing, scale_without_its_weight=orphans, wrong_scale=wrong):
        what = f"has fp8 weights whose scales, one number a matrix or a row, do not fit: {problems}"
        refuse(shards.path, what, "download it again, or give a 16-bit version")
    return found


def _settings(shards: Shards, wanted: str, what: str) -> dict[str, Any]:
    """The config.json beside diffusers' files, {} without one. Raises WrongRequest where it is of another class."""
    path = shards.path.parent / "config.json"
    if not path.is_file():
        return {}
    settings = _json(path)
    if "quantization_config" in settings:
        refuse(path, f"says that {what} was quantised", f"give {EXAMPLES[what]}, or the folder of a 16-bit model")
    if (found := settings.get("_class_name", wanted)) != wanted:
        refuse(path, f"is of the class {printable(str(found))}, not {wanted}", f"give {EXAMPLES[what]}")
    return settings


def _with_axes(config: FluxConfig, axes: Any, path: Path) -> FluxConfig:
    try:
        return replace(config, axes_dim=tuple(map(int, axes)))
    except (TypeError, ValueError) as error:
        what = f"has axes_dims_rope {printable(str(axes))} where heads are {config.head_dim} wide"
        raise WrongRequest(f"{path.parent / 'config.json'} {what}; download it again") from error


def _common_dtype(shards: Shards, pieces: Iterable[Piece]) -> torch.dtype:
    """The dtype of all pieces, else fp32, which holds any two of them."""
    dtypes = {shards.dtype(piece.key) for piece in pieces}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _refuse_dtypes(source: Source) -> None:
    for name, dtype in source.dtypes.items():
        if dtype not in PRECISIONS:
            refuse(
                source.path, f"stores {name} as {DTYPE_NAMES[dtype]}", "give a version in 8- to 32-bit floating point"
            )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
