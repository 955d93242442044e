"""Folders as a run has them: with what is shared, each once, and none for two ends."""

from pathlib import Path

import pytest
from PIL import Image

from fluxq.caching.folders import scan_data
from fluxq.config import config_from_dict
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.models import Models
from fluxq.training.defaults import resolve_data
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
