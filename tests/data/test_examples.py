"""From folders to examples: captions, triggers, repeats, and a clear error for every bad request."""

from pathlib import Path

import pytest
from PIL import Image

from fluxq.data.examples import Folder, read_caption, scan, with_trigger
from fluxq.errors import WrongRequest


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


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({}, ""),
        ({".txt": b"a dog"}, "a dog"),
        ({".caption": b"a cat"}, "a cat"),
        ({".txt": b"a dog", ".caption": b"a cat"}, "a dog"),
        ({".txt": b" \n\t\n", ".caption": b"a cat"}, "a cat"),
        ({".txt": b"\xef\xbb\xbfa dog"}, "a dog"),
        ({".txt": b"\n\r\n  a \t dog   on\xc2\xa0grass \r\nsecond line"}, "a dog on grass"),
        ({".txt": "größe 犬".encode()}, "größe 犬"),
        ({".txt": b""}, ""),
    ],
)
def test_caption_is_the_first_line_with_text(tmp_path, files, caption):
    for suffix, data in files.items():
        (tmp_path / f"a.b{suffix}").write_bytes(data)
    assert read_caption(tmp_path / "a.b.png") == caption


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a dog", None, "a dog"),
        ("a dog", "zqx", "zqx, a dog"),
        ("a zqx dog", "zqx", "a zqx dog"),
        ("Zqx, a dog", "zqx", "Zqx, a dog"),
        ("a category", "cat", "cat, a category"),
        ("", "zqx", "zqx"),
        ("", None, ""),
        ("a dog", "  ", "a dog"),
        ("a sks  man (x)", "man (x)", "a sks  man (x)"),
    ],
)
def test_trigger_is_put_in_front_unless_the_caption_has_it(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


def test_caption_changes_are_noted_once_per_folder(tmp_path):
    for name in "abcdef":
        write_image(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text("a dog" if name < "e" else "")
    notes = scanned(Folder(tmp_path / "photos", trigger="zqx")).notes
    assert notes == [
        f"{tmp_path / 'photos'}: captions without the trigger 'zqx', now added: 4 (a.png, b.png, c.png, ...)"
    ]
    notes = scanned(Folder(tmp_path / "photos")).notes
    assert len(notes) == 1 and notes[0].endswith("trained with the empty caption: 2 (e.png, f.png)")


def test_file_listed_twice_counts_once_and_is_noted(tmp_path):
    write_image(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "photos" / "a.png")
    found = scanned(
        Folder(tmp_path / "photos", trigger="x"), Folder(tmp_path / "photos" / ".." / "photos", trigger="x")
    )
    assert [example.name for example in found.examples] == ["photos/a.png"]
    assert [note.split(": ", 1)[1] for note in found.notes] == [
        "images listed more than once, each counted once: 1 (link.png)",
        "images listed more than once, each counted once: 2 (a.png, link.png)",
    ]


def test_names_are_unique_and_stay_when_folders_move(tmp_path):
    for place in ("one", "two"):
        for parent in ("x", "y"):
            write_image(tmp_path / place / parent / "photos" / "a.png")
        write_image(tmp_path / place / "photos#2" / "a.png")
        folders = [tmp_path / place / "x" / "photos", tmp_path / place / "photos#2", tmp_path / place / "y" / "photos"]
        names = [example.name for example in scanned(*(Folder(folder) for folder in folders)).examples]
        assert names == ["photos/a.png", "photos#2/a.png", "photos#3/a.png"]


def test_bad_images_and_captions_are_refused_or_skipped(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    write_image(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    write_image(tmp_path / "narrow.png", (10, 300))
    for name, what in [("bad.png", "cannot be read"), ("latin.txt", "is not UTF-8"), ("narrow.png", "narrower")]:
        with pytest.raises(WrongRequest, match=f"{name}.* {what}.*--skip-bad"):
            scanned(Folder(tmp_path), upscale=False)
        skipped = scanned(Folder(tmp_path), upscale=False, skip_bad=True).skipped
        assert sum(name in line and what in line for line in skipped) == 1
        (tmp_path / name).unlink()
    assert [e.path.name for e in scanned(Folder(tmp_path)).examples] == ["good.png", "latin.png"]


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
        (Folder(tmp_path / "empty"), "empty holds no image"),
        (Folder(tmp_path / "nested"), "subfolders are not searched"),
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
