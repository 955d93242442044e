"""What other trainers cached of an image and its caption: where it lies, whether it fits, and its tensors.

sd-scripts (library/strategy_flux.py) writes beside 07.png

    07_1024x0768_flux.npz     latents_96x128 (16, 96, 128) fp32, latents_flipped_, original_size_, crop_ltrb_ and
                              alpha_mask_96x128, for several sizes; early files have no size in these names
    07_flux_te.npz            t5_out (L, 4096), l_pooled (768,), t5_attn_mask (L,), apply_t5_attn_mask

which tells neither the image's bytes nor the caption. ai-toolkit (toolkit/dataloader_mixins.py) writes

    _latent_cache/07_<hash>.safetensors    latent (16, h, w); its metadata say name, scale and crop of the image
    _t_e_cache/07_<hash>.safetensors       text_embed (1, L, 4096), pooled_embed (1, 768)

where the hash is that of what the metadata say, or of the caption. Both store latents in FLUX's units, as one draw from
the autoencoder's distribution. musubi-tuner's files (_fk.safetensors) are known by name, and left alone.
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
FILES = {  # kind -> the folder within that of the images, and what names tell; the first group is the image's stem
    "npz latents": ("", r"(.+)_(\d{4,})x(\d{4,})_flux\.npz"),
    "npz text": ("", r"(.+)_flux_te\.npz"),
    "latents": (LATENTS_FOLDER, r"(.+)_([\w-]{22})\.safetensors"),
    "text": (TEXT_FOLDER, r"(.+)_([\w-]{22})\.safetensors"),
    "musubi": ("", r"(.+)_fk(?:_te)?\.safetensors"),
}
FLUX_SPACE = "flux1"
AS_TEXT = ("filename", "latent_space_version")  # of ai-toolkit's metadata; the rest are numbers and flags, as JSON
NOT_HASHED = ("format", "software")
ANEW = "delete it, and fluxq encodes anew"


@dataclass(frozen=True)
class Wanted:
    """What the run's transformer takes: channels of latents; tokens a caption; widths of T5's and CLIP's vectors."""

    channels: int
    t5_length: int
    t5_width: int
    clip_width: int


class Found(NamedTuple):
    """A cache whose header fits. `read` gives its tensors: latents (C, h, w), and perhaps those of the mirror image; or
    t5 (L, D), pooled (D2,) and a mask (L,) of what is caption. It raises WrongRequest where they are damaged.
    """

    path: Path
    program: str
    verified: bool  # whether it is known to be of this very image or caption
    read: Callable[[], list[Tensor]]
    has_mask: bool = False  # of what of the image counts; fluxq has no use for it


