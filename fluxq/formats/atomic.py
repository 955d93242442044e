"""Write a file completely or not at all.

The data goes to a temporary file in the same folder, which is renamed when it is complete. A crash or a full disk never
costs the last good file.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fluxq.errors import WrongRequest

IS_WINDOWS = os.name == "nt"
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT}
WRITE_ERRORS = FULL_DISK_ERRORS | {errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def atomic_path(path: str | Path, nbytes: int | None = None) -> Iterator[Path]:
    """A temporary path next to `path`, with the same suffix, to be written and closed inside the block.

    At the end of the block the file is flushed to disk and renamed to `path`. On any error it is removed and `path` is
    unchanged. Missing folders are created. `nbytes` is the size of the file, if known, for the message about a full
    disk. Raises WrongRequest if `path` cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary, os.O_RDWR)
        _replace(temporary, path)
        if os.name == "posix":
            _flush(path.parent, os.O_RDONLY)
    except OSError as error:
        ours = error.filename is not None and Path(error.filename) in (temporary, path, *path.parents)
        if not ours and (error.filename is not None or error.errno not in WRITE_ERRORS):
            raise  # not about `path`, but for example about another file that the block reads
        raise _unwritable(path, nbytes, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """os.replace. On Windows it fails while another program (a virus scanner) has `path` open, so retry for 5 s."""
    for pause in (0.02, 0.05, 0.1, 0.3, 0.5, 1.0, 1.0, 2.0) if IS_WINDOWS else ():
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(pause)
    os.replace(temporary, path)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, nbytes: int | None, error: OSError) -> WrongRequest:
    if error.errno in FULL_DISK_ERRORS:
        needed = f"{nbytes:,} bytes are needed, " if nbytes is not None else ""
        free = f"{shutil.disk_usage(path.parent).free:,} are free" if path.parent.is_dir() else "none is free"
        kept = "; the existing file is unchanged" if path.exists() else ""
        problem = f"cannot be written because the disk is full ({needed}{free}){kept}"
        return WrongRequest(f"{path} {problem}; free some space and try again")
    return WrongRequest(f"{path} cannot be written ({error.strerror or error}); choose a folder that can be written to")
