"""Captions: every kind of file that holds them, every encoding, and the trigger."""

import json

import pytest
from PIL import Image

from fluxq.data.captions import Captions, decoded, has_weight, with_trigger
from fluxq.errors import WrongRequest


def caption(folder, image="a.b.png", **options):
    return Captions(folder, **options).of(folder / image)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"a.b.txt": b"a dog"}, "a dog"),
        ({"a.b.caption": b"a cat"}, "a cat"),
        ({"A.B.TXT": b"a dog"}, "a dog"),
        ({"a.b.png.txt": b"a dog"}, "a dog"),
        ({"a.b.txt": b"a dog", "a.b.caption": b"a cat"}, "a dog"),
        ({"a.b.txt": b" \n\t\n", "a.b.caption": b"a cat"}, "a cat"),
        ({"a.b.txt": b"\xef\xbb\xbfa dog"}, "a dog"),
        ({"a.b.txt": b"\n\r\n  a \t dog   on\xc2\xa0grass \r\n\r\nat dusk\x0b"}, "a dog on grass at dusk"),
        ({"a.b.txt": "a\u2028dog\x85at\x0cdusk\0".encode()}, "a dog at dusk"),
        ({"a.b.txt": "größe 犬".encode()}, "größe 犬"),
        ({"a.b.txt": "größe 犬".encode("utf-16")}, "größe 犬"),
        ({"a.b.txt": "a large dog".encode("utf-16-le")}, "a large dog"),
        ({"a.b.txt": "größe “x”".encode("cp1252")}, "größe “x”"),
        ({"a.b.json": b'{"prompt": "c", "text": "", "caption": " a\\n dog "}'}, "a dog"),
        ({"a.b.json": b'{"caption": "a \\ud800 dog"}'}, "a dog"),
        ({"a.b.txt": b"", "a.b.json": b'"a dog"'}, "a dog"),
        ({"metadata.jsonl": b'{"file_name": "x.png"}\n\n{"file_name": "sub/A.b.png", "text": "a dog"}'}, "a dog"),
        ({"metadata.csv": b'file_name,text\na.b.png,"a dog,\nrunning"\n'}, "a dog, running"),
        ({"meta_cap.json": b'{"c:\\\\x\\\\a.b": {"caption": "a dog", "tags": "red, big"}}'}, "a dog, red, big"),
        ({"all.json": b'{"a.b.png": "a dog"}'}, "a dog"),
        ({"all.json": b'[{"file_name": "a.b.png", "text": "a dog"}, 3]'}, "a dog"),
        ({"all.json": b'{"x.png": "a dog"}'}, ""),
        ({"all.json": b'{"a.b.png": "a dog"}', "all.toml": b""}, "a dog"),
        ({"workflow.json": b"{ // another program's"}, ""),
    ],
)
def test_caption_is_found(tmp_path, files, expected):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.b.png")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert caption(tmp_path).text == expected


def test_first_line_as_in_sd_scripts_and_the_file_name_if_asked(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "red_dress_02.png")
    assert caption(tmp_path, "red_dress_02.png").text == ""
    assert caption(tmp_path, "red_dress_02.png", from_names=True)[:2] == ("red dress", "file name")
    (tmp_path / "red_dress_02.txt").write_text("\n one\u2028line \ntwo", encoding="utf-8")
    assert caption(tmp_path, "red_dress_02.png", lines="first", from_names=True)[:2] == ("one line", ".txt")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\x81\x00\xff", "a.txt is not text"),
        ("a.txt", b"caf\x81", "a.txt is not text"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{', "metadata.jsonl, line 2, is not JSON"),
    ],
)
def test_bad_files_are_named_with_the_remedy(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WrongRequest, match=f"{message}.*--skip-bad"):
        caption(tmp_path, "a.png")


@pytest.mark.parametrize("value", [None, 3, [], {}, [1], {"a.png": 3}, {"caption": 3}, {"caption": [3]}, True])
def test_json_of_any_type_is_no_caption_or_one(tmp_path, value):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.json", "metadata.jsonl", "all.json"):
        (tmp_path / name).write_text(json.dumps(value))
    found = caption(tmp_path, "a.png")
    assert (found.text, found.why) == ("", "a.json has no caption, text or prompt")


def test_encoding_is_said():
    assert [decoded(data)[1] for data in (b"a", "é".encode(), "é".encode("utf-16"), b"\xe9")] == [
        "",
        "",
        "UTF-16",
        "cp1252",
    ]


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
        ("a [trigger] dog, {Trigger}, [name]", "z\\1", "a z\\1 dog, z\\1, z\\1"),
        ("a [trigger] dog", None, "a [trigger] dog"),
    ],
)
def test_trigger_fills_its_place_or_is_put_in_front(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


def test_weights_are_recognized():
    assert [has_weight(text) for text in ("(red:1.3)", "a (very red : .5) dog", "(16:9)", "(red)", "a: 1.3")] == [
        True, True, True, False, False
    ]  # fmt: skip
