"""What is printed for people."""

from __future__ import annotations

import io
import subprocess
import sys
import threading

import pytest

from fluxq.console import Lines, SafeConsole, byte_bar, console, plural, progress_bar, working


def test_a_count_has_its_noun_in_the_right_number():
    assert [plural(n, "image") for n in (0, 1, 2, 3000)] == ["0 images", "1 image", "2 images", "3,000 images"]


def test_control_characters_in_a_name_are_shown_and_not_sent():
    console = SafeConsole(file=(file := io.StringIO()), soft_wrap=True, markup=False)
    console.print("images/\x1b[2Ja\x07\x9b\u202e.png\nerror: forged", "next", sep="\n")
    assert file.getvalue() == "images/\\x1b[2Ja\\x07\\x9b\\u202e.png\\nerror: forged\nnext\n"


def test_a_console_that_is_gone_ends_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    SafeConsole(file=Gone()).print("step 1")


@pytest.mark.slow
def test_what_the_console_cannot_print_is_escaped():
    script = "from fluxq.cli.main import main; main(['lora', 'info', '\\u732b\\udce9.safetensors'])"
    command = [sys.executable, "-X", "utf8=0", "-c", script]
    done = subprocess.run(command, env={"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"\\u732b\\udce9.safetensors does not exist" in done.stderr


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_ten_seconds_with_what_is_left():
    clock, said = Clock(), []
    lines = Lines(clock=clock)
    for second in range(36):
        if second % 3 == 0:
            lines.show("hashing", second // 3 + 1, 21)
        if line := lines.line():
            said.append((second, line))
        clock.now += 1
    assert said == [
        (10, "hashing: 4 of 21, about 0m57s left"),
        (20, "hashing: 7 of 21, about 0m47s left"),
        (30, "hashing: 11 of 21, about 0m30s left"),
    ]


def test_a_log_gets_its_line_from_work_that_reports_nothing_for_long_and_none_once_it_is_done():
    clock = Clock()
    lines = Lines(in_bytes=True, clock=clock)
    clock.now += 60
    assert lines.line() is None  # nothing has begun
    lines.show("quantizing", 0, 12_000_000_000)
    assert lines.line() == "quantizing: 0.0 of 12.0 GB, 0m00s so far"
    clock.now += 12
    assert lines.line() == "quantizing: 0.0 of 12.0 GB, 0m12s so far"
    clock.now += 60
    lines.show("quantizing", 12_000_000_000, 12_000_000_000)
    assert lines.line() is None


def test_every_kind_of_progress_prints_without_a_terminal_and_ends_its_thread(monkeypatch):
    printed = {}
    monkeypatch.setattr(Lines, "EVERY", 0.0)
    monkeypatch.setattr(console, "print", lambda line: printed.setdefault(line.split(":")[0], threading.Event()).set())
    before = threading.active_count()
    with progress_bar() as show, byte_bar("quantizing") as show_bytes, working("loading"):
        show("images", 1, 2)
        show_bytes(1, 2)
        for stage in ("images", "quantizing", "loading"):
            assert printed.setdefault(stage, threading.Event()).wait(10)
    for thread in threading.enumerate()[before:]:
        thread.join(10)
    assert threading.active_count() == before


def test_a_terminal_has_bars_and_no_lines(monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    before = threading.active_count()
    with Lines():
        assert threading.active_count() == before
