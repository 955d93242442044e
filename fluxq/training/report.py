"""The report of a run: a console line and a JSON line per step, a progress bar, the loss plot."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fluxq.console import Notify, console, progress_bars
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.memory.peak import peak_bytes, spill_note


@contextmanager
def stop_request(notify: Notify) -> Iterator[Callable[[], bool]]:
    """A function that returns whether Ctrl-C was pressed in this context. A second Ctrl-C stops at once."""
    requested = False

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        notify("stopping after this step; Ctrl-C again stops at once, without saving")

    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)


class Report:
    """The log of one run of `steps` steps, of which `start` are already done."""

    def __init__(self, folder: Path, start: int, steps: int, plot_seconds: float) -> None:
        self.path, self.plot_path = folder / "log.jsonl", folder / "loss.png"
        self.steps, self.plot_seconds = steps, plot_seconds
        self.records = [r for r in read_log(self.path) if r["step"] <= start]  # steps after the last save are repeated
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._started = self._plotted = time.monotonic()
        self._first = start
        self._bar = progress_bars()
        self._task = self._bar.add_task("training", total=steps, completed=start)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._file.close()
        if self.records:
            self.plot()

    def step(self, step: int, loss: float, learning_rate: float, grad: float, seconds: float) -> None:
        """Log an optimizer step: `step` steps are done now, and this one took `seconds`."""
        if note := spill_note():
            console.print(note)
        peak = peak_bytes()
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad": grad,
            "seconds": round(seconds, 4),
            "peak_bytes": peak,
        }
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        pace = (time.monotonic() - self._started) / (step - self._first)
        columns = (
            f"step {step:>5}/{self.steps}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.1e}",
            f"grad {grad:.2f}",
            _pace(seconds),
            *([f"{peak / 2**30:.1f} GiB"] if peak is not None else []),
            f"eta {_duration(pace * (self.steps - step))}",
        )
        console.print(" | ".join(columns))
        self._bar.update(self._task, completed=step)
        if time.monotonic() - self._plotted > self.plot_seconds:
            self.plot()
            self._plotted = time.monotonic()

    def sync(self) -> None:
        """Flush the log to the disk. A state saved afterward never has more steps than the log."""
        os.fsync(self._file.fileno())

    def plot(self) -> None:
        """Plot the loss of every step and the smoothed loss to loss.png. If that fails, print why and continue."""
        try:
            self._write_plot()
        except (WrongRequest, OSError) as error:
            console.print(f"could not write loss.png: {error}")

    def _write_plot(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps, losses = [r["step"] for r in self.records], [r["loss"] for r in self.records]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="each step")
        axes.plot(steps, smoothed(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(self.plot_path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)


def read_log(path: Path) -> list[dict]:
    """The records of a log.jsonl, in order, without a last line that a crash cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving averages with bias correction for their start."""
    total = norm = 0.0
    result = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def _pace(seconds: float) -> str:
    return f"{seconds:.2f} s/it" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.2f} it/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
