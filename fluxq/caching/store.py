"""The cache on disk: what the encoders made of images and captions, found by its content.

    latents/<key>.safetensors    mean, spread (16, h, w) fp32, in FLUX's latent units: latents = mean + spread * noise
    text/<key>.safetensors       t5 (L, D) bf16, clip (D2,) fp32
    datasets/<name>.json         a `Dataset`: one request's examples and the keys of their records
    hashes.json                  the hashes of big files, so that they are read once

A key is a hash of all that a record depends on: the image's bytes, its transform and the autoencoder file; or the
caption, the encoder and tokenizer files and the token length. So a changed input is another key, nothing is ever stale,
and what several images or runs share is stored once. A record is written under a temporary name and renamed when
complete.

What another program encoded (fluxq/caching/imports.py) is found by the same image or caption in the same request, but by
no encoder, for which one it was is not known. Such keys begin with `imported-`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from fluxq.data.dataset import Dataset
from fluxq.data.images import TRANSFORM_VERSION
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors

from .hashes import Hashes

RECORD_VERSION = 1  # part of every key: raise it when a record's tensors change their meaning
KINDS = {"latents": ("mean", "spread"), "text": ("t5", "clip")}
IMPORTED = "imported-"  # how keys of records begin that other programs encoded


@dataclass(frozen=True)
class Text:
    """One encoded caption: t5 (L, D) bf16, clip (D2,) fp32, how many T5 tokens the caption has, before any cut, and
    whether T5's and CLIP's were cut.
    """

    t5: torch.Tensor
    clip: torch.Tensor
    caption: str
    tokens: int
    truncated: bool
    clip_truncated: bool = False


@dataclass(frozen=True)
class Origin:
    """Which program encoded a record, and whether it is known that it did so from this very image or caption."""

    program: str
    verified: bool


class Store:
    """A cache folder. Nothing is created before the first record is written."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.hashes = Hashes(self.root / "hashes.json")

    def has(self, kind: str, key: str) -> bool:
        """Whether a record of `kind`, "latents" or "text", is there; then it is also complete."""
        return self._path(kind, key).is_file()

    def put_latents(
        self, key: str, mean: torch.Tensor, spread: torch.Tensor, image: str, origin: Origin | None = None
    ) -> None:
        """Stores mean and spread, both (16, h, w). `image` is a name for people; `origin` another program.

        ValueError if a number is not finite.
        """
        if mean.ndim != 3 or mean.shape != spread.shape:
            raise ValueError(
                f"latents need mean and spread of one shape (16, h, w), not {tuple(mean.shape)}, {tuple(spread.shape)}"
            )
        metadata = {"picture": image, **_origin_metadata(origin)}
        self._write("latents", key, {"mean": mean.float(), "spread": spread.float()}, metadata)

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and spread, (16, h, w) fp32. Raises WrongRequest if the record is missing or damaged."""
        record = self._open("latents", key)
        return record.get("mean"), record.get("spread")

    def latents_size(self, key: str) -> tuple[int, int]:
        """(w, h) in pixels of the image whose latents these are. Reads the header alone."""
        _, height, width = self._open("latents", key).shape("mean")
        return 8 * width, 8 * height

    def put_text(self, key: str, text: Text, origin: Origin | None = None) -> None:
        """Stores one encoded caption, by fluxq or by another program, `origin`. ValueError if a number is not
        finite.
        """
        if text.t5.ndim != 2 or text.clip.ndim != 1:
            raise ValueError(
                f"a text record needs t5 (L, D) and clip (D2,), not {tuple(text.t5.shape)}, {tuple(text.clip.shape)}"
            )
        metadata = {"caption": text.caption, "tokens": str(text.tokens), "truncated": str(text.truncated).lower()}
        metadata |= {"clip_truncated": str(text.clip_truncated).lower(), **_origin_metadata(origin)}
        self._write("text", key, {"t5": text.t5.bfloat16(), "clip": text.clip.float()}, metadata)

    def text(self, key: str) -> Text:
        """The encoded caption. Raises WrongRequest if the record is missing or damaged."""
        record = self._open("text", key)
        return Text(record.get("t5"), record.get("clip"), **_about_text(record))

    def pooled(self, key: str) -> torch.Tensor:
        """The encoded caption's `clip` alone; nothing else is read."""
        return self._open("text", key).get("clip")

    def text_cuts(self, key: str) -> tuple[bool, bool]:
        """Whether the caption has more tokens than T5's length, and more than CLIP's. Reads the header alone."""
        about = _about_text(self._open("text", key))
        return about["truncated"], about["clip_truncated"]

    def origin(self, kind: str, key: str) -> Origin | None:
        """Which other program encoded a record; None if fluxq did. Reads the header alone."""
        about = self._open(kind, key).metadata if is_imported(key) else {}
        return Origin(about["imported"], about.get("verified") == "true") if "imported" in about else None

    def verify(self, remove: bool = False) -> dict[Path, str]:
        """Reads every record whole and says of each bad one what is wrong. With `remove` the bad ones are deleted."""
        bad = {}
        for kind in KINDS:
            for path in self.records(kind):
                try:
                    _check_record(path, kind)
                except WrongRequest as error:
                    bad[path] = _reason(path, error)
                    if remove:
                        path.unlink(missing_ok=True)
        return bad

    def prune(self, keep: Iterable[Dataset]) -> tuple[int, int]:
        """Deletes every record that no dataset of `keep` uses, and what killed writes left.

        Returns (files, bytes) deleted.
        """
        used = {record for dataset in keep for record in dataset.records()}
        gone = [path for kind in KINDS for path in self.records(kind) if (kind, path.stem) not in used]
        gone += [path for kind in KINDS for path in (self.root / kind).glob(".*.tmp-*.safetensors")]
        nbytes = sum(path.stat().st_size for path in gone)
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone), nbytes

    def records(self, kind: str) -> list[Path]:
        """The files of all records of `kind`, sorted."""
        return sorted(path for path in (self.root / kind).glob("*.safetensors") if not path.name.startswith("."))

    def datasets(self) -> list[Path]:
        """The files of all datasets that were built in this store, sorted."""
        return sorted(path for path in (self.root / "datasets").glob("*.json") if not path.name.startswith("."))

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / f"{key}.safetensors"

    def _write(self, kind: str, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                what = metadata.get("picture") or repr(metadata.get("caption"))
                raise ValueError(f"the encoder gave numbers that are not finite for {what} ({name})")
        metadata = {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}
        write_safetensors(self._path(kind, key), tensors, {"key": key, "checksum": _checksum(tensors), **metadata})

    def _open(self, kind: str, key: str) -> Checkpoint:
        path = self._path(kind, key)
        if not path.is_file():
            raise WrongRequest(f"the cache {self.root} lacks {kind}/{path.name}; run `fluxq cache` again to encode it")
        try:
            record = Checkpoint(path)
            _check_names(record, kind)
        except WrongRequest as error:
            raise _damaged(path, error) from error
        return record


def imported_line(store: Store, records: Iterable[tuple[str, str]]) -> str | None:
    """What to say of those `records`, (kind, key), that other programs encoded; None where there are none."""
    found = [(kind, origin) for kind, key in sorted(records) if (origin := store.origin(kind, key))]
    if not found:
        return None
    count = {kind: sum(k == kind for k, _ in found) for kind in KINDS}
    programs = " and ".join(sorted({origin.program for _, origin in found}))
    unverified = sum(not origin.verified for _, origin in found)
    what = f"{count['latents']} latents and {count['text']} captions imported from {programs}"
    return f"{what}, {unverified} of these {len(found)} records unverified"


def latents_key(image_hash: str, resized: tuple[int, int], bucket: tuple[int, int], autoencoder_hash: str) -> str:
    """The key of an image's latents. Two images with equal bytes share a record."""
    return _key("latents", image_hash, *resized, *bucket, TRANSFORM_VERSION, autoencoder_hash)


def imported_latents_key(image_hash: str, resized: tuple[int, int], bucket: tuple[int, int], variant: int) -> str:
    """The key of latents that another program made of an image that fluxq would bring to `bucket`; of its mirror image
    where `variant` is 1. Their own size may be another.
    """
    return IMPORTED + latents_key(image_hash, resized, bucket, f"another program's, {variant}")


def imported_text_key(caption: str, length: int) -> str:
    """The key of a caption's embeddings by another program."""
    return IMPORTED + text_key(caption, "", "", "", length)


def is_imported(key: str) -> bool:
    return key.startswith(IMPORTED)


def text_key(caption: str, t5_hash: str, clip_hash: str, tokenizer_hash: str, length: int) -> str:
    """The key of a caption's embeddings; `length` is the number of T5 tokens, padding included."""
    return _key("text", caption, t5_hash, clip_hash, tokenizer_hash, length)


def _key(kind: str, *parts: str | int) -> str:
    return blake2b(json.dumps([RECORD_VERSION, kind, *parts]).encode(), digest_size=16).hexdigest()


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _origin_metadata(origin: Origin | None) -> dict[str, str]:
    return {"imported": origin.program, "verified": str(origin.verified).lower()} if origin else {}


def _about_text(record: Checkpoint) -> dict:
    try:
        about = record.metadata
        return {
            "caption": about["caption"],
            "tokens": int(about["tokens"]),
            "truncated": about["truncated"] == "true",
            "clip_truncated": about.get("clip_truncated") == "true",  # records of before it was asked lack it
        }
    except (KeyError, ValueError) as error:
        raise _damaged(record.path, error) from error


def _check_record(path: Path, kind: str) -> None:
    """Raises WrongRequest if the record is not as it was written."""
    record = Checkpoint(path)
    _check_names(record, kind)
    tensors = {name: record.get(name) for name in KINDS[kind]}
    if record.metadata.get("key") != path.stem:
        raise WrongRequest(f"{path} was written under another name")
    if record.metadata.get("checksum") != _checksum(tensors):
        raise WrongRequest(f"{path} has changed since it was written")
    if kind == "text":
        _about_text(record)


def _check_names(record: Checkpoint, kind: str) -> None:
    if set(record.keys()) != set(KINDS[kind]):
        raise WrongRequest(f"{record.path} holds {', '.join(record.keys())} and not {', '.join(KINDS[kind])}")


def _damaged(path: Path, error: Exception) -> WrongRequest:
    return WrongRequest(
        f"the cache record {path} is damaged ({_reason(path, error)}); run `fluxq cache --verify`, which deletes it, "
        "and then `fluxq cache` again"
    )


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with `path`, without its name and without a remedy that is meant for model files."""
    return str(error).removeprefix(f"{path} ").split("; ")[0]
