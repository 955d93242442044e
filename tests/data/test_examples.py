"""From folders to examples: captions, triggers, repeats, and a clear error for every bad request."""

from pathlib import Path

import pytest
from PIL import Image

from fluxq.data.examples import scan
from fluxq.data.folders import expand, subfolders
from fluxq.errors import WrongRequest
from fluxq.settings import Folder


def write_image(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def scanned(*folders: Folder, skip_bad: bool = False, **changes):
    return scan(folders, **{"resolution": 64, "min_side": 32, "max_side": 128, **changes}, skip_bad=skip_bad)


def test_examples_come_in_order_with_bucket_and_caption(tmp_path):
    write_image(tmp_path / "photos" / "b.png", (128, 64))
    write_image(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "a.txt").write_text("a red square")
    found = scanned(Folder(tmp_path / "photos", repeats=3))
    assert [(e.name, e.caption, e.repeats) for e in found.examples] == [
        ("photos/a.jpg", "a red square", 3),
        ("photos/b.png", "", 3),
    ]
    assert [(e.bucket, e.resized) for e in found.examples] == [((64, 64), (64, 64)), ((80, 48), (96, 48))]
    assert found.skipped == []


def test_file_listed_twice_counts_once_and_is_noted(tmp_path):
    write_image(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "photos" / "a.png")
    found = scanned(
        Folder(tmp_path / "photos", trigger="x"), Folder(tmp_path / "photos" / ".." / "photos", trigger="x")
    )
    assert [example.name for example in found.examples] == ["photos/a.png"]
    assert found.notes[0] == (
        "images listed more than once, each counted once: 3 (photos/link.png, photos#2/a.png, photos#2/link.png)"
    )


def test_names_are_unique_and_stay_when_folders_move(tmp_path):
    for place in ("one", "two"):
        for parent in ("x", "y"):
            write_image(tmp_path / place / parent / "photos" / "a.png")
        write_image(tmp_path / place / "photos#2" / "a.png")
        folders = [tmp_path / place / "x" / "photos", tmp_path / place / "photos#2", tmp_path / place / "y" / "photos"]
        names = [example.name for example in scanned(*(Folder(folder) for folder in folders)).examples]
        assert names == ["photos/a.png", "photos#2/a.png", "photos#3/a.png"]


def test_bad_images_and_captions_are_refused_together_or_done_without(tmp_path):
    for name in ("good.png", "bytes.png", "narrow.png"):
        write_image(tmp_path / name, (10, 300) if name == "narrow.png" else (64, 64))
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "bytes.txt").write_bytes(b"\x81\x00\xff")
    with pytest.raises(WrongRequest) as refused:
        scanned(Folder(tmp_path), upscale=False)
    told = str(refused.value)
    assert told.startswith("3 files cannot be used; correct, replace or remove them, or pass --skip-bad: ")
    places = [
        told.index(what) for what in ("bad.png cannot be read (", "narrow.png: an image", "bytes.txt is not text")
    ]
    assert places == sorted(places)
    found = scanned(Folder(tmp_path, trigger="zqx"), upscale=False, skip_bad=True)
    assert {e.path.name: e.caption for e in found.examples} == {"bytes.png": "zqx", "good.png": "zqx"}
    assert len(found.skipped) == 2
    assert any("without a caption: 2 (bytes.png: " in note and "bytes.txt is not text" in note for note in found.notes)


