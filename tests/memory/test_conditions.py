"""What a machine does beside a run, read and compared."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fluxq.memory import conditions
from fluxq.memory.conditions import differences, nvidia_smi, read_conditions

GIB = 2**30
CALM = {"others": GIB, "resident": 8 * GIB, "swapped": 0.0, "available": 4 * GIB, "clock": 2500.0, "heat": 60.0}
CALM |= {"limit": 450.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"others": 1.4 * GIB, "resident": 8.4 * GIB, "clock": 2300, "watts": 100, "available": 1 * GIB}, []),
        ({"others": 3.1 * GIB}, ["the GPU memory of other programs grew from 1.0 to 3.1 GiB"]),
        (
            {"resident": 12 * GIB, "swapped": GIB},
            ["this process's RAM grew from 8.0 to 12.0 GiB", "what is swapped out"],
        ),
        ({"clock": 1200, "heat": 91}, ["the GPU's clock fell from 2500 to 1200 MHz at 91 °C"]),
        ({"limit": 150}, ["the GPU's power limit fell from 450 to 150 W"]),
        ({"available": GIB / 4}, ["only 0.2 GiB of RAM are available"]),
    ],
)
def test_only_what_is_worse_is_said(changes, said):
    found = differences(CALM, CALM | changes)
    assert len(found) == len(said) and all(map(str.startswith, found, said))
    assert differences({}, CALM | changes) == differences(CALM, {}) == [], "what is not known did not change"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_this_process_is_found():
    found = read_conditions()
    assert 1 << 24 < found["resident"] < 1 << 40 and found["available"] > 0 and "swapped" in found


def test_a_driver_that_does_not_answer_tells_nothing(monkeypatch):
    properties = type("Properties", (), {"uuid": "0-1"})
    monkeypatch.setattr(conditions.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(conditions.torch.cuda, "get_device_properties", lambda device: properties)

    def smi(answer):
        def run(command, **options):
            assert command[0] == "nvidia-smi" and command[-1] == "--id=GPU-0-1" and options["timeout"]
            if isinstance(answer, Exception):
                raise answer
            return subprocess.CompletedProcess(command, 0, answer)

        monkeypatch.setattr(conditions.subprocess, "run", run)
        return nvidia_smi(["clocks.sm", "driver_version"])

    assert smi("1980, 580.65.06\n") == ["1980", "580.65.06"]
    assert smi(FileNotFoundError("nvidia-smi")) == smi(subprocess.TimeoutExpired("nvidia-smi", 5)) == []
