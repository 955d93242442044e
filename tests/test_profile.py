"""`fluxq profile`: a row for every block-swap setting, in the numbers that sd-scripts' users know, marked predicted."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from PIL import Image

from fluxq.cli import main


def rows(*arguments: str) -> list[dict]:
    result = CliRunner().invoke(main, ["profile", "--json", *arguments])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["predicted"] is True and "nothing here was measured" in result.stderr
    return answer["rows"]


def test_every_setting_has_a_row_and_what_is_swapped_is_saved(tmp_path: Path):
    found = rows("--card", "rtx4060ti", "--size", "512", "--size", "1024", "--format", "nf4", "--out", str(tmp_path))
    assert [r["blocks_to_swap"] for r in found] == 2 * [0, 8, 16, 18, 22, 28, 35, 38]
    assert [r["resident_units"] for r in found] == 2 * [76, 60, 44, 40, 32, 20, 6, 0]
    for size in (512, 1024):
        own = [r for r in found if r["size"] == size]
        peaks = [r["peak_gib"] for r in own]
        assert peaks == sorted(peaks, reverse=True)
        assert own[-1]["gb_moved_per_step"] > own[0]["gb_moved_per_step"]
        for r in own:
            assert abs(sum(r["peak_gib_by_owner"].values()) - r["peak_gib"]) < 0.01
    for name in ("profile", "timeline"):
        assert Image.open(tmp_path / f"{name}_rtx4060ti.png").size == (800, 450)
    assert json.loads((tmp_path / "profile_rtx4060ti.json").read_text())["rows"] == found


def test_a_slow_bus_before_a_fast_card_is_said_to_bind():
    stalls = {
        name: rows("--card", name, "--size", "512", "--format", "int8", "--compute", "int8")[-1]
        for name in ("rtx3060", "rtx4090")
    }
    assert stalls["rtx4090"]["bound_by"] == "bus" and stalls["rtx4090"]["stall"] > stalls["rtx3060"]["stall"]


def test_an_unknown_card_lists_those_known():
    result = CliRunner().invoke(main, ["profile", "--card", "voodoo2"])
    assert result.exit_code == 2 and "rtx3060" in result.stderr
