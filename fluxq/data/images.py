"""From image files to tensors: anything from a camera, a phone or a paint program becomes upright sRGB on white.

Pillow decodes. It clips 16-bit gray instead of scaling it, ignores EXIF orientation and color profiles, and has no
exact area average for shrinking; this file does those.
"""

import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageEnhance, PngImagePlugin

from fluxq.errors import WrongRequest

_SUFFIXES = """
.png .apng .jpg .jpeg .jpe .jfif .webp .avif .bmp .dib .gif .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga .qoi .pcx
"""
SUFFIXES = frozenset(_SUFFIXES.split())
FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA", "QOI", "PCX"]
"""What a file with such a suffix may really contain."""
PLUGINS = {
    ".heic": ("pillow_heif", "register_heif_opener", "HEIF", "pillow-heif"),
    ".heif": ("pillow_heif", "register_heif_opener", "HEIF", "pillow-heif"),
    ".jxl": ("pillow_jxl", "", "JXL", "pillow-jxl-plugin"),
}
"""Suffix -> the module that teaches Pillow the format, its function that does so ("": importing does), Pillow's name of
the format, and the package to install."""
MASK_ENDS = ("-masklabel", "_masklabel", "_mask", "-mask", ".mask")
"""Ends of the names of masks, but only beside an image that is called so without the end: gas_mask.png may be an image.
"""
CONDITION_ENDS = ("-condlabel", "_condlabel")
"""The same of OneTrainer's conditioning images."""
NEVER_IMAGES = ("-masklabel", "-condlabel")
"""Those of OneTrainer, which are no images even alone."""
MAX_PIXELS = 178_956_970  # Pillow's own limit: 0.5 GiB as RGB
TRANSFORM_VERSION = 1  # in the key of all cached latents: increase it if `open_image` or `prepare` change their numbers

# Sound files of some programs hold workflows or color profiles of megabytes; Pillow refuses more than one.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26, 1 << 28

