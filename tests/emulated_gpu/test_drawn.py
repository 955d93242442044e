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
    items = [drawn.Item(kind, f"{kind} {i}", 8 + 3 * (i % 5)) for kind in drawn.KINDS for i in range(20)]
    left = set(items)
    for commit in map(str, range(200)):
        chosen = drawn.draw(items, commit, 170)
        starts = drawn.START * len({item.kind for item in chosen} & set(drawn.TESTED))
        assert 170 - 12 < starts + sum(item.seconds for item in chosen) <= 170
        assert {item.kind for item in chosen} == set(drawn.KINDS)
        left -= set(chosen)
    assert not left
    assert drawn.draw(items, "a", 170) == drawn.draw(items[::-1], "a", 170) != drawn.draw(items, "b", 170)
