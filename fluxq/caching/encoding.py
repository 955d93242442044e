"""Run the encoders: from images to latents records, from captions to text records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Protocol

import torch

from fluxq.console import Notify, silent
from fluxq.data.buckets import Size
from fluxq.data.examples import Example
from fluxq.data.images import View, open_image, prepare
from fluxq.data.masks import read_mask
from fluxq.errors import WrongRequest, is_out_of_memory
from fluxq.model.autoencoder import within_memory
from fluxq.model.text import CLIP_LENGTH

from .store import Store, Text

PIXELS_PER_BATCH = 1 << 20  # images of one bucket are encoded together up to this many; a larger one alone
LISTED = 10
"""So many truncated captions are named."""

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class TextEncoder(Protocol):
    @property
    def group(self) -> int:
        """The best number of captions per `encode`, in memory and in time."""
        ...

    def encode(
        self, captions: list[str], tick: Callable[[int, int], None]
    ) -> tuple[Sequence[torch.Tensor] | torch.Tensor, torch.Tensor, Sequence[int], Sequence[bool], Sequence[bool]]:
        """(t5 (B, L, D), or (tokens, D) for each caption if padding is masked; pooled (B, D2); each caption's number of
        T5 tokens; whether they were truncated to L; whether CLIP's were truncated to CLIP_LENGTH).

        Calls `tick` with (parts done, total parts) on the way.
        """
        ...


Pending = tuple[Example, View]
"""An image as it is to be encoded."""


def encode_images(
    store: Store,
    images: dict[str, Pending],
    load: Callable[[], Any],
    skip_bad: bool,
    progress: Progress,
    notify: Notify = silent,
) -> dict[str, str]:
    """Encode `images`, a dict by key. Returns the keys of images that cannot be decoded, each with the reason.

    `load` returns a module with `.moments(x (B, 3, H, W))` -> moments (B, 32, H/8, W/8), `.config.scale_factor` and
    `.config.shift_factor`. It is called once the first image is decoded: if all are bad, no autoencoder is needed. If
    the GPU runs out of memory, images are encoded on fewer rows at a time, and `notify` gets a line. Raises
    WrongRequest for an image that cannot be decoded, unless `skip_bad`, and if the GPU memory still is not enough.
    """
    bad: dict[str, str] = {}
    autoencoder, done = None, 0
    opened = lru_cache(maxsize=1)(open_image)  # variants of an image follow each other
    for batch in _by_bucket(images):
        decoded: dict[str, torch.Tensor] = {}  # key -> (3, H, W)
        for key, (example, view) in batch:
            try:
                decoded[key] = prepare(opened(example.path), example.resized, example.bucket, view)
            except WrongRequest as error:
                if not skip_bad:
                    raise
                bad[key] = str(error)
        if decoded:
            if autoencoder is None:
                autoencoder = load()
                progress("images", done, len(images))
            x = torch.stack(list(decoded.values()))
            try:
                means, spreads = within_memory(autoencoder, partial(_latents, autoencoder, x), notify)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise WrongRequest(_too_large(batch[0][1][0])) from error
            for key, mean, spread in zip(decoded, means, spreads, strict=True):
                store.put_latents(key, mean, spread, images[key][0].name)
        done += len(batch)
        progress("images", done, len(images))
    return bad


def encode_masks(store: Store, masks: dict[str, Pending], skip_bad: bool, progress: Progress) -> dict[str, str]:
    """Store `masks`, a dict by key. Returns the names of the images whose masks are of no use, each with the reason.

    Raises WrongRequest for such a mask, unless `skip_bad`.
    """
    bad: dict[str, str] = {}
    for done, (key, (example, view)) in enumerate(masks.items(), 1):
        assert example.mask is not None
        try:
            mask = read_mask(example.mask, example.mask == example.path, example.resized, example.bucket, view)
            store.put_mask(key, mask, example.name)
        except WrongRequest as error:
            if not skip_bad:
                raise
            bad[example.name] = str(error)
        progress("masks", done, len(masks))
    return bad


@torch.no_grad()
def encode_captions(
    store: Store, captions: dict[str, str], encoder: TextEncoder, t5_length: int, masked: bool, progress: Progress
) -> None:
    """Encode `captions`, a dict by key, to records of `t5_length` tokens, or `masked` of their own number of tokens up
    to that; they are written group by group.
    """
    items, done = list(captions.items()), 0
    while done < len(items):
        batch = items[done : done + encoder.group]

        def tick(parts: int, total: int, before: int = done, size: int = len(batch)) -> None:
            if parts < total and (within := before + size * parts // total):
                progress("captions", within, len(items))

        t5, pooled, tokens, truncated, clip_truncated = encoder.encode([caption for _, caption in batch], tick)
        lengths = [min(n, t5_length) if masked else t5_length for n in tokens]
        if [len(states) for states in t5] != lengths:
            raise ValueError(f"the text encoder returned {[*map(len, t5)]} states for captions of {lengths} tokens")
        for n, (key, caption) in enumerate(batch):
            flags = bool(truncated[n]), bool(clip_truncated[n])
            store.put_text(key, Text(t5[n], pooled[n], caption, int(tokens[n]), *flags))
        done += len(batch)
        progress("captions", done, len(items))


def truncation_notes(truncated: Mapping[str, tuple[bool, bool]], names: Mapping[str, str], t5_length: int) -> list[str]:
    """Notes on captions that are too long: a line for each that is truncated for T5, up to LISTED, and one line for all
    that are truncated for CLIP (most long captions are).

    truncated: caption -> whether its T5 tokens and its CLIP tokens were truncated; names: caption -> its image, if any.
    """
    t5, clip = ([caption for caption, flags in truncated.items() if flags[which]] for which in (0, 1))
    notes = [f"{_label(c, names)} is longer than {t5_length} T5 tokens; the rest was cut off" for c in t5[:LISTED]]
    if len(t5) > LISTED:
        notes.append(f"{len(t5) - LISTED:,} more captions are longer than {t5_length} T5 tokens")
    if clip:
        are = f"and {len(clip) - 1} more are" if len(clip) > 1 else "is"
        what = f"longer than {CLIP_LENGTH} CLIP tokens; only T5 sees the rest"
        notes.append(f"{_label(clip[0], names)} {are} {what}")
    return notes


def _label(caption: str, names: Mapping[str, str]) -> str:
    short = caption if len(caption) <= 60 else f"{caption[:60]}..."
    return f"the caption of {names[caption]}, {short!r}," if caption in names else f"the prompt {short!r}"


def _too_large(example: Example) -> str:
    width, height = example.bucket
    what = f"{example.path} at {width} x {height} pixels needs more memory than the GPU has left, even in bands of rows"
    return f"{what}; choose a smaller --resolution, or close other programs that use the GPU"


def _by_bucket(images: dict[str, Pending]) -> Iterator[list[tuple[str, Pending]]]:
    """Batches of images to encode: of one bucket, at most PIXELS_PER_BATCH pixels, at least one image."""
    buckets: dict[Size, list[tuple[str, Pending]]] = {}
    for key, (example, view) in images.items():
        buckets.setdefault(example.bucket, []).append((key, (example, view)))
    for (width, height), items in sorted(buckets.items()):
        size = max(1, PIXELS_PER_BATCH // (width * height))
        yield from (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def _latents(autoencoder: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and spread (B, 16, h, w) fp32 of images (B, 3, H, W), in FLUX's units: latents = scale * (z - shift).

    `spread` is the standard deviation.
    """
    weight = next(chain(autoencoder.parameters(), autoencoder.buffers()))
    mean, log_variance = autoencoder.moments(x.to(weight.device, weight.dtype)).float().cpu().chunk(2, dim=1)
    scale, shift = autoencoder.config.scale_factor, autoencoder.config.shift_factor
    return scale * (mean - shift), scale * torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
