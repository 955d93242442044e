"""Captions in folders: the file of each, edits that keep a copy, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fluxq.captioning.folder import Backup, captioned, edits, without_effect, write_edits
from fluxq.data.captions import Captions
from fluxq.errors import WrongRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.caption").write_bytes("a caf\xe9\r\n\r\nred hair".encode("cp1252"))
    (tmp_path / "C.TXT").write_text(" ")
    (tmp_path / "d.json").write_text('{"caption": "a dog, red hair"}')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "e.png", "text": "a cat"}')
    return tmp_path


def read(folder: Path) -> dict[str, str]:
    """What each image is trained on."""
    captions = Captions(folder)
    return {name: captions.of(folder / name).text for name in ("a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png")}


def test_each_caption_has_its_own_text_file(folder):
    items = captioned([folder, folder])
    assert [(item.image.name, item.file.name, item.lines) for item in items] == [
        ("a.png", "a.caption", ("a café", "red hair")),
        ("b.jpg", "b.jpg.txt", ()),
        ("b.png", "b.png.txt", ()),
        ("c.png", "C.TXT", ()),
        ("d.png", "d.txt", ("a dog, red hair",)),
        ("e.png", "e.txt", ("a cat",)),
    ]


def test_edits_keep_lines_and_a_copy(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changes = edits(captioned([folder]), ["red hair"], [("a", "one")], "zqx")
    assert {file.name: change.after for file, change in changes.items()} == {
        "a.caption": ("zqx, one café",),
        "d.txt": ("zqx, one dog",),
        "e.txt": ("zqx, one cat",),
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert write_edits(changes) == [folder / "captions-backup-1"]
    assert (folder / "a.caption").read_bytes() == "zqx, one caf\xe9\n".encode()
    assert (folder / "captions-backup-1" / "a.caption").read_bytes() == before["a.caption"]
    assert [path.name for path in (folder / "captions-backup-1").iterdir()] == ["a.caption"], "the others are new"
    assert read(folder) | {"a.png": "", "d.png": "", "e.png": ""} == dict.fromkeys(read(folder), "")
    assert [read(folder)[name] for name in ("a.png", "d.png", "e.png")] == [
        "zqx, one café", "zqx, one dog", "zqx, one cat"
    ]  # fmt: skip
    again = edits(captioned([folder]), ["red hair"], [("a", "one")], "zqx")
    assert not again and write_edits(again) == []


def test_the_trigger_takes_its_place_or_the_front_of_the_first_line(folder):
    (folder / "a.caption").unlink()
    for text, expected in (
        ("a dog\na [trigger] cat", ("a dog", "a zqx cat")),
        ("a dog\nZQX", ("a dog", "ZQX")),
        ("a dog\nb", ("zqx, a dog", "b")),
    ):
        (folder / "a.txt").write_text(text)
        changes = edits(captioned([folder]), trigger="zqx")
        assert changes.get(folder / "a.txt", (0, tuple(text.split("\n"))))[1] == expected


def test_a_caption_of_which_nothing_is_left_is_refused_unless_a_trigger_stays(folder):
    (folder / "C.TXT").write_text("red hair, glasses")
    with pytest.raises(
        WrongRequest, match=r"--remove would leave nothing of 1 caption \(C.TXT\); remove less, or pass"
    ):
        edits(captioned([folder]), ["red hair", "glasses"])
    changes = edits(captioned([folder]), ["red hair", "glasses"], trigger="zqx")
    assert changes[folder / "C.TXT"].after == ("zqx",)


def test_what_is_in_no_caption_is_named(folder):
    assert without_effect(captioned([folder]), ["Red  hair", "hat", "dog"]) == ["hat"]


def test_a_shared_file_is_edited_once(folder):
    (folder / "b.txt").write_text("a man, red hair")
    changes = edits(captioned([folder]), ["red hair"])
    assert changes[folder / "b.txt"].after == ("a man",) and len(changes) == 3


def test_copies_are_numbered_and_an_interrupted_attempt_is_known(folder):
    (file := folder / "c.txt").write_text("old")
    first = Backup("k")
    assert not first.is_done(file)
    first.keep(file)
    assert not first.is_done(file), "it is copied, and not replaced yet"
    file.write_text("new")
    again = Backup("k")
    again.keep(file)
    assert again.is_done(file) and not Backup("other").is_done(file)
    (folder / "captions-backup-7").mkdir()
    assert again.finish() == [folder / "captions-backup-8"]
    assert (folder / "captions-backup-8" / "c.txt").read_text() == "old"
    assert not Backup("k").is_done(file)


def test_what_cannot_be_read_is_refused_together(folder, tmp_path):
    (folder / "C.TXT").write_bytes(b"\x81\0\xff")
    (folder / "d.json").write_text("{")
    with pytest.raises(WrongRequest, match=r"C.TXT is not text, .*d.json is not JSON \(.*; correct or remove the file"):
        captioned([folder])
    for paths, message in (
        ([], "no folder of images was given"),
        ([tmp_path / "gone"], "does not exist; name a folder"),
        ([folder / "a.png"], "a.png is a file, not a folder"),
    ):
        with pytest.raises(WrongRequest, match=message):
            captioned(paths)


def test_folders_inside_need_recursive(tmp_path):
    (inside := tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(WrongRequest, match="holds no images that fluxq reads"):
        captioned([tmp_path])
    Image.new("RGB", (8, 8)).save(inside / "a.png")
    (inside / "a.txt").write_text(json.dumps("x"))
    with pytest.raises(WrongRequest, match="pass --recursive"):
        captioned([tmp_path])
    assert [item.file for item in captioned([tmp_path], recursive=True)] == [inside / "a.txt"]
