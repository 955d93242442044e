"""Signals that end a run: Ctrl-C, SIGTERM, a terminal or a Windows console that closes.

The first one asks: the step is finished and saved. A second one leaves at once. Python runs its signal handlers in the
main thread and only between two operations of Python, so a backward pass of a minute delays them; but who sends SIGTERM
often kills after ten seconds. So a second thread is told of signals too, by the C handler, and saves the last finished
step if the one that is running takes too long. Nothing of that state changes before the next update.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from fluxq.console import Notify
from fluxq.errors import Stopped

PATIENCE = 4.0
"""Seconds that a step may take to end before the last finished one is saved."""

SAME = 0.5
"""Seconds within which signals are one request: a terminal that closes sends SIGHUP, and often SIGTERM after it."""


def stop_signals() -> list[signal.Signals]:
    """The signals of this system that end a run, without those that are ignored (as by nohup). Windows sends SIGBREAK
    when a console closes.
    """
    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """In this context, signals ask instead of ending the process. Calling it returns the signal, or None so far.

    save_last_step: saves the last finished step, from another thread than the main one; it raises nothing.
    """

    def __init__(self, notify: Notify, save_last_step: Callable[[], None]) -> None:
        self._notify, self._save_last_step = notify, save_last_step
        self._signal: int | None = None
        self._first = 0.0
        self._left = threading.Event()

    def __call__(self) -> int | None:
        return self._signal

    def __enter__(self) -> StopRequest:
        self._catches = threading.current_thread() is threading.main_thread()  # only it can
        if self._catches:
            self._receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
            self._watcher = threading.Thread(target=self._watch, args=(set(self._handlers),), daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._catches:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._left.set()
            self._sender.close()  # the watcher reads the end, and ends
            self._watcher.join()
            self._receiver.close()

    def _on_signal(self, number: int, frame: object) -> None:
        """In the main thread."""
        if self._signal is None:
            self._signal, self._first = number, time.monotonic()
            self._notify("stopping after this step; a second signal stops at once, without saving")
        elif time.monotonic() - self._first > SAME:
            raise Stopped(number)

    def _watch(self, numbers: set[signal.Signals]) -> None:
        """In a thread of its own."""
        first, waits = 0.0, None
        while True:
            readable, _, _ = select.select([self._receiver], [], [], waits)
            if not readable:
                waits = None
                self._save_last_step()
                continue
            received = self._receiver.recv(1)
            if not received:
                return
            if received[0] not in numbers:
                continue
            if not first:
                first, waits = time.monotonic(), PATIENCE
            elif time.monotonic() - first > SAME and not self._left.wait(1.0):
                os._exit(128 + received[0])  # the main thread is in an operation that does not end
