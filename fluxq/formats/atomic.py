"""Write a file, or a folder, completely or not at all.

The data goes to a temporary file in the same folder, which is renamed when it is complete. A crash or a full disk never
costs the last good file. What a killed process leaves under the temporary name is used again by the next write to the
same path; the system's lock on it, which ends with its process, shows that nobody writes it any more.
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

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted
    fcntl = None

IS_WINDOWS = os.name == "nt"
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT}
WRITE_ERRORS = FULL_DISK_ERRORS | {errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
WRITE_ERRORS |= {errno.ESTALE, errno.ENOTCONN, errno.ENODEV}


@contextlib.contextmanager
def atomic_path(path: str | Path, nbytes: int | None = None) -> Iterator[Path]:
    """A temporary path next to `path`, with the same suffix, to be written and closed inside the block.

    At the end of the block the file is flushed to disk and renamed to `path`. On any error it is removed and `path` is
    unchanged. Missing folders are created, and removed again on an error. `nbytes` is the size of the file, if known,
    for the message about a full disk. Raises WrongRequest if `path` cannot be written.
    """
    path = Path(path)
    try:
        with made(path.parent), _claimed(path) as temporary:
            yield temporary
            _flush(temporary, os.O_RDWR)
            _replace(temporary, path)
        if os.name == "posix":
            _flush(path.parent, os.O_RDONLY)
    except OSError as error:
        if not _is_about(error, path):
            raise
        raise _unwritable(path, nbytes, error) from error


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """`folder` exists inside the block. If it was missing and is empty at the end, it is removed, and so are parents
    that were missing. Raises OSError if it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, which must not exist, renamed to it at the end of the block.

    On any error it is removed. Raises WrongRequest, about `folder`, if it cannot be written.
    """
    temporary = folder
    try:
        with made(folder.parent), _claimed(folder, is_folder=True) as temporary:
            yield temporary
            temporary.rename(folder)
    except WrongRequest as error:  # about a file in it
        raise WrongRequest(str(error).replace(str(temporary), str(folder))) from error
    except OSError as error:
        if not _is_about(error, folder):
            raise
        raise _unwritable(folder, None, error) from error


def remove_leftover(path: Path) -> None:
    """Delete what a killed process left of a write to `path`, so that its bytes are free again."""
    with contextlib.suppress(OSError):
        if (temporary := _temporary(path)).is_file() and (lock := _locked(temporary)) is not None:
            temporary.unlink()
            os.close(lock)


def _temporary(path: Path, number: str = "0") -> Path:
    return path.with_name(f".{path.stem}.tmp-{number}{path.suffix}")


@contextlib.contextmanager
def _claimed(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """A temporary path for `path` that nobody else writes: the same each time, so that a leftover is used again, unless
    another process or thread is writing it. On any error it is removed.
    """
    temporary = _temporary(path)
    if (lock := _locked(temporary, is_folder)) is None:
        temporary = _temporary(path, secrets.token_hex(4))
    try:
        if is_folder and lock is None:
            temporary.mkdir()
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(temporary: Path, is_folder: bool = False) -> int | None:
    """A descriptor that locks `temporary`, a new or empty folder or a file that is still to be emptied; None if that is
    impossible.

    Not on Windows, where a file cannot be renamed while it is open.
    """
    if fcntl is None:
        return None
    lock = None
    try:
        if is_folder:
            temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_NOFOLLOW | (os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT), 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(temporary)):
            raise FileNotFoundError  # its owner has just renamed it
        for inner in temporary.iterdir() if is_folder else ():
            remove(inner)
        return lock
    except OSError as error:
        if lock is not None:
            if not isinstance(error, BlockingIOError | FileNotFoundError):
                remove(temporary)  # nobody can lock it here, so nobody would use it again
            os.close(lock)
        return None


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if that is possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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


def _is_about(error: OSError, path: Path) -> bool:
    """Whether `error` is about writing `path`, and not for example about another file that the block reads."""
    if error.filename is None:
        return error.errno in WRITE_ERRORS
    name, start = Path(error.filename), f".{path.stem}.tmp-"
    is_temporary = any(p.parent == path.parent and p.name.startswith(start) for p in (name, *name.parents))
    return is_temporary or name in (path, *path.parents)


def free_bytes(path: Path) -> int | None:
    """The bytes free on the disk of `path`, which need not exist; None where a network drive does not tell."""
    usage = shutil.disk_usage(existing_folder(path))
    return usage.free if usage.total else None


def existing_folder(path: Path) -> Path:
    """`path`, or the innermost folder around it that exists. Raises WrongRequest if not even its drive does."""
    folder = next((f for f in (path, *path.absolute().parents) if f.is_dir()), None)
    if folder is None:
        raise WrongRequest(f"{path} is on a drive that does not exist; choose another folder")
    return folder


def _unwritable(path: Path, nbytes: int | None, error: OSError) -> WrongRequest:
    if error.errno in FULL_DISK_ERRORS:
        needed = f"{nbytes:,} bytes are needed, " if nbytes is not None else ""
        free = "none is free"
        if path.parent.is_dir() and (left := free_bytes(path.parent)) is not None:
            free = f"{left:,} are free"
        kept = "; the existing file is unchanged" if path.exists() else ""
        problem = f"cannot be written because the disk is full ({needed}{free}){kept}"
        return WrongRequest(f"{path} {problem}; free some space and try again")
    return WrongRequest(f"{path} cannot be written ({error.strerror or error}); choose a folder that can be written to")
