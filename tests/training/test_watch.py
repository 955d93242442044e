"""Runs are compared with this machine's last ones, and steps with those before them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fluxq.config_files import config_from_dict
from fluxq.memory.placement import Placement
from fluxq.training import history, watch
from fluxq.training.history import KEPT, KINDS, STEPS, History, compared, kind_of, summary
from fluxq.training.watch import Watch

GIB = 2**30


def run(seconds=2.0, peak=8.0, date="2026-11-20", **versions) -> dict:
    known = {"fluxq": "0.1.0", "torch": "2.13.0", "driver": "570.1"} | versions
    return {"seconds": seconds, "peak_bytes": peak and int(peak * GIB), "date": date, "versions": known}


def records(count: int, seconds=2.0) -> list[dict]:
    """The first steps load kernels, and one was disturbed."""
    return [{"seconds": 60.0 if i < 5 or i == 30 else seconds, "peak_bytes": 8 * GIB} for i in range(count)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_slower_or_bigger_run_is_told_with_both_numbers_and_what_differs():
    before = [run(1.9), run(2.0), run(9.0, 8.1), run(2.1)]
    assert compared(run(2.4, 9.5), before) is None, "20 % at most"
    assert compared(run(2.6, torch="2.14.1"), before) == (
        "this run is 27% slower (2.60 s/it, not 2.05 s/it) than the median of this machine's last 4 like it; "
        "since 2026-11-20: torch 2.13.0 -> 2.14.1"
    )
    assert compared(run(0.5, 10), [run(0.4)]) == (
        "this run is 25% slower (2.00 it/s, not 2.50 it/s) and 25% bigger (10.0 GiB, not 8.0 GiB) than this "
        "machine's last like it; driver, fluxq, torch are those of 2026-11-20"
    )
    assert compared(run(2.0, None), before) is None


def test_a_short_run_is_neither_compared_nor_kept_and_the_first_steps_do_not_count():
    assert summary(records(STEPS - 1)) is None
    found = summary(records(STEPS))
    assert found and found["seconds"] == 2.0 and found["peak_bytes"] == 8 * GIB and "torch" in found["versions"]


def test_the_last_runs_of_each_kind_are_kept_whatever_was_in_the_file(cache):
    kinds = History("a"), History("b")
    for damage in (None, b"{", b"[1]", b"\xff", b'{"a": 3, "b": [{"seconds": "x"}, 7]}', b"[" * 100_000):
        if damage is not None:
            (cache / "runs.json").write_bytes(damage)
        assert kinds[0].runs() == kinds[1].runs() == []
        kinds[0].add(run(1.0))
        assert kinds[0].runs() == [run(1.0)]
    kinds[1].add(run(9.0))
    for number in range(KEPT + 1):
        kinds[0].add(run(number + 2.0))
    assert [r["seconds"] for r in kinds[0].runs()] == [3.0, 4.0, 5.0, 6.0, 7.0] and kinds[1].runs() == [run(9.0)]
    (cache / "runs.json").write_text(json.dumps({str(n): [run()] for n in range(KINDS + 9)}))
    kinds[0].add(run())
    assert len(json.loads((cache / "runs.json").read_text())) == KINDS and kinds[0].runs() == [run()]


def test_several_processes_lose_no_run_and_a_folder_that_cannot_be_written_ends_none(cache, monkeypatch):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: History(str(number)).add(run()), range(12)))
    assert len(json.loads((cache / "runs.json").read_text())) == 12
    monkeypatch.setenv("FLUXQ_CACHE", str(cache / "runs.json" / "below a file"))
    History("a").add(run())
    assert History("a").runs() == []


def watched(monkeypatch, **training):
    values = {"model": {"name": "nano"}, "training": {"steps": 90, **training}, "data": {"resolution": 96}}
    values |= {"samples": {"every": 30}, "output": {"save_every": 40}}
    models = SimpleNamespace(
        device=SimpleNamespace(type="cpu"), is_nano=True, format="nf4", compute="bf16", text_tokens=32
    )
    batches = SimpleNamespace(bucket_of=lambda index: (128, 64) if index in (60, 61) else (96, 96))
    retry = SimpleNamespace(placement=Placement())
    conditions = iter([{"others": 1.0 * GIB}, {"others": 3.0 * GIB}, {"others": 3.1 * GIB}] * 9)
    monkeypatch.setattr(watch, "read_conditions", lambda: next(conditions))
    config = config_from_dict(values, "a test")
    return Watch(config, models, batches, retry), config, models, retry


def test_what_changed_before_a_step_is_told(monkeypatch):
    watching, _, _, retry = watched(monkeypatch, accumulate=2)
    watching.settle()
    others = "the GPU memory of other programs grew from 1.0 to 3.0 GiB"
    bucket = "none of the 20 steps before it had its bucket, 128 x 64"
    assert watching.changes(31) == [bucket, "previews came just before it", others]
    retry.placement = replace(retry.placement, slots=2)
    assert watching.changes(41) == ["its plan changed because memory ran out", "a save came just before it"]
    assert watching.changes(32) == [], "told once"


def test_runs_of_the_same_kind_are_compared_and_others_are_not(monkeypatch):
    watching, config, models, retry = watched(monkeypatch)
    assert watching.regression(records(STEPS, 9.0)) is None, "there is none yet"
    watching.remember(records(STEPS))
    assert watching.regression(records(STEPS, 2.1)) is None
    assert "100% slower (4.00 s/it, not 2.00 s/it)" in str(watching.regression(records(STEPS, 4.0)))
    kind = kind_of(config, models, retry.placement)
    for section, key, value in (("lora", "rank", 8), ("data", "resolution", 64), ("training", "optimizer", "adamw")):
        other = replace(config, **{section: replace(getattr(config, section), **{key: value})})
        assert kind_of(other, models, retry.placement) != kind
    retry.placement = replace(retry.placement, policies="keep_all")
    assert kind_of(config, models, retry.placement) != kind
    watching.remember(records(STEPS, 9.0))  # two plans in one run
    assert len(History(kind).runs()) == 1 and watching.regression(records(STEPS, 9.0)) is None


def test_a_run_that_others_disturbed_is_neither_compared_nor_kept(monkeypatch):
    watching, config, models, retry = watched(monkeypatch)
    watching.remember(records(STEPS))
    watching.settle()
    assert "other programs" in watching.changes(10)[-1]
    assert watching.regression(records(STEPS, 4.0)) is None
    watching.remember(records(STEPS, 4.0))
    assert [r["seconds"] for r in History(kind_of(config, models, retry.placement)).runs()] == [2.0]


def test_a_missing_package_or_driver_has_no_version(monkeypatch):
    monkeypatch.setattr(history, "nvidia_smi", lambda fields: ["580.65.06"])
    monkeypatch.setattr(history.torch.cuda, "is_available", lambda: True)
    assert history.versions()["driver"] == "580.65.06" and history.versions()["torch"]
