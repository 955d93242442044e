"""What the trials would notice: half a file, another one, one too many or too few."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def folders(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("folders")


def write_run(root: Path, seconds: float) -> Path:
    (root / "state").mkdir(parents=True)
    about = json.dumps({"step": 2, "facts": {"seconds": seconds, "changes": []}})
    save_file(
        {"lora.up": torch.ones(2, dtype=torch.bfloat16)}, root / "state/state.safetensors", {"fluxq_state": about}
    )
    (root / "log.jsonl").write_text(f'{{"step": 1, "seconds": {seconds}}}\n{{"step": 2, "seconds": 1}}\n')
    (root / "config.toml").write_text("steps = 2\n")
    return root


def test_times_are_no_difference_and_everything_else_is(folders, tmp_path):
    expected = folders.contents(write_run(tmp_path / "calm", 1.0))
    root = write_run(tmp_path / "run", 2.0)
    known = folders.versions(expected)

    def problems(output: str = "") -> list[str]:
        return [*folders.unsound(root, known, ended=False), *folders.differences(root, expected, output, "")]

    assert problems() == []
    (root / ".config.tmp-1.toml").write_text("st")
    assert problems() == [".config.tmp-1.toml is left over"]
    (root / ".config.tmp-1.toml").unlink()
    state = root / "state" / "state.safetensors"
    shutil.copy(state, root / "x-state-step00000002.safetensors")
    assert problems() == ["x-state-step00000002.safetensors is left over"]
    assert problems("the state of step 2 is in x-state-step00000002.safetensors: move it") == []
    (root / "x-state-step00000002.safetensors").unlink()
    whole = state.read_bytes()
    state.write_bytes(whole[:-1])
    assert len(problems()) == 2 and all("is not whole" in problem for problem in problems())
    state.write_bytes(whole[:-1] + b"!")
    assert problems() == ["state/state.safetensors says something else", "state/state.safetensors differs"]
    state.unlink()
    assert problems() == ["state/state.safetensors is missing"]


def test_only_a_process_that_ended_may_leave_half_a_line(folders, tmp_path):
    known = folders.versions(folders.contents(write_run(tmp_path / "calm", 1.0)))
    root = write_run(tmp_path / "run", 1.0)
    (root / "log.jsonl").write_text('{"step": 1, "seconds": 5}\n{"st')
    assert [*folders.unsound(root, known, ended=True)] == []
    assert [*folders.unsound(root, known, ended=False)] == ["log.jsonl is not whole (its last line does not end)"]
    (root / "log.jsonl").write_text('{"step": 2}\n')
    assert [*folders.unsound(root, known, ended=True)] == ["log.jsonl has other records"]