UPRIGHT = {  # EXIF orientation -> the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Listing(NamedTuple):
    """What lies directly in a folder, sorted by name. masks: of other images, by their names. unread: how many other
    files there are of each suffix.
    """

    images: list[Path]
    masks: list[Path]
    unread: Counter[str]


def listing(folder: Path) -> Listing:
    """The files of `folder`, told apart by their suffixes and names, in any case. Hidden files are left out."""
    files = (Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    named = sorted(files, key=lambda file: file.name)
    images = [file for file in named if readable(file.suffix)]
    stems = {file.stem.lower() for file in images}
    masks = {file: None for file in images if _is_mask(file.stem.lower(), stems)}
    others = Counter(file.suffix.lower() for file in named if not readable(file.suffix))
    return Listing([file for file in images if file not in masks], [*masks], others)


def image_files(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted by name."""
    return listing(folder).images


def readable(suffix: str) -> bool:
    """Whether files with that suffix are taken for images, here and now."""
    suffix = suffix.lower()
    return suffix in SUFFIXES or (suffix in PLUGINS and _plugin(suffix))


def _is_mask(stem: str, stems: set[str]) -> bool:
    return stem.endswith(NEVER_IMAGES) or owner_of(stem, (*MASK_ENDS, *CONDITION_ENDS)) in stems


def owner_of(stem: str, ends: Sequence[str] = MASK_ENDS) -> str | None:
    """The name of the image whose mask `stem` is by its end, or None. Both are in lower case, without suffix."""
    return next((stem.removesuffix(end) for end in ends if stem.endswith(end)), None)


@cache
def _plugin(suffix: str) -> bool:
    """Teach Pillow the format of that suffix. False if the package for it is not installed."""
    module, register, _, _ = PLUGINS[suffix]
    if find_spec(module) is None:
        return False
    plugin = import_module(module)
    if register:
        getattr(plugin, register)()
    return True


class View(NamedTuple):
    """One way to see an image. offset: (left, top) of its bucket in the resized image, None for the center. colors:
    factors of brightness, contrast and saturation. mirrored: after it was cut.
    """

    mirrored: bool = False
    offset: tuple[int, int] | None = None
    colors: tuple[float, float, float] | None = None

    def key(self) -> tuple[str, ...]:
        """What tells its latents from those of the plain view; () for that."""
        return () if self == PLAIN else (repr(tuple(self)),)


PLAIN = View()


class Header(NamedTuple):
    """What a file's header says: the size of the upright image in pixels, whether it has several frames, of which only
    the first is read, and whether its profile has other colors than sRGB.
    """

    width: int
    height: int
    animated: bool
    recolored: bool


def read_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Raises the errors of `open_image`."""
    with opened(path, max_pixels) as image:
        width, height = image.size[::-1] if orientation(image) >= 5 else image.size
        return Header(
            width, height, bool(getattr(image, "is_animated", False)) and image.format != "MPO", _is_recolored(image)
        )


def _is_recolored(image: Image.Image) -> bool:
    return not image.mode.startswith(("I", "F")) and _profile(image) is not None


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of the upright image, from the file's header. Raises the errors of `open_image`."""
    return read_header(path, max_pixels)[:2]


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit sRGB: upright, transparency flattened onto white, deeper gray scaled to 8 bits.

    Raises WrongRequest with the file and the remedy if it cannot be read or has more than `max_pixels` pixels.
    """
    with opened(path, max_pixels) as image:
        image.load()
        upright = UPRIGHT.get(orientation(image))
        image = to_rgb(image)
        return image.transpose(upright) if upright is not None else image


def prepare(image: Image.Image, resized: tuple[int, int], bucket: tuple[int, int], view: View = PLAIN) -> torch.Tensor:
    """The RGB `image` resized to `resized` (w, h) and cut to `bucket` (w, h) as `view` says: (3, H, W) fp32 in [-1, 1].

    Shrinking averages areas exactly; if either side grows, Lanczos is used for both. Raises ValueError if `resized`
    does not cover `bucket`.
    """
    center = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    if min(center) < 0:
        raise ValueError(f"an image resized to {resized} does not cover its bucket {bucket}")
    left, top = view.offset or center
    image = with_colors(image, view.colors)
    if image.size == resized:
        pixels = np.asarray(image, dtype=np.float32)
    elif image.width >= resized[0] and image.height >= resized[1]:
        pixels = _area_average(np.asarray(image), resized)
    else:
        pixels = np.asarray(image.resize(resized, Image.Resampling.LANCZOS), dtype=np.float32)
    pixels = pixels[top : top + bucket[1], left : left + bucket[0]]  # (H, W, 3)
    pixels = pixels[:, ::-1] if view.mirrored else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) / 127.5 - 1.0


def with_colors(image: Image.Image, colors: tuple[float, float, float] | None) -> Image.Image:
    """The RGB `image` with other brightness, contrast and saturation."""
    if colors is None:
        return image
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), colors, strict=True
    ):
        image = enhance(image).enhance(factor)
    return image


@contextmanager
def opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The opened file, header read. Any exception inside the block becomes a WrongRequest that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about bombs (checked below) and odd metadata (unused)
            plugin = PLUGINS.get(path.suffix.lower())
            with Image.open(path, formats=[*FORMATS, *([plugin[2]] if plugin else [])]) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                yield image
    except Image.DecompressionBombError as error:  # Pillow raises it too, above its own limit
        raise WrongRequest(
            f"{path} is too large (more than {max_pixels:,} pixels); remove it or replace it, or pass --skip-bad"
        ) from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost any type
        raise WrongRequest(
            f"{path} cannot be read ({_reason(path, error)}); remove it or replace it, or pass --skip-bad"
        ) from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        size = path.stat().st_size
        return "it is empty" if size == 0 else f"its {size:,} bytes are not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the metadata is missing or damaged."""
    try:
        # The base class's method: PNG's own decodes the whole image to look for metadata after it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    profile = _profile(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colors = _in_srgb(rgba.convert("RGB"), profile)
        return Image.composite(colors, Image.new("RGB", rgba.size, "white"), rgba.getchannel("A"))
    return _in_srgb(image, profile).convert("RGB")


def _profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The ICC profile of `image`; None if there is none, if it is that of sRGB, or damaged."""
    profile = image.info.get("icc_profile")
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else None
        if found is not None and "srgb" not in (ImageCms.getProfileDescription(found) or "").lower():
            return found
    return None


def _in_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """`image` from the colors of `profile` to sRGB. One of other channels is ignored."""
    if profile is None:
        return image
    image = image if image.mode in ("RGB", "CMYK", "L", "LAB") else image.convert("RGB")
    with suppress(ImageCms.PyCMSError, ValueError, TypeError):
        converted = ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return image if converted is None else converted
    return image


def _to_uint8(gray: np.ndarray) -> np.ndarray:
    """Deep gray (H, W) scaled to uint8. White is 65,535 (1.0 for floats), or the largest value if that is more."""
    white = 1.0 if gray.dtype.kind == "f" else 65535.0
    values = np.nan_to_num(gray.astype(np.float64), posinf=white, neginf=0.0)
    return np.rint(values.clip(0.0) * (255.0 / max(white, float(values.max())))).astype(np.uint8)


def _area_average(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) shrunk to `size` (w, h): each pixel is the mean of the area it covers, edge pixels weighted."""
    rows = _average_rows(pixels, size[1])
    return _average_rows(rows.swapaxes(0, 1), size[0]).swapaxes(0, 1)


def _average_rows(pixels: np.ndarray, count: int) -> np.ndarray:
    """(N, M, C) to (count, M, C) fp32, count <= N. Works row by row, to never hold a large image in fp32."""
    total = len(pixels)
    result = np.empty((count, *pixels.shape[1:]), np.float32)
    for row in range(count):
        start, stop = row * total, (row + 1) * total  # exact: in units of 1/count of an input row
        index = np.arange(start // count, -(-stop // count))
        share = np.minimum((index + 1) * count, stop) - np.maximum(index * count, start)
        result[row] = np.tensordot((share / total).astype(np.float32), pixels[index].astype(np.float32), axes=1)
    return result