def test_one_bad_file_is_refused_in_one_sentence(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(WrongRequest, match=r"^[^\n]*bad.png cannot be read [^\n]*--skip-bad$"):
        scanned(Folder(tmp_path))


def test_findings_name_what_is_unusual(tmp_path):
    photos = tmp_path / "photos"
    for name in ("a.png", "b.png", "b_mask.png", "gas_mask.png", "c-masklabel.png", "inside/x.png"):
        write_image(photos / name)
    write_image(photos / "small.png", (20, 20))
    write_image(photos / "wide.png", (500, 64))
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(photos / "moves.gif", save_all=True, append_images=frames[1:])
    (photos / "a.txt").write_text("a photo of [trigger], (smiling:1.3)")
    (photos / "b.txt").write_text(" ")
    (photos / "gas_mask.txt").write_bytes("a größe".encode("cp1252"))
    (photos / "other.txt").write_text("lost")
    for name in ("x.heic", "y.mp4", "z.mp4", "a.npz", "Thumbs.db"):
        (photos / name).write_bytes(b"x")
    found = scanned(Folder(photos))
    assert [example.path.name for example in found.examples] == [
        "a.png", "b.png", "gas_mask.png", "moves.gif", "small.png", "wide.png"
    ]  # fmt: skip
    notes = {finding.what.split(",")[0].split(" in another")[0]: finding for finding in found.found.all()}
    assert "2 .mp4" in notes["files that are not read"].names and notes["files that are not read"].count >= 2
    names = {what: finding.names for what, finding in notes.items()}
    assert names["masks of other images"] == ("b_mask.png", "c-masklabel.png")
    assert names["folders inside that hold images"] == (str(photos / "inside"),)
    assert names["animations"] == ("moves.gif",)
    assert names["images enlarged more than 1.5 times"] == ("small.png",)
    assert names["images of which more than 20% is cut off"] == ("wide.png",)
    assert names["captions that are not UTF-8"] == ("gas_mask.png in cp1252",)
    assert names["files of captions without an image"] == ("other.txt",)
    assert names["captions with [trigger]"] == names["captions that weight words"] == ("a.png",)
    assert "b.png: b.txt is empty" in names["images without a caption"]
    triggered = scanned(Folder(photos, trigger="zqx"))
    assert next(e.caption for e in triggered.examples if e.path.name == "a.png") == "a photo of zqx, (smiling:1.3)"
    added = next(finding for finding in triggered.found.all() if "now added" in finding.what)
    assert added.line() == "captions without the trigger, now added: 1 (gas_mask.png)"
    assert [e.caption for e in triggered.examples][:3] == ["a photo of zqx, (smiling:1.3)", "zqx", "zqx, a größe"]


def test_names_of_folders_mean_repeats_and_class_as_in_sd_scripts(tmp_path):
    write_image(tmp_path / "10_zqx  man" / "a.png")
    write_image(tmp_path / "1_man" / "b.png")
    write_image(tmp_path / "deep" / "er" / "c.png")
    folders = expand(Folder(tmp_path), recursive=False)
    assert [(f.path.name, f.repeats, f.class_tokens) for f in folders] == [
        ("10_zqx  man", 10, "zqx man"), ("1_man", 1, "man")
    ]  # fmt: skip
    assert [(e.caption, e.repeats) for e in scanned(*folders).examples] == [("zqx man", 10), ("man", 1)]
    write_image(tmp_path / "runs" / "x" / "samples" / "1.png")
    for name in ("config.toml", "log.jsonl"):
        (tmp_path / "runs" / "x" / name).touch()
    write_image(tmp_path / "1" / "2" / "3" / "4" / "far.png")
    names = [folder.path.name for folder in expand(Folder(tmp_path), recursive=True)]
    assert names == ["4", "10_zqx  man", "1_man", "er"], "not the previews of a run"
    assert [path.name for path in subfolders(tmp_path)] == ["10_zqx  man", "1_man", "er"]
    assert [f.repeats for f in expand(Folder(tmp_path / "10_zqx  man", weight=2), recursive=False)] == [1]
    own = Folder(tmp_path / "10_zqx  man", repeats=3)
    assert expand(own, recursive=False) == [own]
    with pytest.raises(WrongRequest, match="1 lie in 1 folders inside it; name those, or pass --recursive"):
        expand(Folder(tmp_path / "deep"), recursive=False)


def test_impossible_request_is_not_blamed_on_the_images(tmp_path):
    write_image(tmp_path / "a.png")
    for upscale in (True, False):
        with pytest.raises(WrongRequest, match="^a bucket step of 24"):
            scanned(Folder(tmp_path), step=24, upscale=upscale, skip_bad=True)


def test_unusable_folder_gives_one_clear_error(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nested" / "inside").mkdir(parents=True)
    write_image(tmp_path / "nested" / "inside" / "a.png")
    for folder, message in [
        (Folder(tmp_path / "none"), "none does not exist"),
        (Folder(tmp_path / "a.png"), "a.png is a file, not a folder"),
        (Folder(tmp_path / "empty"), "empty holds no images that"),
        (Folder(tmp_path / "nested"), "holds no images that fluxq reads"),
        (Folder(tmp_path, repeats=0), "0 repeats"),
    ]:
        with pytest.raises(WrongRequest, match=message):
            scanned(folder, skip_bad=True)
    with pytest.raises(WrongRequest, match="no folder"):
        scanned()


def test_nothing_left_after_skipping_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(WrongRequest, match=r"no usable image is left \(1 skipped\); the first: .*a.png cannot be read"):
        scanned(Folder(tmp_path), skip_bad=True)
