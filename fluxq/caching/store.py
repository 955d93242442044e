"""The cache on disk: encoded images and captions, addressed by content.

    latents/<key>.safetensors    mean, spread (16, h, w) fp32, in FLUX's latent units: latents = mean + spread * noise
    text/<key>.safetensors       t5 (L, D) bf16, clip (D2,) fp32; L is the caption's own number of tokens if T5 did not
                                 see padding
    masks/<key>.safetensors      mask (h, w) fp32, how much of each latent counts
    datasets/<name>.json         a `Dataset`: one request's examples and the keys of their records
    hashes.json                  the hashes of big files, so that each is read only once

A key is a hash of everything a record depends on: the image's bytes, its transform and the autoencoder file; or the
caption, the encoder and tokenizer files and the token length. So a changed input gets a new key, no record is ever
stale, and what several images or runs share is stored once. A record is written under a temporary name and renamed
when complete. `spread` is a standard deviation.

The keys of records from other programs (fluxq/caching/import_foreign.py) begin with `imported-` and contain no encoder:
which encoder made them is unknown.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from fluxq.data.dataset import Dataset
from fluxq.data.images import PLAIN, TRANSFORM_VERSION, View
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint, checksum, write_safetensors

from .hashes import Hashes

RECORD_VERSION = 1  # part of every key: increase it when the tensors of a record change meaning
KINDS = {"latents": ("mean", "spread"), "text": ("t5", "clip"), "masks": ("mask",)}
DAMAGED = ".damaged"  # suffix of records that were set aside; a prune deletes them
IMPORTED = "imported-"  # prefix of the keys of records that other programs encoded


@dataclass(frozen=True)
class Text:
    """One encoded caption: t5 (L, D) bf16, clip (D2,) fp32, its number of T5 tokens before truncation, and whether its
    T5 tokens and its CLIP tokens were truncated.
    """

    t5: torch.Tensor
    clip: torch.Tensor
    caption: str
    tokens: int
    truncated: bool
    clip_truncated: bool = False


@dataclass(frozen=True)
class Origin:
    """The program that encoded a record, and whether the record is known to be of exactly this image or caption."""

    program: str
    verified: bool


class Store:
    """A cache folder. Nothing is created before the first record is written."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.hashes = Hashes(self.root / "hashes.json")
        self._sound: set[tuple[str, str]] = set()  # (kind, key) of the records that were checked

    def has(self, kind: str, key: str) -> bool:
        """Whether the store has this record of `kind`, one of KINDS. If so, it is complete."""
        return self._path(kind, key).is_file()

    def put_latents(
        self, key: str, mean: torch.Tensor, spread: torch.Tensor, image: str, origin: Origin | None = None
    ) -> None:
        """Store mean and spread, both (16, h, w). `image` is a name for humans; `origin` is set for imported records.

        Raises ValueError if a number is not finite.
        """
        if mean.ndim != 3 or mean.shape != spread.shape:
            raise ValueError(
                f"mean and spread must have the same shape (16, h, w), not {tuple(mean.shape)}, {tuple(spread.shape)}"
            )
        metadata = {"picture": image, **_origin_metadata(origin)}
        self._write("latents", key, {"mean": mean.float(), "spread": spread.float()}, metadata)

    def latents(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and spread, (16, h, w) fp32. Raises WrongRequest if the record is missing or damaged."""
        tensors = self._read("latents", key, self._open("latents", key))
        return tensors["mean"], tensors["spread"]

    def latents_size(self, key: str) -> tuple[int, int]:
        """(w, h) in pixels of the encoded image. Reads only the header."""
        _, height, width = self._open("latents", key).shape("mean")
        return 8 * width, 8 * height

    def put_text(self, key: str, text: Text, origin: Origin | None = None) -> None:
        """Store one encoded caption; `origin` is set for imported records.

        Raises ValueError if a number is not finite.
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
        return Text(**self._read("text", key, record), **_text_metadata(record))

    def pooled(self, key: str) -> torch.Tensor:
        """Only the `clip` of the encoded caption. Reads nothing else."""
        return self._open("text", key).get("clip")

    def put_mask(self, key: str, mask: torch.Tensor, image: str) -> None:
        """Store a mask (h, w). `image` is a name for humans."""
        self._write("masks", key, {"mask": mask.float()}, {"picture": image})

    def mask(self, key: str) -> torch.Tensor:
        """The mask, (h, w) fp32. Raises WrongRequest if the record is missing or damaged."""
        return self._read("masks", key, self._open("masks", key))["mask"]

    def truncated(self, key: str) -> tuple[bool, bool]:
        """Whether the caption was truncated for T5, and for CLIP. Reads only the header."""
        metadata = _text_metadata(self._open("text", key))
        return metadata["truncated"], metadata["clip_truncated"]

    def origin(self, kind: str, key: str) -> Origin | None:
        """The program that an imported record comes from; None if fluxq encoded it. Reads only the header."""
        metadata = self._open(kind, key).metadata if is_imported(key) else {}
        return Origin(metadata["imported"], metadata.get("verified") == "true") if "imported" in metadata else None

    def verify(self, remove: bool = False) -> dict[Path, str]:
        """Read every record completely. Returns each bad one with its fault; with `remove`, deletes them."""
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
        """Delete every record that no dataset in `keep` uses, and the temporary files of killed writes.

        Returns (files, bytes) deleted.
        """
        used = {record for dataset in keep for record in dataset.records()}
        unused = [path for kind in KINDS for path in self.records(kind) if (kind, path.stem) not in used]
        for pattern in (".*.tmp-*.safetensors", f"*{DAMAGED}"):
            unused += [path for kind in KINDS for path in (self.root / kind).glob(pattern)]
        nbytes = sum(path.stat().st_size for path in unused)
        for path in unused:
            path.unlink(missing_ok=True)
        return len(unused), nbytes

    def records(self, kind: str) -> list[Path]:
        """The files of all records of `kind`, sorted."""
        return sorted(path for path in (self.root / kind).glob("*.safetensors") if not path.name.startswith("."))

    def datasets(self) -> list[Path]:
        """The files of all datasets built in this store, sorted."""
        return sorted(path for path in (self.root / "datasets").glob("*.json") if not path.name.startswith("."))

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / f"{key}.safetensors"

    def _write(self, kind: str, key: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                what = metadata.get("picture") or repr(metadata.get("caption"))
                raise ValueError(f"the encoder returned non-finite numbers for {what} ({name})")
        metadata = {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}
        write_safetensors(
            self._path(kind, key), tensors, {"key": key, "checksum": checksum(sorted(tensors.items())), **metadata}
        )

    def _read(self, kind: str, key: str, record: Checkpoint) -> dict[str, torch.Tensor]:
        """The tensors of a record. The first time their checksum is compared; a damaged record is set aside."""
        tensors = {name: record.get(name) for name in KINDS[kind]}
        if (kind, key) not in self._sound:
            if record.metadata.get("checksum") != checksum(sorted(tensors.items())):
                what = record.metadata.get("picture") or repr(record.metadata.get("caption"))
                aside = record.path.with_suffix(DAMAGED)
                with suppress(OSError):
                    record.path.replace(aside)
                raise WrongRequest(
                    f"the cache record of {what} has changed since it was written; it was set aside as {aside}; run "
                    "the command again (training: with --resume) to encode it again"
                )
            self._sound.add((kind, key))
        return tensors

    def _open(self, kind: str, key: str) -> Checkpoint:
        path = self._path(kind, key)
        if not path.is_file():
            raise WrongRequest(f"the cache {self.root} has no {kind}/{path.name}; run `fluxq cache` again to encode it")
        try:
            record = Checkpoint(path)
            _check_names(record, kind)
        except WrongRequest as error:
            raise _damaged(path, error) from error
        return record


def imported_note(store: Store, records: Iterable[tuple[str, str]]) -> str | None:
    """A note on those of `records`, each (kind, key), that other programs encoded; None if there are none."""
    imported = [(kind, origin) for kind, key in sorted(records) if (origin := store.origin(kind, key))]
    if not imported:
        return None
    count = {kind: sum(k == kind for k, _ in imported) for kind in KINDS}
    programs = " and ".join(sorted({origin.program for _, origin in imported}))
    unverified = sum(not origin.verified for _, origin in imported)
    what = f"{count['latents']} latents and {count['text']} captions imported from {programs}"
    return f"{what}, {unverified} of these {len(imported)} records unverified"


def latents_key(
    image_hash: str,
    resized: tuple[int, int],
    bucket: tuple[int, int],
    autoencoder_hash: str,
    recolored: bool = False,
    view: View = PLAIN,
) -> str:
    """The key of an image's latents. Two images with equal bytes share a record. recolored: the colors are converted
    from those of the image's profile, which former versions did not do.
    """
    colors = ("sRGB",) if recolored else ()
    return _key("latents", image_hash, *resized, *bucket, TRANSFORM_VERSION, autoencoder_hash, *colors, *view.key())


def mask_key(file_hash: str, alpha: bool, resized: tuple[int, int], bucket: tuple[int, int], view: View) -> str:
    """The key of a mask. alpha: it is the transparency of the image with that hash."""
    shape = view._replace(colors=None)
    return _key("masks", file_hash, int(alpha), *resized, *bucket, TRANSFORM_VERSION, *shape.key())


def imported_latents_key(image_hash: str, resized: tuple[int, int], bucket: tuple[int, int], variant: int) -> str:
    """The key of another program's latents for an image that fluxq would put into `bucket`; `variant` 1 is the mirror
    image. The latents themselves may have another size.
    """
    return IMPORTED + latents_key(image_hash, resized, bucket, f"another program's, {variant}")


def imported_text_key(caption: str, length: int, masked: bool = False) -> str:
    """The key of another program's embeddings of a caption."""
    return IMPORTED + text_key(caption, "", "", "", length, masked)


def is_imported(key: str) -> bool:
    return key.startswith(IMPORTED)


def text_key(caption: str, t5_hash: str, clip_hash: str, tokenizer_hash: str, length: int, masked: bool = False) -> str:
    """The key of a caption's embeddings; `length` is the number of T5 tokens, including padding. masked: T5 did not see
    the padding, and it is left out.
    """
    mask = ("masked",) if masked else ()
    return _key("text", caption, t5_hash, clip_hash, tokenizer_hash, length, *mask)


def _key(kind: str, *parts: str | int) -> str:
    return blake2b(json.dumps([RECORD_VERSION, kind, *parts]).encode(), digest_size=16).hexdigest()


def _origin_metadata(origin: Origin | None) -> dict[str, str]:
    return {"imported": origin.program, "verified": str(origin.verified).lower()} if origin else {}


def _text_metadata(record: Checkpoint) -> dict:
    try:
        metadata = record.metadata
        return {
            "caption": metadata["caption"],
            "tokens": int(metadata["tokens"]),
            "truncated": metadata["truncated"] == "true",
            "clip_truncated": metadata.get("clip_truncated") == "true",  # older records lack it
        }
    except (KeyError, ValueError) as error:
        raise _damaged(record.path, error) from error


def _check_record(path: Path, kind: str) -> None:
    """Raise WrongRequest if the record is not exactly as it was written."""
    record = Checkpoint(path)
    _check_names(record, kind)
    tensors = {name: record.get(name) for name in KINDS[kind]}
    if record.metadata.get("key") != path.stem:
        raise WrongRequest(f"{path} was written under another name")
    if record.metadata.get("checksum") != checksum(sorted(tensors.items())):
        raise WrongRequest(f"{path} has changed since it was written")
    if kind == "text":
        _text_metadata(record)


def _check_names(record: Checkpoint, kind: str) -> None:
    if set(record.keys()) != set(KINDS[kind]):
        raise WrongRequest(f"{record.path} holds {', '.join(record.keys())} instead of {', '.join(KINDS[kind])}")


def _damaged(path: Path, error: Exception) -> WrongRequest:
    return WrongRequest(
        f"the cache record {path} is damaged ({_reason(path, error)}); run `fluxq cache --verify` to delete it, then "
        "`fluxq cache` again"
    )


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with `path`, without its name and without the remedy (which is for model files)."""
    return str(error).removeprefix(f"{path} ").split("; ")[0]
