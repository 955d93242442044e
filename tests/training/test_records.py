"""The steps of a run in memory: the same numbers, in few bytes."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from fluxq.training.records import Records

STEP = {"step": 3, "loss": 0.5, "grad": 0.25, "seconds": 0.125, "peak_bytes": 11 << 30}


def test_steps_come_back_as_they_were():
    records = Records([STEP, {"step": 4, "loss": math.nan, "grad": 1, "peak_bytes": None, "learning_rate": 1e-4}])
    assert records[0] == STEP and type(records[0]["step"]) is type(records[0]["peak_bytes"]) is int
    assert math.isnan(records[-1]["loss"]) and records[-1]["seconds"] == records[-1]["peak_bytes"] == 0
    assert [r["step"] for r in records] == [r["step"] for r in records[-5:]] == [*records.column("step")] == [3, 4]
    assert records[1:0] == [] and not Records()
    with pytest.raises(IndexError):
        records[2]


def test_a_step_takes_40_bytes():
    records = Records()
    tracemalloc.start()
    for step in range(10_000):
        records.append(STEP | {"step": step, "loss": step / 7})
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 10_000 * 40 * 1.2, "an array has room for an eighth more"


@pytest.mark.parametrize(
    "change",
    [
        *({"loss": "0.5"}, {"grad": [1]}, {"seconds": 10**400}, {"step": None}, {"step": math.nan}),
        *({"peak_bytes": math.inf}, {"peak_bytes": math.nan}, {"seconds": math.inf}),
    ],
)
def test_a_step_that_is_not_made_of_numbers_is_refused_whole(change):
    records = Records()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        records.append(STEP | change)
    assert len(records) == 0 and not any(len(records.column(name)) for name in STEP)