class Caches:
    """The caches of other programs in one folder of images."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.folder, self.wanted = folder, wanted
        self._files: dict[str, dict[str, list[Path]]] = {kind: {} for kind in FILES}
        for kind, path, match in _listing(folder):
            self._files[kind].setdefault(match[1], []).append(path)

    def count(self, kind: str) -> int:
        """How many images have a file of `kind`, a key of FILES."""
        return len(self._files[kind])

    def latents(self, example: Example, size: Size, most: int) -> Found | None:
        """Those of the image `example`, which is of `size`: the largest that have up to `most` pixels.

        None where no program has any. Raises WrongRequest where those that there are do not fit.
        """
        stem = example.path.stem
        if paths := self._files["npz latents"].get(stem):
            named = [path for path in paths if _named_size(path) == size]
            if not named:
                what = f"was made from an image of another size, {example.path.name} has {[*size]} pixels"
                refuse(paths[0], what, ANEW)
            return self._npz_latents(named[0], example, size, most)
        paths = [path for path in self._files["latents"].get(stem, ()) if _is_of(path, example.path.name)]
        return self._toolkit_latents(paths, example, size, most) if paths else None

    def text(self, example: Example, written: str) -> Found | None:
        """The embeddings of the example's caption, which is `written` in a file; None where no program has any.

        Raises WrongRequest where they do not fit.
        """
        stem = example.path.stem
        if paths := self._files["npz text"].get(stem):
            if written and written != example.caption:
                what = f"was made before the trigger was put in front: the caption is {printable(example.caption)!r}"
                refuse(paths[0], what, f"leave the trigger out, or {ANEW}")
            return self._npz_text(paths[0])
        hashed = f"{stem}_{_toolkit_hash(_about_caption(example.caption))}.safetensors"
        path = next((path for path in self._files["text"].get(stem, ()) if path.name == hashed), None)
        return self._toolkit_text(path) if path else None

    def _npz_latents(self, path: Path, example: Example, size: Size, most: int) -> Found:
        npz, sizes = NpzFile(path), {}
        for name, shape in npz.shapes.items():
            if match := re.fullmatch(r"latents(_(\d+)x(\d+))?", name):
                told = (int(match[2]), int(match[3])) if match[1] else shape[1:]
                if len(shape) != 3 or shape != (self.wanted.channels, *told):
                    refuse(path, f"has {name} of {shape}, not ({self.wanted.channels}, h, w)", ANEW)
                sizes[match[1] or ""] = (8 * shape[2], 8 * shape[1])
        if not sizes:
            refuse(path, f"has no latents: {listed(arrays=[printable(name) for name in npz.shapes])}", ANEW)
        suffix = _chosen(path, sizes, example, most)
        original = f"original_size{suffix}"
        was = npz.get(original).tolist() if npz.shapes.get(original) == (2,) else None
        if was != [*size]:
            what = f"was made from an image of {was or 'unknown size'}, {example.path.name} has {[*size]} pixels"
            refuse(path, what, ANEW)
        mirrored = f"latents_flipped{suffix}"
        names = [f"latents{suffix}", *([mirrored] if mirrored in npz.shapes else [])]
        if len({npz.shapes[name] for name in names}) > 1:
            refuse(path, f"has {mirrored} of {npz.shapes[mirrored]}, unlike latents{suffix}", ANEW)
        has_mask = f"alpha_mask{suffix}" in npz.shapes
        return Found(path, SD_SCRIPTS, False, lambda: [_numbers(path, n, npz.get(n)) for n in names], has_mask)

    def _npz_text(self, path: Path) -> Found:
        npz, wanted = NpzFile(path), self._text_shapes(("t5_out", "l_pooled", "t5_attn_mask"))
        wanted |= {"apply_t5_attn_mask": ()}
        _check_shapes(path, {name: npz.shapes.get(name) for name in wanted}, wanted, self.wanted.t5_length)
        if npz.get("apply_t5_attn_mask"):
            what = "was made with apply_t5_attn_mask: T5 did not see the padding, as it does where images are drawn"
            refuse(path, what, ANEW)
        return Found(path, SD_SCRIPTS, False, lambda: [_numbers(path, n, npz.get(n)) for n in list(wanted)[:3]])

    def _toolkit_latents(self, paths: list[Path], example: Example, size: Size, most: int) -> Found:
        plain: dict[Path, Size] = {}
        mirrored: dict[Size, Path] = {}
        for path in paths:
            file, about = Checkpoint(path), _about(path)
            shape = file.shapes.get("latent", ())
            if about.get("latent_space_version") != FLUX_SPACE or {"flip_y", "num_frames"} & about.keys():
                continue
            if _toolkit_hash(about) != path.stem.rpartition(f"{example.path.stem}_")[2]:
                refuse(path, "says in its header what its name denies", ANEW)
            crop, scale = ((about.get(f"{a}_width"), about.get(f"{a}_height")) for a in ("crop", "scale_to"))
            own = (8 * shape[2], 8 * shape[1]) if len(shape) == 3 and shape[0] == self.wanted.channels else None
            if own is None or own != crop:
                refuse(path, f"has latents of {shape}, not ({self.wanted.channels}, h, w) of {crop} pixels", ANEW)
            if not _is_scaled(size, scale):
                refuse(path, f"was made from an image of another shape than {example.path.name} has", ANEW)
            if about.get("flip_x"):
                mirrored[own] = path
            else:
                plain[path] = own
        if not plain:
            refuse(paths[0], "is not of FLUX.1's latents", ANEW)
        path = _chosen(paths[0].parent, plain, example, most)
        chosen = [path, *filter(None, [mirrored.get(plain[path])])]
        return Found(
            path, AI_TOOLKIT, False, lambda: [_numbers(p, "latent", Checkpoint(p).get("latent")) for p in chosen]
        )

    def _toolkit_text(self, path: Path) -> Found:
        file, (t5, pooled) = Checkpoint(path), self._text_shapes(("text_embed", "pooled_embed")).values()
        wanted = {"text_embed": (1, *t5), "pooled_embed": (1, *pooled)}
        wanted |= {"attention_mask": (1, *t5[:1])} if "attention_mask" in file.shapes else {}
        _check_shapes(path, {name: file.shapes.get(name) for name in wanted}, wanted, self.wanted.t5_length)

        def read() -> list[Tensor]:
            text, clip, *mask = (_numbers(path, name, file.get(name))[0] for name in wanted)
            seen = mask[0] if mask else torch.ones(len(text))
            if len(text[seen == 0]) and not text[seen == 0].any():
                refuse(path, "was made with attn_masking: it lacks T5's padding, which FLUX.1 sees", ANEW)
            return [text, clip, seen]

        return Found(path, AI_TOOLKIT, True, read)

    def _text_shapes(self, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        wanted = self.wanted
        shapes = ((wanted.t5_length, wanted.t5_width), (wanted.clip_width,), (wanted.t5_length,))
        return dict(zip(names, shapes, strict=False))


def _listing(folder: Path) -> Iterator[tuple[str, Path, re.Match]]:
    """(kind, file, what its name tells) of all caches in `folder`, sorted."""
    for kind, (inner, pattern) in FILES.items():
        place = folder / inner
        for name in sorted(os.listdir(place)) if place.is_dir() else ():
            if match := re.fullmatch(pattern, name):
                yield kind, place / name, match


def _named_size(path: Path) -> Size:
    match = re.fullmatch(FILES["npz latents"][1], path.name)
    assert match is not None, "it was listed by that pattern"
    return int(match[2]), int(match[3])


def _chosen(path: Path, sizes: dict[Any, Size], example: Example, most: int) -> Any:
    """The largest of `sizes` that can be trained in place of the example's bucket: sides that tokens fit into, up to
    `most` pixels, and at least half of what the bucket has. Raises WrongRequest where there is none.
    """
    width, height = example.bucket
    fitting = {k: w * h for k, (w, h) in sizes.items() if w % 16 == h % 16 == 0 and width * height <= 2 * w * h}
    fitting = {key: area for key, area in fitting.items() if area <= most}
    if not fitting:
        came = ", ".join(f"{w} x {h}" for w, h in sizes.values())
        what = f"has {example.path.name} in {came}, where about {width} x {height} pixels are wanted"
        refuse(path, what, f"choose the --resolution that it was made for, or {ANEW}")
    return max(fitting, key=lambda key: fitting[key])


def _check_shapes(path: Path, found: dict, wanted: dict, t5_length: int) -> None:
    if missing := [name for name, shape in found.items() if shape is None]:
        refuse(path, f"lacks {', '.join(missing)}", ANEW)
    if wrong := [f"{name} is {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]:
        refuse(path, f"does not fit --t5-length {t5_length} and this model: {'; '.join(wrong)}", ANEW)


def _numbers(path: Path, name: str, values: np.ndarray | Tensor) -> Tensor:
    """`values` as a tensor in fp32, all of them finite."""
    array = torch.as_tensor(np.asarray(values, np.float32)) if isinstance(values, np.ndarray) else values.float()
    if not array.isfinite().all():
        refuse(path, f"holds numbers that are not finite in {name}", ANEW)
    return array


def _is_of(path: Path, image: str) -> bool:
    """Whether ai-toolkit made `path` of an image of this name: 07.png and 07.jpg share a stem."""
    return Checkpoint(path).metadata.get("filename") == image


def _is_scaled(size: Size, scale: tuple[Any, Any]) -> bool:
    """Whether an image of `size` becomes `scale`, (width, height), up to a pixel of rounding either way."""
    whole = all(isinstance(side, int) and side > 0 for side in scale)
    return whole and abs(size[0] * scale[1] - size[1] * scale[0]) <= 2 * max(size)


def _about(path: Path) -> dict[str, Any]:
    """What ai-toolkit's metadata say, as it hashes them."""
    told = {key: value for key, value in Checkpoint(path).metadata.items() if key not in NOT_HASHED}
    try:
        return {key: value if key in AS_TEXT else json.loads(value) for key, value in told.items()}
    except (ValueError, RecursionError):
        refuse(path, "has metadata that are not ai-toolkit's", ANEW)


def _about_caption(caption: str) -> dict[str, Any]:
    return {"caption": caption, "text_embedding_space_version": "flux", "text_embedding_version": 1}


def _toolkit_hash(about: dict[str, Any]) -> str:
    digest = md5(json.dumps(about, sort_keys=True).encode(), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
