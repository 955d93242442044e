"""`make gpu`: the parts share one time limit, and run in order of importance."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_tests, session
from benchmarks.gpu_tests import FIRST, LAST, SANITIZED, files
from benchmarks.session import GRACE, PARTS, RESERVE, run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def clock(monkeypatch):
    """Parts that take the time in `takes`, by default all they may and GRACE more; records (module, seconds)."""
    now, started, takes = [0.0], [], {}

    def call(command, check):
        module = command[2].removeprefix("benchmarks.")
        seconds = float(command[-1].removeprefix("--deadline=")) - now[0]
        started.append((module, seconds))
        now[0] += takes.get(module, seconds + GRACE)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(session, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(session, "subprocess", SimpleNamespace(run=call))
    return SimpleNamespace(now=now, started=started, takes=takes)


def test_all_parts_together_keep_to_the_time(clock):
    run(list(PARTS), [], 540)
    assert clock.now[0] <= 540 + 1e-6
    assert [module for module, _ in clock.started] == [part.module for part in PARTS], "though each takes all it may"


def test_a_later_part_takes_nothing_from_an_earlier_one(clock):
    clock.takes["blocks"] = 1e6
    run(list(PARTS), [], 540 + RESERVE)
    seconds = dict(clock.started)
    assert all(seconds[part.module] == pytest.approx(part.seconds - GRACE) for part in PARTS)


def test_time_that_a_part_leaves_goes_to_the_next(clock):
    run(list(PARTS), [], 540)
    before = dict(clock.started)["gpu"]
    clock.started.clear()
    clock.now[0], clock.takes["gpu_tests"] = 0.0, 20.0
    run(list(PARTS), [], 540)
    assert dict(clock.started)["gpu"] > before * 1.2


def test_a_part_alone_has_all_the_time(clock):
    run([PARTS[1]], [], 540)
    assert clock.started == [("gpu", pytest.approx(540 - RESERVE - GRACE))]


def test_a_part_without_time_is_not_started(clock, capsys):
    assert run(list(PARTS), [], 60) == 1
    assert "tests: not started" in capsys.readouterr().out


def test_parts_write_few_enough_files_to_bring_back():
    assert len(PARTS) <= 8 and len({part.module for part in PARTS}) == len(PARTS)


def test_every_file_of_kernel_tests_is_run_once():
    named = files()
    assert named.pop(-1 - len(LAST)) == SANITIZED
    assert len(named) == len(set(named)) and all((ROOT / file).is_file() for file in named)
    assert {f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py")} < set(named)
    assert tuple(named[: len(FIRST)]) == FIRST and tuple(named[-len(LAST) :]) == LAST


def test_streaming_is_tested_again_under_the_sanitizer(monkeypatch):
    started = []

    def start(command, cwd, env):
        started.append((command[-1], "-k" in command, env.get("TORCH_CUDA_SANITIZER")))
        return SimpleNamespace(poll=lambda: 0, kill=lambda: None)

    monkeypatch.setattr(gpu_tests.subprocess, "Popen", start)
    runs = gpu_tests.Runs(["tests/test_gpu.py", SANITIZED], 1, 0)
    runs._fill()
    assert started == [("tests/test_gpu.py", False, None), ("tests/test_gpu.py", True, "1")]


def test_an_unknown_part_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["session", "kernel"])
    with pytest.raises(SystemExit, match="2"):
        session.main()
    assert "there is no part 'kernel'" in capsys.readouterr().err
