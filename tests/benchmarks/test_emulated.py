"""The memory table: what was measured on the emulated GPU still agrees with what is predicted."""

from __future__ import annotations

import pytest

from benchmarks import emulated
from benchmarks.emulated import ROWS, SECTIONS, page, read

ROW = next(row for row in ROWS.values() if row.policy == "keep_all8")


def measured(**changes) -> dict:
    kept = {
        "format": "nf4",
        "resident": 0,
        "slots": 8,
        "offload": False,
        "look_ahead": 64,
        "policies": ["keep_all8"] * 57,
    }
    ran = {"retries": 0, "refused": 0, "free_gib": 20.0, "norms": [304, 0], "flash": 228, "eight_bits": 0}
    row = {"commit": "c0ffee", "peak_gib": 12.65, "reserved_gib": 13.82} | kept | ran | changes
    return {ROW.name: row}


def test_every_row_has_a_name_of_its_own():
    assert len(ROWS) == sum(len([*rows()]) for rows in SECTIONS.values())


def test_a_row_as_predicted_is_right():
    text, wrong = page(measured(), {"torch": "2"})
    assert not wrong and "| 57 keep_all8 |" in text and "Commit c0ffee" in text


def test_a_default_plan_is_of_the_gpu_s_own_memory():
    own = {row.name: measured()[ROW.name] for row in SECTIONS["default"]() if row.resolution == 1024}
    text, wrong = page(own, {})
    assert "| rtx4090 |" in text and "| rtx3060, 8 GiB |" in text and not any("keep" in line for line in wrong)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peak_gib": 12.9}, "12.900 GiB alive"),
        ({"reserved_gib": 14.7}, "14.700 GiB reserved"),
        ({"retries": 1}, "1 tried again"),
        ({"norms": [300, 4]}, "and from qkv"),
        ({"flash": 0}, "flash attention ran 0 times"),
        ({"eight_bits": 4}, "4 products ran in 8 bits"),
    ],
)
def test_what_is_off_is_named(changes, what):
    (wrong,) = page(measured(**changes), {"torch": "2"})[1]
    assert wrong.startswith(ROW.name) and what in wrong


@pytest.mark.slow
def test_the_table_agrees_with_today_s_predictions():
    rows = read()
    assert rows and not page(rows, read("versions"))[1]


def test_rows_are_measured_on_a_gpu_of_their_size(monkeypatch):
    seen = []

    def run(command, **options):
        seen.append((command, options["env"]))
        return type("Done", (), {"returncode": 7})

    monkeypatch.setattr(emulated.subprocess, "run", run)
    assert emulated.in_its_own_process(ROW) == {"failed": 7}
    ((command, environment),) = seen
    assert command[command.index("--total") + 1] == str(int(1024 * 0.98 * 24)) and command[-1] == ROW.name
    assert environment["PYTORCH_ALLOC_CONF"] == f"expandable_segments:{ROW.grows}"
