"""Validation on nano: what is measured, which LoRA is the best, when a run ends, and that resuming changes nothing."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch

from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import Stopped, WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.nano import drawing
from fluxq.train import train
from fluxq.training import validation
from fluxq.training.report import Report
from fluxq.training.run import Result, Run
from fluxq.training.state import Measured
from fluxq.training.stopping import StopRequest
from fluxq.training.validation import by_band

FALLS_AND_RISES = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 2.0, 10: 2.5, 12: 2.6}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=5, count=6)):
        image.save(folder / f"{i}.bmp")  # the same bytes everywhere, so the same split
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture
def scripted(monkeypatch) -> dict[int, float]:
    """Held-out losses by step, in place of measured ones."""
    losses = dict(FALLS_AND_RISES)

    def measured(objective, sets, step: int) -> Measured:
        found = dict.fromkeys(("loss", "low", "medium", "high"), losses[step])
        return Measured(step, found, {"split": found}, found)

    monkeypatch.setattr(validation, "measured", measured)
    return losses


def run(tmp_path: Path, photos: Path, name: str = "run", resume: bool = False, notify=silent, **sections) -> Result:
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(photos)], "resolution": 64, "cache": str(tmp_path.parent / "encoded")},
        "lora": {"rank": 2, "targets": ["attention"]},
        "training": {"steps": 12, "learning_rate": 1e-3, "validate_every": 2},
        "output": {"out": str(tmp_path / name), "name": "test", "plot_seconds": 1e9, "save_every": 3},
    }
    for section, settings in ({"data": {"validation_split": 0.2}} | sections).items():
        values[section] |= settings
    return train(config_from_dict(values, "a test"), resume=resume, notify=notify)


def about(path: Path) -> dict[str, str]:
    return dict(Checkpoint(path).metadata)


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {key: checkpoint.get(key) for key in checkpoint.keys()}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def validations(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["validation"] for line in lines if "validation" in line]


def dies_at(monkeypatch, step: int, where=None, best: bool = True) -> None:
    """As if the process were killed in that step, or when that step's LoRA is written."""
    if where is None:
        real = validation.Validation.after
        monkeypatch.setattr(
            validation.Validation, "after", lambda self, done, *rest: die() if done == step else real(self, done, *rest)
        )
        return
    real_save = Run.save_lora

    def save(self, flux, clip, done, metadata, is_best=False):
        if (done, is_best) == (step, best):
            raise where
        return real_save(self, flux, clip, done, metadata, is_best)

    monkeypatch.setattr(Run, "save_lora", save)


class Killed(BaseException):
    pass


def die() -> None:
    raise Killed


def test_losses_are_those_of_each_third_of_the_noise_levels():
    errors = torch.arange(12.0).reshape(6, 2)
    assert by_band(errors) == {"loss": 5.5, "low": 1.5, "medium": 5.5, "high": 9.5}


