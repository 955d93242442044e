"""The page of launches and host time, from rows as the emulated GPU gives them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import emulated_host
from benchmarks.emulated_host import ROWS, TABLE, add_rows, differences, page, recounted
from fluxq.offload.launches import SEQUENCE

ABOUT = {"torch": "2", "packages": {"triton": "3"}, "python": "3.11", "commit": "0123456789abcdef"}


def row(number: int, launches: int = 4000, ms: float = 300.0) -> dict:
    counted = {"launches": launches, "predicted_launches": 5000, "synchronizations": 2, "pageable_copies": 1}
    counted |= {"copies": {"GPU to host": 1, "host to GPU": 6}, "cpu_ms": {"best": ms, "median": ms}}
    return ROWS[number]._asdict() | counted | {"add_us": 1.5, "sequence_us": 60.0 * SEQUENCE, "about": ABOUT}


def test_a_row_replaces_that_of_the_same_setting_and_the_page_has_the_error(tmp_path):
    path = tmp_path / "rows.json"
    add_rows(path, [row(1), row(0, launches=1), row(0, ms=250.0)], ROWS[0]._fields)
    rows = json.loads(path.read_text())
    assert [r["compute"] for r in rows] == ["int8_dx", "bf16"]
    text = page(rows)
    first, second = text.splitlines()[-2:]
    assert "| 4000 | 5000 | 2 | 7 | 1 | 250, 250 | 167 | 300 | +20% |" in first and "| 300 | +0% |" in second
    assert "error of that prediction is 20%" in text
    assert f"{1.1 * SEQUENCE:.1f} launches" in text and "0123456789," not in text and "0123456789" in text


@pytest.mark.parametrize("field", ["gpu", "resolution", "format", "compute", "policy", "swap"])
def test_settings_differ_in_every_choice(field):
    assert len({getattr(r, field) for r in ROWS}) > 1 and len(set(ROWS)) == len(ROWS) >= 10


@pytest.mark.parametrize(("more", "said"), [(0, 0), (-1, 2), (1, 2)])
def test_a_step_must_count_what_the_table_says(more, said, monkeypatch):
    known = json.loads(TABLE.read_text(encoding="utf-8"))[0]
    row = next(row for row in ROWS if all(known[name] == value for name, value in row._asdict().items()))
    copies = {**known["copies"], "GPU to host": known["copies"]["GPU to host"] + more}
    counted = known | {"launches": known["launches"] + more, "copies": copies}
    monkeypatch.setattr(emulated_host, "prepared", lambda row: (None, None))
    monkeypatch.setattr(emulated_host, "counts", lambda step: counted)
    assert len(differences(row)) == said


def test_rows_can_be_counted_again_without_new_times(monkeypatch):
    known = json.loads(TABLE.read_text(encoding="utf-8"))[0]
    setting = next(row for row in ROWS if all(known[name] == value for name, value in row._asdict().items()))
    monkeypatch.setattr(emulated_host, "prepared", lambda row: (SimpleNamespace(launches=7), None))
    monkeypatch.setattr(emulated_host, "counts", lambda step: {"launches": 5})
    monkeypatch.setattr(emulated_host, "commit", lambda: "fedcba9876543210")
    found = recounted(setting, TABLE)
    assert found == known | {"launches": 5, "predicted_launches": 7, "counted": "fedcba9876543210"}
    assert "counted at commit fedcba9876 and timed at" in page([found])
