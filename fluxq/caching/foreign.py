"""Other trainers' caches of an image and its caption: where they are, whether they fit, and their tensors.

sd-scripts (library/strategy_flux.py) writes next to 07.png

    07_1024x0768_flux.npz     latents_96x128 (16, 96, 128) fp32, latents_flipped_, original_size_, crop_ltrb_ and
                              alpha_mask_96x128, in several sizes; older files have no size in these names
    07_flux_te.npz            t5_out (L, 4096), l_pooled (768,), t5_attn_mask (L,), apply_t5_attn_mask

which identify neither the image's bytes nor the caption. ai-toolkit (toolkit/dataloader_mixins.py) writes

    _latent_cache/07_<hash>.safetensors    latent (16, h, w); its metadata has the image's name, scale and crop
    _t_e_cache/07_<hash>.safetensors       text_embed (1, L, 4096), pooled_embed (1, 768)

where the hash is of the metadata or of the caption. Both programs store latents in FLUX's units, as one sample from the
autoencoder's distribution. musubi-tuner's files (_fk.safetensors) are recognized by name and left alone.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fluxq.data.buckets import Size
from fluxq.data.examples import Example
from fluxq.formats.checkpoint.files import Checkpoint, listed, printable, refuse
from fluxq.formats.npz import NpzFile

SD_SCRIPTS, AI_TOOLKIT = "sd-scripts", "ai-toolkit"
LATENTS_FOLDER, TEXT_FOLDER = "_latent_cache", "_t_e_cache"  # ai-toolkit's
FILES = {  # kind -> (subfolder of the image folder, pattern of the file name, whose first group is the image's stem)
    "npz latents": ("", r"(.+)_(\d{4,})x(\d{4,})_flux\.npz"),
    "npz text": ("", r"(.+)_flux_te\.npz"),
    "latents": (LATENTS_FOLDER, r"(.+)_([\w-]{22})\.safetensors"),
    "text": (TEXT_FOLDER, r"(.+)_([\w-]{22})\.safetensors"),
    "musubi": ("", r"(.+)_fk(?:_te)?\.safetensors"),
}
FLUX_SPACE = "flux1"
TEXT_KEYS = ("filename", "latent_space_version")  # in ai-toolkit's metadata; the others are JSON numbers and flags
UNHASHED_KEYS = ("format", "software")
REENCODE = "delete it so that fluxq encodes again"
NOT_MASKED = "was made by a T5 that saw the padding, but with --text-mask it must not"


@dataclass(frozen=True)
class ModelShapes:
    """What the run's transformer takes: latent channels, tokens per caption, widths of T5's and CLIP's vectors, and
    whether the captions' padding is masked.
    """

    channels: int
    t5_length: int
    t5_width: int
    clip_width: int
    masked: bool = False


class ForeignCache(NamedTuple):
    """A cache whose header fits. `read` returns its tensors: latents (C, h, w), perhaps followed by the mirror image's;
    or t5 (L, D), pooled (D2,) and a mask (L,) of the caption's tokens. `read` raises WrongRequest if they are damaged.
    """

    path: Path
    program: str
    verified: bool  # whether it is known to be of exactly this image or caption
    read: Callable[[], list[Tensor]]
    has_mask: bool = False  # an alpha mask, which fluxq ignores


class ForeignCaches:
    """Other programs' caches in one folder of images."""

    def __init__(self, folder: Path, expected: ModelShapes) -> None:
        self.folder, self.expected = folder, expected
        self._files: dict[str, dict[str, list[Path]]] = {kind: {} for kind in FILES}
        for kind, path, match in _listing(folder):
            self._files[kind].setdefault(match[1], []).append(path)

    def count(self, kind: str) -> int:
        """The number of images with a file of `kind`, a key of FILES."""
        return len(self._files[kind])

    def latents(self, example: Example, size: Size, max_pixels: int) -> ForeignCache | None:
        """The largest latents of up to `max_pixels` pixels for the image `example`, whose size is `size`.

        None if no program has any. Raises WrongRequest if the existing ones do not fit.
        """
        stem = example.path.stem
        if paths := self._files["npz latents"].get(stem):
            named = [path for path in paths if _named_size(path) == size]
            if not named:
                what = f"was made from an image of another size, but {example.path.name} has {[*size]} pixels"
                refuse(paths[0], what, REENCODE)
            return self._npz_latents(named[0], example, size, max_pixels)
        paths = [path for path in self._files["latents"].get(stem, ()) if _is_of(path, example.path.name)]
        return self._toolkit_latents(paths, example, size, max_pixels) if paths else None

    def text(self, example: Example, file_caption: str) -> ForeignCache | None:
        """The embeddings of the example's caption; None if no program has any.

        `file_caption` is what sd-scripts encoded: the first line of the example's text file. Raises WrongRequest if
        they do not fit.
        """
        stem = example.path.stem
        if paths := self._files["npz text"].get(stem):
            if file_caption and file_caption != example.caption:
                what = f"was made of {printable(file_caption)!r}, but the caption is {printable(example.caption)!r}"
                how = 'leave the trigger out, or set caption_line = "first", whichever it lacks'
                refuse(paths[0], what, f"{how}, or {REENCODE}")
            return self._npz_text(paths[0])
        hashed = f"{stem}_{_toolkit_hash(_caption_metadata(example.caption))}.safetensors"
        path = next((path for path in self._files["text"].get(stem, ()) if path.name == hashed), None)
        return self._toolkit_text(path) if path else None

    def _npz_latents(self, path: Path, example: Example, size: Size, max_pixels: int) -> ForeignCache:
        npz, sizes = NpzFile(path), {}
        for name, shape in npz.shapes.items():
            if match := re.fullmatch(r"latents(_(\d+)x(\d+))?", name):
                named = (int(match[2]), int(match[3])) if match[1] else shape[1:]
                if len(shape) != 3 or shape != (self.expected.channels, *named):
                    refuse(path, f"has {name} of shape {shape}, not ({self.expected.channels}, h, w)", REENCODE)
                sizes[match[1] or ""] = (8 * shape[2], 8 * shape[1])
        if not sizes:
            refuse(path, f"has no latents: {listed(arrays=[printable(name) for name in npz.shapes])}", REENCODE)
        suffix = _choose_size(path, sizes, example, max_pixels)
        original = f"original_size{suffix}"
        was = npz.get(original).tolist() if npz.shapes.get(original) == (2,) else None
        if was != [*size]:
            what = f"was made from an image of {was or 'unknown size'}, but {example.path.name} has {[*size]} pixels"
            refuse(path, what, REENCODE)
        mirrored = f"latents_flipped{suffix}"
        names = [f"latents{suffix}", *([mirrored] if mirrored in npz.shapes else [])]
        if len({npz.shapes[name] for name in names}) > 1:
            refuse(path, f"has {mirrored} of shape {npz.shapes[mirrored]}, unlike latents{suffix}", REENCODE)
        has_mask = f"alpha_mask{suffix}" in npz.shapes
        return ForeignCache(path, SD_SCRIPTS, False, lambda: [_numbers(path, n, npz.get(n)) for n in names], has_mask)

    def _npz_text(self, path: Path) -> ForeignCache:
        npz, expected = NpzFile(path), self._text_shapes(("t5_out", "l_pooled", "t5_attn_mask"))
        expected |= {"apply_t5_attn_mask": ()}
        _check_shapes(path, {name: npz.shapes.get(name) for name in expected}, expected, self.expected.t5_length)
        masked = bool(npz.get("apply_t5_attn_mask"))
        if masked and not self.expected.masked:
            what = "was made with apply_t5_attn_mask: T5 did not see the padding, but without --text-mask it does"
            refuse(path, what, f"pass --text-mask to train as sd-scripts did, or {REENCODE}")
        if self.expected.masked and not masked:
            refuse(path, NOT_MASKED, f"leave --text-mask out, or {REENCODE}")

        def read() -> list[Tensor]:
            t5, pooled, seen = (_numbers(path, name, npz.get(name)) for name in list(expected)[:3])
            if not masked:
                return [t5, pooled, seen]
            tokens = int(seen.count_nonzero())
            if not tokens or not seen[:tokens].all():
                refuse(path, "has a t5_attn_mask that does not begin with the caption's tokens", REENCODE)
            return [t5[:tokens], pooled, seen]

        return ForeignCache(path, SD_SCRIPTS, False, read)

    def _toolkit_latents(self, paths: list[Path], example: Example, size: Size, max_pixels: int) -> ForeignCache:
        plain: dict[Path, Size] = {}
        mirrored: dict[Size, Path] = {}
        for path in paths:
            file, metadata = Checkpoint(path), _toolkit_metadata(path)
            shape = file.shapes.get("latent", ())
            if metadata.get("latent_space_version") != FLUX_SPACE or {"flip_y", "num_frames"} & metadata.keys():
                continue
            if _toolkit_hash(metadata) != path.stem.rpartition(f"{example.path.stem}_")[2]:
                refuse(path, "has a header that contradicts its name", REENCODE)
            crop, scale = ((metadata.get(f"{a}_width"), metadata.get(f"{a}_height")) for a in ("crop", "scale_to"))
            own = (8 * shape[2], 8 * shape[1]) if len(shape) == 3 and shape[0] == self.expected.channels else None
            if own is None or own != crop:
                refuse(
                    path,
                    f"has latents of shape {shape}, not ({self.expected.channels}, h, w) of {crop} pixels",
                    REENCODE,
                )
            if not _is_scaled(size, scale):
                refuse(path, f"was made from an image of another shape than {example.path.name}", REENCODE)
            if metadata.get("flip_x"):
                mirrored[own] = path
            else:
                plain[path] = own
        if not plain:
            refuse(paths[0], "has no latents of FLUX.1", REENCODE)
        path = _choose_size(paths[0].parent, plain, example, max_pixels)
        chosen = [path, *filter(None, [mirrored.get(plain[path])])]
        return ForeignCache(
            path, AI_TOOLKIT, False, lambda: [_numbers(p, "latent", Checkpoint(p).get("latent")) for p in chosen]
        )

    def _toolkit_text(self, path: Path) -> ForeignCache:
        file, (t5, pooled) = Checkpoint(path), self._text_shapes(("text_embed", "pooled_embed")).values()
        expected = {"text_embed": (1, *t5), "pooled_embed": (1, *pooled)}
        expected |= {"attention_mask": (1, *t5[:1])} if "attention_mask" in file.shapes else {}
        _check_shapes(path, {name: file.shapes.get(name) for name in expected}, expected, self.expected.t5_length)
        if self.expected.masked:
            refuse(path, NOT_MASKED, f"leave --text-mask out, or {REENCODE}")

        def read() -> list[Tensor]:
            text, clip, *mask = (_numbers(path, name, file.get(name))[0] for name in expected)
            seen = mask[0] if mask else torch.ones(len(text))
            if len(text[seen == 0]) and not text[seen == 0].any():
                refuse(path, "was made with attn_masking: it lacks T5's padding, which FLUX.1 sees", REENCODE)
            return [text, clip, seen]

        return ForeignCache(path, AI_TOOLKIT, True, read)

    def _text_shapes(self, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        expected = self.expected
        shapes = ((expected.t5_length, expected.t5_width), (expected.clip_width,), (expected.t5_length,))
        return dict(zip(names, shapes, strict=False))


def _listing(folder: Path) -> Iterator[tuple[str, Path, re.Match]]:
    """(kind, file, match of its name) for all caches in `folder`, sorted."""
    for kind, (subfolder, pattern) in FILES.items():
        directory = folder / subfolder
        for name in sorted(os.listdir(directory)) if directory.is_dir() else ():
            if match := re.fullmatch(pattern, name):
                yield kind, directory / name, match


def _named_size(path: Path) -> Size:
    match = re.fullmatch(FILES["npz latents"][1], path.name)
    assert match is not None, "_listing matched that pattern"
    return int(match[2]), int(match[3])


def _choose_size(path: Path, sizes: dict[Any, Size], example: Example, max_pixels: int) -> Any:
    """The key of the largest of `sizes` that can replace the example's bucket in training: its sides are multiples of
    16, and it has at most `max_pixels` pixels and at least half of the bucket's. Raises WrongRequest if there is none.
    """
    width, height = example.bucket
    fitting = {k: w * h for k, (w, h) in sizes.items() if w % 16 == h % 16 == 0 and width * height <= 2 * w * h}
    fitting = {key: area for key, area in fitting.items() if area <= max_pixels}
    if not fitting:
        available = ", ".join(f"{w} x {h}" for w, h in sizes.values())
        what = f"has {example.path.name} at {available}, but about {width} x {height} pixels are needed"
        refuse(path, what, f"choose the --resolution that it was made for, or {REENCODE}")
    return max(fitting, key=lambda key: fitting[key])


def _check_shapes(path: Path, shapes: dict, expected: dict, t5_length: int) -> None:
    if missing := [name for name, shape in shapes.items() if shape is None]:
        refuse(path, f"lacks {', '.join(missing)}", REENCODE)
    if wrong := [
        f"{name} is {shapes[name]}, not {expected[name]}" for name in expected if shapes[name] != expected[name]
    ]:
        refuse(path, f"does not fit --t5-length {t5_length} and this model: {'; '.join(wrong)}", REENCODE)


def _numbers(path: Path, name: str, values: np.ndarray | Tensor) -> Tensor:
    """`values` as an fp32 tensor. Raises WrongRequest if one is not finite."""
    array = torch.as_tensor(np.asarray(values, np.float32)) if isinstance(values, np.ndarray) else values.float()
    if not array.isfinite().all():
        refuse(path, f"holds numbers that are not finite in {name}", REENCODE)
    return array


def _is_of(path: Path, image: str) -> bool:
    """Whether ai-toolkit made `path` from an image of this name: 07.png and 07.jpg share a stem."""
    return Checkpoint(path).metadata.get("filename") == image


def _is_scaled(size: Size, scale: tuple[Any, Any]) -> bool:
    """Whether an image of `size` can be scaled to `scale` (width, height), within one pixel of rounding."""
    whole = all(isinstance(side, int) and side > 0 for side in scale)
    return whole and abs(size[0] * scale[1] - size[1] * scale[0]) <= 2 * max(size)


def _toolkit_metadata(path: Path) -> dict[str, Any]:
    """ai-toolkit's metadata, as it is hashed."""
    metadata = {key: value for key, value in Checkpoint(path).metadata.items() if key not in UNHASHED_KEYS}
    try:
        return {key: value if key in TEXT_KEYS else json.loads(value) for key, value in metadata.items()}
    except (ValueError, RecursionError):
        refuse(path, "has metadata that is not ai-toolkit's", REENCODE)


def _caption_metadata(caption: str) -> dict[str, Any]:
    return {"caption": caption, "text_embedding_space_version": "flux", "text_embedding_version": 1}


def _toolkit_hash(metadata: dict[str, Any]) -> str:
    digest = md5(json.dumps(metadata, sort_keys=True).encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