@pytest.mark.slow
def test_a_resumed_run_measures_and_keeps_what_an_uninterrupted_one_does(tmp_path, photos, monkeypatch):
    """Real losses. It dies between two saves, and between the state and the LoRA of the best step."""
    whole = run(tmp_path, photos, "whole", training={"steps": 8})
    for step, where in ((4, None), (6, Killed())):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_at(patch, step, where)
            run(tmp_path, photos, "killed", resume=step > 4, training={"steps": 8})
    again = run(tmp_path, photos, "killed", resume=True, training={"steps": 8})
    assert validations(tmp_path / "killed") == validations(tmp_path / "whole")
    steps = [found["step"] for found in validations(tmp_path / "whole")]
    assert steps == [0, 2, 4, 6, 8]
    for name in ("test.safetensors", "test-best.safetensors", "state/state.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "killed" / name), name
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted(
        p.name for p in (tmp_path / "killed").iterdir()
    )
    assert again.validation_after == whole.validation_after != whole.validation_before
    found = whole.validation
    assert found["base_model"] == found["before"] and found["after"]["held_out"] != found["after"]["training"]
    assert found["best"]["loss"] == min(found["held_out"]["loss"] for found in validations(tmp_path / "whole")[1:])


@pytest.mark.slow
def test_the_best_lora_is_kept_and_says_so(tmp_path, photos, scripted):
    said: list[str] = []
    whole = run(tmp_path, photos, output={"keep": 1, "save_every": 2}, notify=said.append)
    folder, shorter = tmp_path / "run", run(tmp_path, photos, "shorter", training={"steps": 8})
    assert same(folder / "test-best.safetensors", Path(shorter.lora)) and not same(
        folder / "test-best.safetensors", Path(whole.lora)
    )
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "test-best.safetensors",
        "test-step00000010.safetensors",
        "test.safetensors",
    ]
    metadata = about(folder / "test-best.safetensors")
    assert (metadata["ss_steps"], metadata["fluxq_validation_loss"]) == ("8", "2")
    assert metadata["fluxq_validation_split"] == "0.2: 1 image" and metadata["ss_num_train_images"] == "5"
    assert about(Path(whole.lora))["fluxq_validation_loss"] == "2.6"
    assert whole.validation["best"] == {"step": 8, "loss": 2.0, "lora": str(folder / "test-best.safetensors")}
    assert any("best LoRA, of step 8: " in line and "(held-out loss 2.0000; last 2.6000)" in line for line in said)
    assert any(
        line.startswith("validation after step 8: held-out images 2.0000") and line.endswith("best so far")
        for line in said
    )
    assert said.index(next(s for s in said if s.startswith("LoRA: "))) == len(said) - 1


@pytest.mark.slow
def test_patience_ends_a_run_which_goes_on_only_when_asked(tmp_path, photos, scripted):
    folder, said = tmp_path / "run", []
    early = run(tmp_path, photos, training={"early_stopping": 1, "steps": 12})
    assert (early.steps, early.lora) == (6, str(folder / "test.safetensors"))
    reason = "stopped after step 6 of 12: 1 validation in a row had no lower loss of held-out images, since step 4"
    assert early.validation["stopped_early"].startswith(reason) and early.validation["best"]["step"] == 4
    before = (folder / "test.safetensors").read_bytes()
    assert run(tmp_path, photos, training={"early_stopping": 1}, resume=True, notify=said.append).steps == 6
    assert any(line.startswith(reason) for line in said) and before == (folder / "test.safetensors").read_bytes()
    with pytest.raises(WrongRequest, match=r"the last 1 validation of .* had no lower loss, .* to go on, raise it \(0"):
        run(tmp_path, photos, training={"early_stopping": 1, "steps": 14}, resume=True)
    on = run(tmp_path, photos, training={"early_stopping": 2}, output={"keep": 1, "save_every": 3}, resume=True)
    assert (on.steps, on.validation["best"]["step"], on.validation["stopped_early"]) == (12, 8, None)
    assert about(folder / "test-step00000006.safetensors")["ss_steps"] == "6", "the end of the first part is kept"
    assert same(Path(run(tmp_path, photos, "whole").lora), Path(on.lora))


@pytest.mark.slow
def test_a_best_lora_that_the_disk_does_not_take_is_not_promised(tmp_path, photos, scripted, monkeypatch):
    said: list[str] = []
    dies_at(monkeypatch, 8, OSError(errno.ENOSPC, "No space left on device"))
    scripted[10] = math.nan
    result = run(tmp_path, photos, notify=said.append, training={"early_stopping": 3})
    assert any(line.startswith("the LoRA of step 8, the best so far, could not be saved: ") for line in said)
    assert result.validation["best"]["step"] == 12, (
        "lower than that of step 4, which is the best on the disk until then"
    )
    assert about(tmp_path / "run" / "test-best.safetensors")["ss_steps"] == "12"
    line = next(v for v in validations(tmp_path / "run") if v["step"] == 10)
    assert line["held_out"]["loss"] is None, "JSON has no NaN"


