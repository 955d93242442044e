"""The names of a run's LoRAs: which is which after a run was resumed with other epochs, and which is the oldest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxq.config_files import config_from_dict
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.training import run as runs
from fluxq.training.run import Run


def a_run(tmp_path: Path, steps: int = 12, **output) -> Run:
    values = {"training": {"steps": steps}, "output": {"out": str(tmp_path), "name": "a", "save_every": 2, **output}}
    return Run(config_from_dict(values, "a test"))


def saved(path: Path, steps: int) -> Path:
    write_safetensors(path, {"x": torch.zeros(1)}, {"ss_steps": str(steps)})
    return path


def test_numbers_of_epochs_are_given_once(tmp_path):
    by_epoch = a_run(tmp_path, numbering="epoch", save_every_epochs=1)
    assert [by_epoch.lora_file(step).stem for step in (4, 5, 12)] == ["a-000002", "a-step00000005", "a"]
    second = saved(by_epoch.lora_file(4), 4)
    assert by_epoch.lora_file(4) == second, "the same step again"
    longer = a_run(tmp_path, numbering="epoch", save_every_epochs=1, save_every=3)
    assert longer.lora_file(6).stem == "a-step00000006", "epoch 2 was at step 4"


def test_saved_loras_are_ordered_by_step_however_they_are_called(tmp_path):
    run = a_run(tmp_path, numbering="epoch", save_every_epochs=1)
    files = [saved(run.lora_file(step), step) for step in (5, 2, 10, 4)]
    assert run.steps_saved() == [files[i] for i in (1, 3, 0, 2)]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_of_peft_takes_the_place_of_another(there, tmp_path):
    folders = [tmp_path / "a.peft", tmp_path / "a-step00000002.peft"]
    for i, folder in enumerate(folders[: 1 + there]):
        folder.mkdir()
        saved(folder / "adapter_model.safetensors", i)
        (folder / "adapter_config.json").write_text("{}")
    runs._moved(*folders)
    assert not folders[0].exists() and runs._metadata(folders[1])["ss_steps"] == "0"


def test_a_file_of_another_trainer_beside_a_run_is_not_its_own(tmp_path):
    other = saved(tmp_path / "a-000002.safetensors", 4)
    assert other not in a_run(tmp_path).steps_saved() and other not in a_run(tmp_path)._results()
    assert other in a_run(tmp_path, numbering="epoch", save_every_epochs=1).steps_saved()
    assert not runs._is_finished(other), "it does not say how many steps there should be"
