"""interpose.c from Python: armed in forks of this process, which run.py has started with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

EXIT_CODE = 99
"""Of a process that its fault ends."""
PATIENCE = 120
"""Seconds after which a command hangs."""


@dataclass(frozen=True)
class Fault:
    """The number of a call, from 1, and the errno that it fails with, 0 to end the process there."""

    number: int
    error: int


@dataclass(frozen=True)
class Outcome:
    """code: minus a signal, if one ended it. fired: whether the fault came, None if the process ended otherwise."""

    code: int
    output: str
    fired: bool | None


@cache
def functions() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["FAULTS_SHIM"])
    os.environ.pop("LD_PRELOAD", None)  # what a command starts is not disturbed
    library.faults_disarm.restype = ctypes.c_long
    library.faults_arm.argtypes = ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p
    return library


def forked(work: Callable[[], object], root: Path, fault: Fault | None = None, calls: Path | None = None) -> Outcome:
    """Run `work` in a fork of this process, in the folder `root`, and wait for its end. It may exit with a code.

    The fault counts the calls that concern files below root; without one, `calls` gets a line for each.
    """
    with tempfile.TemporaryFile(dir=root.parent) as output:
        pid = os.fork()
        if pid == 0:
            _run(work, root, fault or Fault(0, 0), calls, output.fileno())
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        *lines, last = output.read().decode(errors="replace").split("\n")
    fired = {"fired": True, "calm": False}.get(last)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, "\n".join(lines if fired is not None else [*lines, last]), fired or code == EXIT_CODE)


def _run(work: Callable[[], object], root: Path, fault: Fault, calls: Path | None, output: int) -> None:
    """What the child does. Its last word is whether the fault came."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(root)
        signal.alarm(PATIENCE)
        functions().faults_arm(os.fsencode(root), fault.number, fault.error, calls and os.fsencode(calls))
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        came = functions().faults_disarm() > 0
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, b"\nfired" if came else b"\ncalm")
    finally:
        os._exit(code)