@pytest.mark.slow
def test_held_out_images_are_plain_and_not_trained_on(tmp_path, photos, monkeypatch):
    seen: list[validation.Sets] = []
    real = validation.measured
    monkeypatch.setattr(validation, "measured", lambda o, sets, step: seen.append((o, sets)) or real(o, sets, step))
    data = {
        "validation_split": 0.5,
        "flip": True,
        "shuffle_tags": True,
        "variants": 4,
        "folders": [{"path": str(photos), "repeats": 3}],
    }
    run(tmp_path, photos, data=data, training={"steps": 1})
    objective, sets = seen[0]
    held_out, training = sets.held_out["split"].examples, sets.training.examples
    assert all((len(e.latents), len(e.text), e.repeats) == (1, 1, 1) for e in held_out)
    trained = {name.split("#")[0] for i in range(len(objective.batches)) for name in objective.batches.examples_of(i)}
    assert len(trained) + len(held_out) == 6 and not trained & {e.name for e in held_out}
    assert {e.name for e in training} <= trained and len(training) == min(len(held_out), len(trained))


@pytest.mark.slow
def test_the_base_model_is_measured_without_the_lora_that_training_starts_from(tmp_path, photos):
    first = run(tmp_path, photos, "first", training={"steps": 4})
    second = run(tmp_path, photos, lora={"from_lora": first.lora}, training={"steps": 1})
    assert second.validation["base_model"] == first.validation["base_model"]
    assert second.validation["before"]["held_out"] == pytest.approx(first.validation["after"]["held_out"], rel=1e-3)
    assert second.validation_before != first.validation_before


@pytest.mark.slow
def test_other_held_out_images_start_validation_anew(tmp_path, photos):
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    ((image, caption),) = drawing.ordinary(seed=9, count=1)
    image.save(held_out / "a.png")
    (held_out / "a.txt").write_text(caption)
    data = {"validation": [str(held_out)], "validation_split": 0.0}
    first = run(tmp_path, photos, data=data, training={"steps": 2})
    (held_out / "a.txt").write_text("something else")
    said: list[str] = []
    second = run(tmp_path, photos, data=data, training={"steps": 4}, resume=True, notify=said.append)
    assert any(line.startswith("other images are held out than before, so validation starts anew") for line in said)
    assert second.validation["base_model"] != first.validation["base_model"] and second.validation_before is None
    assert [found["step"] for found in validations(tmp_path / "run")] == [2, 4]
    again = run(tmp_path, photos, data=data, training={"steps": 4}, resume=True)
    assert again.validation == second.validation and len(validations(tmp_path / "run")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stops", [4, 6])
def test_a_signal_does_not_wait_for_a_validation_which_comes_with_the_resumed_run(
    stops, tmp_path, photos, scripted, monkeypatch
):
    """That of step 4 is the best, and that of step 6 ends the run."""
    training = {"steps": 8, "early_stopping": 1}
    whole, steps, real = run(tmp_path, photos, "whole", training=training), [], Report.step
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Report, "step", lambda self, done, *rest: steps.append(done) or real(self, done, *rest))
        patch.setattr(StopRequest, "__call__", lambda self: 15 if steps[-1:] == [stops] else None)
        run(tmp_path, photos, "stopped", training=training)
    assert [found["step"] for found in validations(tmp_path / "stopped")] == [0, 2, 4][: stops // 2]
    again = run(tmp_path, photos, "stopped", training=training, resume=True)
    assert validations(tmp_path / "stopped") == validations(tmp_path / "whole")
    assert (again.steps, again.validation["best"]["step"]) == (whole.steps, 4) == (6, 4)
    for name in ("test.safetensors", "test-best.safetensors"):
        assert same(tmp_path / "stopped" / name, tmp_path / "whole" / name)
