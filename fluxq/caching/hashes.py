"""Hashes of files, remembered by (absolute path, size, modification time).

A big file is read only once. A deleted file keeps its hash, so records made from it can still be found.
"""

import json
import os
from hashlib import blake2b, file_digest
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path


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
        except (FileNotFoundError, NotADirectoryError) as error:
            raise WrongRequest(f"{path} does not exist; check the path") from error
        except OSError as error:
            raise WrongRequest(f"{path} cannot be read ({error.strerror}); check that it is a readable file") from error
        self._known[name] = self._new[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "hash": digest}
        return digest

    def remembered(self, path: str | Path) -> str | None:
        """The remembered hash of a file that is unchanged or gone; None if the file would have to be read.

        Raises OSError if the file's status cannot be read.
        """
        known = self._known.get(os.path.abspath(path))
        try:
            status = os.stat(path) if known else None
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if known and (status is None or (known["size"], known["mtime_ns"]) == (status.st_size, status.st_mtime_ns)):
            return known["hash"]
        return None

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
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise WrongRequest(f"{self.path} cannot be read ({error.strerror}); choose another cache folder") from error
        except (ValueError, TypeError) as error:
            raise WrongRequest(f"{self.path} is damaged ({error}); delete it to hash the files again") from error
