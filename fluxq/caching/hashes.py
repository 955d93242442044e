"""Hashes of files, remembered by absolute path, size, modification time, and a sample of their bytes.

A big file is read only once. The sample notices a file replaced by one of the same size and time, as some copies
are. A deleted file keeps its hash, so records made from it can still be found.
"""

import json
import os
from hashlib import blake2b, file_digest
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import well_formed

SAMPLE = 1 << 16
"""Bytes at the start, in the middle and at the end of a file."""


class Hashes:
    """The hashes stored in the JSON file at `path`. New ones stay in memory until `save` adds them to the file."""

    def __init__(self, path: Path):
        self.path = path
        self._known = self._read()
        self._new: dict[str, dict] = {}

    def of(self, path: str | Path) -> str:
        """The hash of a file's bytes: the remembered one if the file is unchanged or gone, else computed.

        Raises WrongRequest if the file is gone and was never hashed, or cannot be read.
        """
        name = os.path.abspath(path)
        try:
            if known := self.remembered(path):
                return known
            status = os.stat(name)
            with open(name, "rb") as file:
                digest = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
            sample = sample_of(name, status.st_size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise WrongRequest(f"{path} does not exist; check the path") from error
        except OSError as error:
            raise WrongRequest(f"{path} cannot be read ({error.strerror}); check that it is a readable file") from error
        found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": sample, "hash": digest}
        self._known[name] = self._new[name] = found
        return digest

    def remembered(self, path: str | Path) -> str | None:
        """The remembered hash of a file that is unchanged or gone; None if the file would have to be read.

        Raises OSError if the file cannot be read.
        """
        known = self._known.get(os.path.abspath(path))
        if known is None:
            return None
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return known["hash"]
        same = (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        if same and "sample" in known:  # former versions took none
            same = known["sample"] == sample_of(path, status.st_size)
        return known["hash"] if same else None

    def knows(self, path: str | Path) -> bool:
        """Whether this path was hashed before, even if the file is gone."""
        return os.path.abspath(path) in self._known

    def save(self) -> None:
        """Add the new hashes to the file, keeping what other processes have added since."""
        if self._new:
            everything = self._read() | self._new
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(everything, indent=1), encoding="utf-8")
            self._new = {}

    def _read(self) -> dict[str, dict]:
        try:
            with well_formed(self.path, "is damaged", "delete it to hash the files again"):
                known = dict(json.loads(self.path.read_text(encoding="utf-8")))
                if not all(isinstance(k["hash"], str) and {"size", "mtime_ns"} <= k.keys() for k in known.values()):
                    raise ValueError("a file has no hash, size or time")
                return known
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise WrongRequest(f"{self.path} cannot be read ({error.strerror}); choose another cache folder") from error


def sample_of(path: str | Path, size: int) -> str:
    """A hash of three parts of the file."""
    digest = blake2b(digest_size=8)
    with open(path, "rb") as file:
        for start in (0, size // 2, max(0, size - SAMPLE)):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()
