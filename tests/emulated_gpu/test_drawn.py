"""The draw for three minutes keeps to its time, and leaves nothing out for ever."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("drawn")


def test_a_draw_fits_its_time_and_in_time_everything_is_drawn(drawn):
    items = [drawn.Item(kind, f"{kind} {i}", 8 + 5 * (i % 5)) for kind in drawn.KINDS for i in range(20)]
    left = set(items)
    for commit in map(str, range(200)):
        chosen = drawn.draw(items, commit, 170)
        starts = drawn.START * len({item.kind for item in chosen} - {"memory"})
        assert 170 - 12 < starts + sum(item.seconds for item in chosen) <= 170
        assert {item.kind for item in chosen} == set(drawn.KINDS)
        left -= set(chosen)
    assert not left
    assert drawn.draw(items, "a", 170) == drawn.draw(items[::-1], "a", 170) != drawn.draw(items, "b", 170)


RIGHT = {"peak_bytes": 1014, "predicted_peak_bytes": 1000, "reserved_bytes": 1000, "predicted_reserved_bytes": 1049}
RIGHT |= {"refused": 0, "retries": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"peak_bytes": 1016},
        {"peak_bytes": 984},
        {"predicted_reserved_bytes": 1051},
        {"predicted_reserved_bytes": 949},
        {"refused": 1},
        {"retries": 1},
    ],
)
def test_a_row_is_held_to_what_was_predicted(change, drawn):
    assert not list(drawn.wrongs(RIGHT))
    assert len(list(drawn.wrongs(RIGHT | change))) == 1
    assert list(drawn.wrongs({"failed": 1})) == ["it failed"]
