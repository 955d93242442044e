"""The report of a run: a console line and a JSON line per step, a progress bar, the loss plot."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxq.console import console, duration, pace, progress_bars
from fluxq.errors import WrongRequest
from fluxq.formats.atomic import atomic_path
from fluxq.formats.checkpoint.files import MALFORMED
from fluxq.memory.peak import peak_bytes, spill_note

from .health import Health
from .records import Records
from .watch import Watch

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg


class Report:
    """The log of one run of `steps` steps, of which `start` are already done. changes: what resuming it changed. watch:
    what they are compared with. notes: more for the line of each step, as they are then.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        steps: int,
        plot_seconds: float,
        changes: Sequence[str] = (),
        watch: Watch | None = None,
        notes: Mapping[str, int] | None = None,
    ) -> None:
        self.path, self.plot_path = folder / "log.jsonl", folder / "loss.png"
        self.steps, self.plot_seconds, self._notes = steps, plot_seconds, {} if notes is None else notes
        # steps after the last save are repeated, and so are changes that no save knows
        kept = [r for r in _records(self.path) if r.get("step", 0) <= start and r.get("change") in (None, *changes)]
        said = {r.get("change") for r in kept}
        kept += [{"change": change} for change in changes if change not in said]
        self.records = Records(r for r in kept if "step" in r)  # what the plot and `health` read
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""  # lines that the disk has not taken yet
        self._started = self._plotted = time.monotonic()
        self._first = start
        self.health, self._watch = Health(self.records, watch), watch
        self._plot: FigureCanvasAgg | None = None
        self._bar = progress_bars()
        self._task = self._bar.add_task("training", total=steps, completed=start)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._write()
        self._file.close()
        if exception[0] is None and (line := self.health.ended()):
            console.print(line)
        if self.records:
            self.plot()

    def step(self, step: int, loss: float, learning_rate: float, grad: float, seconds: float) -> None:
        """Log an optimizer step: `step` steps are done now, and this one took `seconds`.

        Raises WrongRequest if too many steps had no finite gradient.
        """
        if note := spill_note():
            console.print(note)
        peak = peak_bytes()
        record = {"step": step, "loss": loss, "grad": grad, "seconds": round(seconds, 4), "peak_bytes": peak}
        self.records.append(record)
        more = {"images": self._watch.images_seen(step)} if self._watch else {}
        self._write(_line(record | {"learning_rate": learning_rate} | more | {**self._notes}))
        per_step = (time.monotonic() - self._started) / (step - self._first)
        columns = (
            f"step {step:>5}/{self.steps}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.1e}",
            f"grad {grad:.2f}",
            pace(seconds),
            *([f"{peak / 2**30:.1f} GiB"] if peak is not None else []),
            f"eta {duration(per_step * (self.steps - step))}",
        )
        console.print(" | ".join(columns))
        for line in self.health.check():
            console.print(line)
        self._bar.update(self._task, completed=step)
        if time.monotonic() - self._plotted > self.plot_seconds:
            self.plot()
            self._plotted = time.monotonic()

    def sync(self) -> None:
        """Flush the log to the disk, if that takes it. A state saved afterward has no more steps than the log then."""
        self._write()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def _write(self, line: str = "") -> None:
        """Add `line` to the log. Lines that cannot be written wait in memory."""
        could, self._waiting = not self._waiting, self._waiting + line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if could:
                console.print(f"could not write {self.path} ({error.strerror}); its lines wait in memory")

    def plot(self) -> None:
        """Plot the loss of every step and the smoothed loss to loss.png. If that fails, print why and continue."""
        try:
            self._write_plot()
        except (WrongRequest, OSError) as error:
            console.print(f"could not write loss.png: {error}")

    def _write_plot(self) -> None:
        import matplotlib

        steps, losses = self.records.column("step"), self.records.column("loss")
        self._plot = canvas = self._plot or _empty_plot()  # kept: a figure has cycles, which hold megabytes for long
        axes = canvas.figure.axes[0]
        every = 1 + len(steps) // 4000  # the image is 800 pixels wide
        for line, values in zip(axes.lines, (losses, smoothed(losses)), strict=True):
            line.set_data(steps[::every], values[::every])
        axes.relim()
        axes.autoscale_view()
        with matplotlib.rc_context({"agg.path.chunksize": 1000}), atomic_path(self.plot_path) as temporary:
            canvas.print_png(temporary)  # in pieces: Agg keeps 6 KB for each point of a noisy line


def _empty_plot() -> FigureCanvasAgg:
    """Axes with two lines, of each step's loss and of the smoothed loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([], color="#b8c4d6", linewidth=0.8, label="each step")
    axes.plot([], color="#1f4e9c", linewidth=1.8, label="smoothed")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return FigureCanvasAgg(figure)


def read_log(path: Path) -> list[dict]:
    """The steps in a log.jsonl, in order, without lines that a crash cut off or a disk damaged."""
    return [record for record in _records(path) if "step" in record]


def _records(path: Path) -> list[dict]:
    """The steps, and between them what was changed when the run was resumed: {"change": "after step 4: ..."}."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(*MALFORMED):
            record = _with_nan(json.loads(line))
            if isinstance(record.get("change"), str):
                records.append({"change": record["change"]})
                continue
            Records([record])  # raises for what is not a number
            if type(record["step"]) is int and abs(record["step"]) < 2**53:
                records.append(record)
    return records


def _line(record: dict) -> str:
    return json.dumps({key: None if value != value else value for key, value in record.items()}) + "\n"


def _with_nan(record: dict) -> dict:
    """The opposite of `_line`, which writes null for NaN: JSON has no NaN."""
    return record | {key: math.nan for key in ("loss", "grad") if record.get(key, 0) is None}


def smoothed(values: Sequence[float], weight: float = 0.95) -> array[float]:
    """Exponential moving averages with bias correction for their start, over the values that are finite."""
    total = norm = 0.0
    result = array("d")
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result
