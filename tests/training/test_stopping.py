"""Signals: the first asks, the second leaves; and a step that does not end is saved around."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fluxq.errors import Stopped
from fluxq.training import stopping
from fluxq.training.stopping import StopRequest

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.1)
    monkeypatch.setattr(stopping, "SAME", 0.1)
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]  # the tests' own may be ignored
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_stops(number):
    before = signal.getsignal(number)
    with StopRequest(lambda line: None, lambda: None) as asked:
        assert asked() is None
        signal.raise_signal(number)
        assert asked() == number
        signal.raise_signal(number)  # at once: a terminal that closes sends two
        time.sleep(0.15)
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(SIGNALS[0])
    assert stopped.value.exit_code == 128 + SIGNALS[0]
    assert signal.getsignal(number) == before


def test_the_last_finished_step_is_saved_while_one_takes_long():
    saved = []
    with StopRequest(lambda line: None, lambda: saved.append(time.monotonic())):
        signal.raise_signal(signal.SIGINT)
        asked_at = time.monotonic()
        assert not saved
        while not saved and time.monotonic() < asked_at + 10:
            time.sleep(0.01)
    assert len(saved) == 1 and saved[0] >= asked_at + 0.05


def test_a_step_that_ends_in_time_is_not_saved_around():
    saved = []
    with StopRequest(lambda line: None, lambda: saved.append(1)):
        signal.raise_signal(signal.SIGINT)
    assert not saved


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows ends a process that gets SIGTERM")
def test_a_main_thread_that_never_comes_back_to_python_is_left_at_the_second_signal():
    script = """
        import hashlib
        from fluxq.training import stopping
        stopping.PATIENCE = stopping.SAME = 0.2
        with stopping.StopRequest(lambda line: None, lambda: print("saved", flush=True)):
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes outside Python, like a long backward pass
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_an_ignored_signal_stays_ignored():
    """As under nohup."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP here")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(lambda line: None, lambda: None) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)
