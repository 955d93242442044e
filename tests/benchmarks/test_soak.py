"""The long run is sampled, compared by its ends, and goes on in another process."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest

from benchmarks import soak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_was_ended_goes_on_and_is_reported_as_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "INTERVAL", 0.01)
    monkeypatch.setattr(soak, "SETTINGS", soak.SETTINGS.replace("adamw8bit", "adamw"))  # a second less a process

    def start(*options):
        monkeypatch.setattr(sys, "argv", ["soak", f"--work={tmp_path}", f"--out={tmp_path}", *options])
        soak.main()

    with contextlib.suppress(SystemExit):  # too short to compare, on a fast machine
        start("--steps=8")
    with contextlib.suppress(SystemExit):  # so few steps prove nothing
        start("--steps=30", "--resume")
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["steps"], found["processes"]) == (30, 2)
    assert found["tenths"]["rss_bytes"]["last"] > 100 << 20


def test_ends_are_compared_by_medians_and_by_cpu_time_of_each_process():
    samples = [
        dict(process=step // 500, step=step, cpu=step % 500 * 0.1, rss_bytes=100 + step // 10, open_files=5, threads=2)
        for step in range(1, 1001)
    ]
    found = soak.report(samples, 1000)
    assert (found["tenths"]["rss_bytes"]["first"], found["tenths"]["rss_bytes"]["last"]) == (105, 195)
    assert found["tenths"]["cpu_seconds_a_step"]["first"] == pytest.approx(0.1)
    assert found["tenths"]["threads"]["change"] == 0
    below_a_tick = [s | {"cpu": 0.0} if s["step"] < 100 else s for s in samples]
    assert soak.report(below_a_tick, 1000)["tenths"]["cpu_seconds_a_step"]["change"] == float("inf")
    with pytest.raises(SystemExit, match="too short"):
        soak.report(samples[:500], 1000)


def test_the_new_run_is_compared_with_the_old_one_while_both_run():
    """Both are slower than the first tenth by the same, as beside other programs."""
    same = dict(rss_bytes=100, open_files=5, threads=2)
    old = [
        dict(process=1, step=i, cpu=i * 0.1 + max(0, i - 900) * 0.02, at=i, new=False, **same) for i in range(1, 1001)
    ]
    new = [dict(process=2, step=i, cpu=min(i, 25) + i * 0.12, at=900 + i, new=True, **same) for i in range(1, 99)]
    found = soak.report([*old, *new], 1000)
    assert found["tenths"]["cpu_seconds_a_step"]["change"] == pytest.approx(0.2)
    assert found["tenths"]["cpu_seconds_beside_new"]["change"] == pytest.approx(0, abs=1e-9)
    assert found["processes"] == 1
