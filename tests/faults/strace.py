"""What strace counts of the calls that interpose.c counts, for a program in a process of its own."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

KINDS = {
    "write": ("write", "pwrite64", "writev", "pwritev", "pwritev2"),
    "fsync": ("fsync", "fdatasync"),
    "rename": ("rename", "renameat", "renameat2"),
    "mkdir": ("mkdir", "mkdirat"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "open": ("open", "openat", "creat"),
    "truncate": ("ftruncate", "truncate"),
    "mmap": ("mmap",),
    "not counted": ("sendfile", "copy_file_range", "splice", "link", "linkat", "symlink", "symlinkat", "fallocate"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
LARGE = 1 << 20


def counted(command: Sequence[str], root: Path, environment: Mapping[str, str]) -> dict[str, int]:
    """kind -> calls that concern files below `root`, where the command runs."""
    log = root.parent / "strace"
    call = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={','.join(KIND_OF)}", "-o", log, *command]
    subprocess.run(call, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    count: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        if match := re.match(r"\d+ +(\w+)\((.*)", line):
            kind = KIND_OF[match[1]]
            count[kind] += counts(kind, match[2], root)
    return {kind: calls for kind, calls in sorted(count.items()) if calls}


def counts(kind: str, arguments: str, root: Path) -> bool:
    """Whether interpose.c counts the call of `kind` with these arguments, as strace prints them."""
    if kind == "open" and not re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
        return False
    if kind == "mmap" and int(arguments.split(", ")[1]) < LARGE:
        return False
    if kind == "mmap" and "MAP_SHARED" in arguments and ", -1, " in arguments:
        return True
    on_descriptor = kind in ("write", "fsync", "mmap") or (kind == "truncate" and arguments[0].isdigit())
    names = re.findall(r"<([^>]*)>" if on_descriptor else r'"([^"]*)"', arguments)
    return bool(names) and (root / names[0 if on_descriptor else -1]).is_relative_to(root)
