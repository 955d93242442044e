"""Folders as a run has them: with what is shared, each once, and none for two ends."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fluxq.caching.folders import scan_data
from fluxq.config import DataConfig, ModelConfig, SamplesConfig, TrainConfig, TrainingConfig
from fluxq.config_files import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.models import Models
from fluxq.training.defaults import epoch_of, resolve_data, resolve_validation
from fluxq.training.previews import preview_prompts
from fluxq.training.run import Run


def photo(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    return folder


def resolved(**data):
    config = config_from_dict({"model": {"name": "nano"}, "data": {"resolution": 64, **data}}, "a test")
    return resolve_data(config.data, Models(config.model), silent)


def test_regularization_images_never_get_the_shared_trigger(tmp_path):
    own, prior = str(photo(tmp_path / "own")), str(photo(tmp_path / "prior"))
    folders = [own, {"path": prior, "regularization": True}, {"path": prior, "regularization": True, "trigger": "x"}]
    assert [f.trigger for f in resolved(trigger="zqx", folders=folders).filled()[0]] == ["zqx", "", "x"]
    with pytest.raises(WrongRequest, match="prior is for regularization, and there is nothing else to train on"):
        resolved(folders=folders[1:])


def test_folders_inside_others_count_once_also_when_a_run_resumes(tmp_path):
    top, inside = photo(tmp_path / "top"), photo(tmp_path / "top" / "inside")
    first = resolved(folders=[str(top)], recursive=True)
    assert [f.path for f in first.folders] == [top, inside]
    again = resolved(folders=[str(f.path) for f in first.folders], recursive=True)
    assert again.folders == first.folders
    twice = [{"path": str(top)}, {"path": str(top), "resolution": 32}]
    assert [f.path for f in resolved(folders=twice, recursive=True).folders] == [top, inside, top]


def test_a_folder_is_not_both_trained_on_and_held_out(tmp_path):
    top = photo(tmp_path / "top")
    with pytest.raises(WrongRequest, match="top is both trained on and held out"):
        resolved(folders=[str(top)], validation=[str(top / ".." / "top")])


def test_a_folder_of_masks_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(photo(tmp_path / "own"))
    data = resolved(folders=[own, {"path": own, "masks": "masks"}], masks="beside")
    assert (data.masks, data.folders[1].masks) == ("beside", str(tmp_path / "masks"))


def test_masks_that_moved_are_compared_by_their_contents(tmp_path):
    def run(**data) -> Run:
        return Run(config_from_dict({"data": data, "output": {"out": str(tmp_path), "name": "a"}}, "a test"))

    def folder(masks: str, repeats: int) -> dict:
        return {"path": "a", "masks": masks, "repeats": repeats}

    before = run(masks="/a/masks", recursive=True, folders=[folder("/b", 1)]).config
    assert run(masks="/c/masks", folders=[folder("/d", 1)])._changes(before, accepts_data=False) == []
    with pytest.raises(WrongRequest, match=r"was started with data.folders = "):
        run(masks="/c/masks", folders=[folder("/d", 2)])._changes(before, accepts_data=False)


def test_held_out_images_and_captions_are_not_varied(tmp_path):
    own, held = (str(photo(tmp_path / name)) for name in ("own", "held"))
    (tmp_path / "held" / "a.txt").write_text("a, b, {c|d}")
    varied = {"flip": True, "shuffle_tags": True, "keep_tokens": 1, "tag_dropout": 0.5, "wildcards": True}
    data = resolved(folders=[own], validation=[held], random_crop=True, caption_dropout=0.5, **varied)
    example = scan_data(data).examples[-1]
    assert example.path.parent.name == "held" and len(example.views) == 1 and example.folder.caption_dropout == 0
    assert example.texts in [("a, b, c",), ("a, b, d",)]


def test_images_of_a_split_are_neither_counted_nor_repeated_nor_previewed(tmp_path):
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.bmp")  # the same bytes everywhere
        (tmp_path / f"{number}.txt").write_text(f"image {number}, of, noise")
    folder = {"path": str(tmp_path), "weight": 2.0, "flip": True, "shuffle_tags": True, "caption_dropout": 0.5}
    data = resolved(folders=[folder], validation_split=0.25)
    scanned = scan_data(data)
    held_out = [example for example in scanned.examples if example.held_out]
    count = len(held_out)
    assert 1 <= count < 8
    assert all((len(e.views), len(e.texts), e.repeats, e.folder.caption_dropout) == (1, 1, 1, 0) for e in held_out)
    assert (epoch_of(data, scanned, 1).images, epoch_of(data, scanned, 1).seen) == (8 - count, 8 - count)
    (said,) = [finding for finding in scanned.found.all() if "--validation-split" in finding.what]
    assert said.names == tuple(e.name for e in held_out)
    config = TrainConfig(ModelConfig("nano"), data, samples=SamplesConfig(every=1))
    first = [example.caption for example in scanned.examples if not example.held_out][:3]
    assert preview_prompts(config, Models(config.model), scanned) == tuple(first)


def validated(held_out: int, steps: int = 1200, **training) -> tuple[TrainingConfig, list[str]]:
    said: list[str] = []
    examples = [SimpleNamespace(held_out=n < held_out, folder=SimpleNamespace(path=Path())) for n in range(100)]
    own = TrainingConfig(steps=steps, **training)
    return resolve_validation(own, DataConfig(), SimpleNamespace(examples=examples), said.append), said


@pytest.mark.parametrize(
    ("held_out", "training", "every", "said"),
    [
        (
            1,
            {},
            100,
            "every 100 steps and at the end, 12 times in all, on 1 held-out image: .* as 6 steps, together 5% of",
        ),
        (
            4,
            {},
            207,
            "6 times in all, on 4 held-out images: each is predicted to take as long as 21 steps, together 9% of",
        ),
        (4, {"batch": 4, "accumulate": 2}, 100, "12 times in all"),
        (40, {}, 1445, "every 1,200 steps and at the end, 1 time in all"),
        (40, {"validate_every": 10}, 10, "120 times in all, on 40 held-out images: .* 145 steps, together 94% of"),
        (40, {"validate_every": 0}, 0, "every 1,200 steps and at the end, 1 time in all"),
    ],
)
def test_validations_take_a_tenth_of_the_time_unless_asked(held_out, training, every, said):
    found, (line,) = validated(held_out, **training)
    assert found.validate_every == every and re.search(said, line)


def test_early_stopping_that_cannot_stop_is_refused():
    for held_out, training, why in (
        (0, {}, "--early-stopping needs held-out images"),
        (1, {"validate_every": 400}, "--early-stopping 3 cannot end a run of 3 validations"),
        (1, {"validate_every": 0}, "cannot end a run of 1 validation;"),
    ):
        with pytest.raises(WrongRequest, match=why):
            validated(held_out, early_stopping=3, **training)
    assert validated(0)[0].validate_every is None
    assert validated(1, early_stopping=3, validate_every=300)[0].early_stopping == 3
