"""The console, its progress bars, and imports without log noise."""

from __future__ import annotations

import logging
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


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that shows one bar per stage."""
    with progress_bars() as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@contextmanager
def byte_bar(stage: str) -> Iterator[Callable[[int, int], None]]:
    """A function (bytes done, total bytes) that shows a bar with the speed."""
    with progress_bars(DownloadColumn(), TransferSpeedColumn()) as bars:
        task = bars.add_task(stage, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


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
