"""The log and the plot: resumable, readable, written during the run."""

from __future__ import annotations

import errno
import gc
import json
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from fluxq.console import console
from fluxq.memory import peak as module
from fluxq.memory.machine import GPUBytes, SpillWatch
from fluxq.training.report import Report, read_log, smoothed
from fluxq.training.state import Measured, Validated


def write(folder, start, steps, done):
    with Report(folder, start, steps, plot_seconds=0) as report:
        for step in range(start + 1, done + 1):
            report.step(step, loss=1 / step, learning_rate=1e-4, grad=0.5, seconds=0.1)


def test_steps_after_the_last_save_are_dropped_on_resume(tmp_path):
    write(tmp_path, 0, 10, 7)
    write(tmp_path, 5, 10, 10)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 11))


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path):
    write(tmp_path, 0, 3, 3)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_one_console_line_per_step_with_its_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "stderr", False)
    write(tmp_path, 0, 2000, 1)
    (line,) = capsys.readouterr().out.strip().splitlines()
    columns = [column.split()[0] for column in line.split(" | ")]
    assert line.startswith("step     1/2000 | loss 1.0000 | lr 1.0e-04 | grad 0.50 | 10.00 it/s | ")
    assert columns[-1] == "eta"


def test_the_plot_is_an_image(tmp_path, plots):
    write(tmp_path, 0, 3, 3)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 450)


def measured(step: int, loss: float) -> Measured:
    return Measured(step, {"loss": loss}, {"split": {"loss": loss}}, {"loss": loss / 2})


def logged_validations(folder: Path) -> list[tuple[int, float | None]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        (line["validation"]["step"], line["validation"]["held_out"]["loss"]) for line in lines if "validation" in line
    ]


def test_validations_are_logged_once_and_plotted_with_the_best(tmp_path, plots):
    first, losses = measured(0, 5.0), {2: 3.0, 4: math.nan, 6: 4.0}
    with Report(tmp_path, 0, 6, 1e9, validated=Validated(first, first, first)) as report:
        for step in range(1, 7):
            report.step(step, loss=1.0, learning_rate=1e-4, grad=0.5, seconds=0.1)
            if step in losses:
                report.validated(measured(step, losses[step]), 0.5)
    held_out, training, best, base = [line.get_data() for line in report._plot.figure.axes[1].lines]
    assert [*held_out[0]] == [*training[0]] == [0, 2, 4, 6] and [*best[0], *best[1]] == [2, 3.0]
    assert [*base[0], *base[1]] == [0, 6, 5, 5]
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (800, 900)
    assert logged_validations(tmp_path) == [(0, 5.0), (2, 3.0), (4, None), (6, 4.0)]
    state = Validated(first, first, measured(4, math.nan))  # that of step 6 came after the last save
    with Report(tmp_path, 5, 6, 1e9, validated=state) as report:
        report.step(6, loss=1.0, learning_rate=1e-4, grad=0.5, seconds=0.1)
        report.validated(measured(6, 3.5), 0.5)
    assert logged_validations(tmp_path) == [(0, 5.0), (2, 3.0), (4, None), (6, 3.5)]
    assert [found.step for found in report.validations] == [0, 2, 4, 6]
    (tmp_path / "log.jsonl").unlink()
    with Report(tmp_path, 5, 6, 1e9, validated=state) as report:
        assert [found.step for found in report.validations] == [0, 4], "what the state has"


def test_plotting_again_leaves_nothing_to_collect(tmp_path, plots):
    """Else each plot keeps megabytes until Python's rare full collection."""
    with Report(tmp_path, 0, 3, plot_seconds=0) as report:
        report.step(1, loss=1.0, learning_rate=1e-4, grad=0.5, seconds=0.1)
        gc.collect()
        report.plot()
        assert gc.collect() < 100  # a figure is thousands of objects


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plot_of_many_steps_takes_no_more_memory_than_that_of_few(tmp_path, plots):
    with Report(tmp_path, 0, 3, plot_seconds=1e9) as report:
        for count, grown in ((1000, None), (20_000, 20 << 20)):
            before = resident()
            for step in range(len(report.records), count):
                report.records.append({"step": step, "loss": step * 0.618 % 1, "grad": 1.0})
            report.plot()
            assert grown is None or resident() - before < grown


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([2.0, 4.0])[0] == pytest.approx(2.0)
    assert 2.0 < smoothed([2.0, 4.0])[1] < 4.0


def test_memory_that_the_driver_spills_is_printed_after_the_step_that_shows_it(tmp_path, monkeypatch, capsys):
    states = iter([GPUBytes(100 << 30, 90 << 30, 0), GPUBytes(100 << 30, 50 << 30, 40 << 30)])
    full = GPUBytes(100 << 30, 0, 120 << 30)
    monkeypatch.setattr(console, "stderr", False)
    monkeypatch.setattr(module, "SpillWatch", lambda: SpillWatch(lambda: next(states, full)))
    module.reset_peak()
    with Report(tmp_path, 0, 3, 0) as running:
        for step in (1, 2, 3):
            running.step(step, 1.0, 1e-4, 0.5, 1.0)
    lines = capsys.readouterr().out.splitlines()
    noted = ["about 30.0 GiB" in line for line in lines if "system memory" in line or line.startswith("step")]
    assert noted == [False, True, False, False]
    monkeypatch.undo()
    module.reset_peak()


def test_lines_that_the_disk_does_not_take_wait_and_are_written_once(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, data):
            if self.full:
                if len(data) > 10:
                    return self.file.write(data[:10])  # a part, then nothing
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(console, "stderr", False)
    with Report(tmp_path, 0, 5, 1e9) as report:
        report._file = disk = Full(report._file)
        for step in range(1, 4):
            report.step(step, 1.0, 1e-4, 0.5, 0.1)
        disk.full = False
        for step in range(4, 6):
            report.step(step, 1.0, 1e-4, math.nan, 0.1)
        report.sync()
        assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("its lines wait in memory") == 1
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert math.isnan(read_log(tmp_path / "log.jsonl")[-1]["grad"])
