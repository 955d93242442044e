"""Masks: which parts of an image count in training. White counts fully, black counts `mask_outside`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageChops

from fluxq.errors import WrongRequest
from fluxq.settings import Folder

from .buckets import Size
from .images import MAX_PIXELS, UPRIGHT, View, listing, opened, orientation, owner_of, prepare, to_rgb

BESIDE, ALPHA = "beside", "alpha"
SHAPES = 0.02
"""Width to height of a mask and of its image may differ by this share, as rounding makes them."""
PATCH = 8
"""Pixels of a latent's side."""


class Masks:
    """The masks of one folder's images. folder: filled. Raises WrongRequest for a folder of masks that is not there."""

    def __init__(self, folder: Folder) -> None:
        self.kind = folder.masks
        self._files: dict[str, Path] = {}  # by the image's name without its suffix, in lower case
        self.second: list[Path] = []  # of images that have another mask
        if self.kind == BESIDE:
            self._add((path, owner_of(path.stem.lower())) for path in listing(folder.path).masks)
        elif self.kind and self.kind != ALPHA:
            place = Path(self.kind).expanduser()
            if not place.is_dir():
                raise WrongRequest(
                    f"masks = {self.kind} is neither {BESIDE} nor {ALPHA} nor a folder; name a folder of masks"
                )
            found = listing(place)
            self._add((path, owner_of(stem := path.stem.lower()) or stem) for path in (*found.images, *found.masks))
        self.unused = set(self._files.values())

    def _add(self, masks: Iterable[tuple[Path, str | None]]) -> None:
        """Of two masks for an image, the last counts."""
        for path, stem in masks:
            if stem is not None:
                self.second += [self._files[stem]] if stem in self._files else []
                self._files[stem] = path

    def of(self, image: Path) -> Path | None:
        """The file that holds the mask of `image`: with "alpha" the image itself, if it has transparency."""
        if self.kind == ALPHA:
            with opened(image, MAX_PIXELS) as header:
                return image if header.has_transparency_data else None
        path = self._files.get(image.stem.lower())
        self.unused.discard(path or image)
        return path


def check_mask(path: Path, size: Size, mask_size: Size) -> None:
    """Raise WrongRequest if a mask of `mask_size` (w, h) is of another shape than its image of `size`."""
    if abs(mask_size[0] * size[1] / (mask_size[1] * size[0]) - 1) > SHAPES:
        raise WrongRequest(
            f"the mask {path} has {mask_size[0]} x {mask_size[1]} pixels and its image {size[0]} x {size[1]}, which is "
            "another shape; draw it over the whole image, or pass --skip-bad to leave both out"
        )


def read_mask(path: Path, alpha: bool, resized: Size, bucket: Size, view: View) -> torch.Tensor:
    """The mask (h, w) fp32 in [0, 1] of latents: how much of each latent's 8 x 8 pixels is white.

    alpha: it is the transparency of the image `path`. Raises WrongRequest if it cannot be read or leaves nothing.
    """
    gray = _gray(path, alpha)
    pixels = (
        prepare(Image.merge("RGB", (gray, gray, gray)), resized, bucket, view._replace(colors=None))[0] / 2 + 0.5
    )  # (H, W)
    height, width = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    mask = pixels.reshape(height, PATCH, width, PATCH).mean((1, 3)).clamp(0, 1)
    if not mask.any():
        raise WrongRequest(
            f"the mask {path} is black wherever its image is trained, so nothing of it counts; mend it, or pass "
            "--skip-bad to leave both out"
        )
    return mask


def _gray(path: Path, alpha: bool) -> Image.Image:
    """The upright mask in gray: the transparency of `path`, or its picture, black where it is transparent."""
    with opened(path, MAX_PIXELS) as image:
        image.load()
        upright = UPRIGHT.get(orientation(image))
        opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha:
            gray = opacity or Image.new("L", image.size, 255)
        else:
            gray = to_rgb(image).convert("L")
            gray = ImageChops.multiply(gray, opacity) if opacity else gray
        return gray.transpose(upright) if upright is not None else gray
