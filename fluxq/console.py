"""The console, its progress bars, and imports without log noise.

Without a terminal, as in a container's log, a line every ten seconds replaces the bar.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment

from fluxq.errors import ESCAPED, one_line


class SafeConsole(Console):
    """A console that prints text as it is, a line for each string; and that may go away: a closed terminal or a full
    disk ends no run.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*(one_line(o) if isinstance(o, str) else o for o in objects), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Also the cells of tables and the labels of progress bars."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(ESCAPED), segment.style)


console = SafeConsole(highlight=False, soft_wrap=True, markup=False, emoji=False)

Notify = Callable[[str], None]
"""Shows the user one line: a choice and its reason, an event, a warning."""


def silent(line: str) -> None:
    """A Notify that shows nothing."""


def plural(count: int, noun: str) -> str:
    """ "1 image", "2 images", "1,000 batches"."""
    ending = "" if count == 1 else "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{count:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """ "0m05s", "2h03m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def pace(seconds: float) -> str:
    """ "1.20 s/it", "3.00 it/s"."""
    return f"{seconds:.2f} s/it" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.2f} it/s"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that shows one bar per stage."""
    with progress_bars() as bars, Lines() as lines:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)
            lines.show(stage, done, total)

        yield show


@contextmanager
def byte_bar(stage: str) -> Iterator[Callable[[int, int], None]]:
    """A function (bytes done, total bytes) that shows a bar with the speed."""
    with progress_bars(DownloadColumn(), TransferSpeedColumn()) as bars, Lines(in_bytes=True) as lines:
        task = bars.add_task(stage, total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)
            lines.show(stage, done, total)

        yield show


@contextmanager
def working(stage: str) -> Iterator[None]:
    """While `stage` lasts, of which nobody knows how far it is, a line every ten seconds without a terminal."""
    with Lines() as lines:
        lines.show(stage, 0, 0)
        yield


class Lines:
    """Progress without a terminal: a line when EVERY seconds have passed without one, also if nothing was reported in
    them. A stage that has ended is not mentioned.
    """

    EVERY = 10.0

    def __init__(self, in_bytes: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._in_bytes, self._clock = in_bytes, clock
        self._stage, self._first, self._done, self._total = "", 0, 0, 0
        self._began = self._said = clock()
        self._left = threading.Event()

    def __enter__(self) -> Lines:
        if not console.is_terminal:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()

    def show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._done:
            self._began, self._first = self._clock(), done
        self._stage, self._done, self._total = stage, done, total

    def line(self) -> str | None:
        """The line that is due now, if one is."""
        now, stage, done, total = self._clock(), self._stage, self._done, self._total
        if now < self._said + self.EVERY or not stage or done >= total > 0:
            return None
        self._said, so_far, of_it = now, now - self._began, done - self._first
        count = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, " if self._in_bytes else f"{done:,} of {total:,}, "
        rest = f"about {duration(so_far * (total - done) / of_it)} left" if of_it else f"{duration(so_far)} so far"
        return f"{stage}: {count if total else ''}{rest}"

    def _watch(self) -> None:
        while not self._left.wait(self.EVERY / 20):
            if line := self.line():
                console.print(line)


def progress_bars(*columns: ProgressColumn) -> Progress:
    """rich's progress display in fluxq's style. It shows nothing if the output is not a terminal."""
    shown = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        *(columns or [MofNCompleteColumn()]),
        TimeRemainingColumn(),
    )
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop log lines up to the level of warnings.

    On some CPUs, importing bitsandbytes warns about kernels that it looks for on a hub. Users cannot act on that.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
