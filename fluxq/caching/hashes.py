"""Hashes of files, remembered by (absolute path, size, time of change).

A big file is read once. A file that is gone still has its hash: what was made from it is found without it.
"""

import json
import os
from hashlib import blake2b, file_digest
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path


class Hashes:
    """The hashes that the JSON file at `path` remembers. New ones are kept in memory until `save` adds them to it."""

    def __init__(self, path: Path):
        self.path = path
        self._known = self._read()
        self._new: dict[str, dict] = {}

    def of(self, path: str | Path) -> str:
        """The hash of a file's bytes: remembered if the file is as it was or gone, else read.

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
        """The hash of a file that is as it was or gone; None where it would have to be read. Raises OSError where it
        cannot be looked at.
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
        """Whether this path was hashed before, be the file still there or not."""
        return os.path.abspath(path) in self._known

    def save(self) -> None:
        """Adds what is new to the file, beside what other processes added meanwhile."""
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
            raise WrongRequest(f"{self.path} is damaged ({error}); delete it, and files are hashed again") from error
