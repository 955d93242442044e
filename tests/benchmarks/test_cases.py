"""A part of `make gpu`: every case leaves a row, even if others fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import in_words, summary, supervise, target
from benchmarks.roofline import block_ms, predicted_ms
from fluxq.bench.timing import spread, timed

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow

SCRIPT = """
import os
from benchmarks.cases import Case, Skip, parser, run_part

def skip():
    raise Skip("it is not installed")

def fail():
    raise ValueError("no such thing")

def prepare(report):
    report["starts"] = report.get("starts", 0) + 1
    yield Case("good", lambda: {"ok": True, "answer": 42})
    yield Case("wrong", lambda: {"ok": False})
    yield Case("dies", lambda: os._exit(3))
    yield Case("fails", fail)
    yield Case("skips", skip)
    yield Case("after", lambda: {"ok": True})
    yield Case("last", lambda: {"ok": setattr(arguments, "deadline", 0.0) is None})
    yield Case("late", lambda: {"ok": True})

arguments = parser("").parse_args()
run_part("trial", arguments, prepare)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "trial.py").write_text(SCRIPT)

    def start(*options):
        command = [sys.executable, str(tmp_path / "trial.py"), "--device=cpu", f"--out={tmp_path}", *options]
        environment = {"PYTHONPATH": str(ROOT), "COMMIT": "abc", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        (path,) = tmp_path.glob("*.json")
        return done.returncode, json.loads(path.read_text())

    return start


def test_a_case_that_fails_or_dies_does_not_affect_the_others(run):
    code, report = run("--only=good|wrong|dies|fails|skips|after")
    rows = {row["case"]: row for row in report["rows"]}
    assert list(rows) == ["good", "wrong", "dies", "fails", "skips", "after"]
    assert rows["good"]["answer"] == 42 and rows["after"]["ok"]
    assert rows["dies"]["failed"] == "its process ended with 3"
    assert rows["fails"]["failed"] == "ValueError: no such thing"
    assert rows["skips"]["skipped"] == "it is not installed"
    assert report["summary"] == {"cases": 6, "failed": 3, "skipped": 1, "targets_met": 0, "targets_missed": 0}
    assert code == 1 and report["starts"] == 2, "one process until a case killed it, and one for the rest"
    assert report["about"]["commit"] == "abc" and "running" not in report


def test_cases_that_would_start_too_late_are_recorded_as_skipped(run):
    code, report = run("--only=last|late")
    assert [row.get("skipped") for row in report["rows"]] == [None, "out of time"]
    assert code == 0


def test_a_case_that_never_ends_is_stopped(tmp_path):
    path = tmp_path / "x.json"
    hangs = f"""
import json, time
json.dump({{"rows": [], "running": "hangs"}}, open({str(path)!r}, "w"))
time.sleep(600)
"""
    assert supervise(path, 1.0, [sys.executable, "-c", hangs], grace=0.5) == 1
    assert json.loads(path.read_text())["rows"] == [{"case": "hangs", "failed": "out of time, and stopped"}]


def test_a_target_for_another_gpu_is_recorded_but_not_judged():
    assert [target("x", ">= 0.8", 0.9)["met"], target("x", "<= 1.08", 1.1)["met"]] == [True, False]
    assert target("x", ">= 1.4", 0.5, applies=False)["met"] is None
    assert target("x", ">= 1.4", float("nan"))["met"] is False
    rows = [{"case": "a", "ok": True, "targets": [target("x", ">= 0.8", 0.9), target("x", ">= 2", 0.9)]}]
    assert summary(rows) == {"cases": 1, "failed": 0, "skipped": 0, "targets_met": 1, "targets_missed": 1}
    assert in_words({"ok": False, **rows[0], "ms": {"ours": {"median": 2}}}).startswith("ours 2.000 ms, x 0.9")


def test_timed_runs_alternate_and_give_percentiles():
    order = []
    found = timed({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 0.0)
    assert "".join(order) == "ab" * 2 + "ab" + "ab" * 3
    assert found["a"]["runs"] == 3
    assert spread([float(i) for i in range(11)]) == {"median": 5, "p10": 1, "p90": 9, "runs": 11}


def test_a_prediction_is_the_longer_of_moving_and_multiplying():
    ceilings = {"bytes": 1e12, "bf16": 1e14, "int8": 2e14, "fp8": None}
    assert predicted_ms(ceilings, 2e9) == pytest.approx(2)
    assert predicted_ms(ceilings, 2e9, bf16=3e11) == pytest.approx(3)
    assert predicted_ms(ceilings, 0, bf16=1e11, int8=2e11) == pytest.approx(2)
    assert predicted_ms(ceilings, 0, fp8=1.0) is None


def test_a_blocks_bound_counts_what_its_policy_recomputes():
    ceilings = {"bytes": 1e12, "bf16": 1e14, "int8": 2e14, "fp8": None}

    def at(policy, compute="bf16", kind="double"):
        return block_ms(ceilings, kind, 3072, 4608, policy, compute)

    once = 2 * 113_246_208 * 4608 / 1e11  # ms of all products one way: a unit's weights met by every token
    attention = 4 * 4608**2 * 3072 / 1e11
    assert at("keep_all") == pytest.approx(2 * once + 3.5 * attention)
    assert at("recompute") == pytest.approx((2 + 8 / 12) * once + 4.5 * attention)
    assert at("recompute", kind="single") == pytest.approx((2 + 7 / 12) * once + 4.5 * attention)
    assert at("keep_all", "int8") == pytest.approx(1.5 * once + 3.5 * attention)
    assert at("keep_all", "int8_dx") == pytest.approx(once + 3.5 * attention)
    assert at("keep_all", "fp8") is None
