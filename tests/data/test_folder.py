"""Resolutions as people write them, and several datasets that share an epoch."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fluxq.data import scan
from fluxq.data.examples import balanced, check_folder, whole_repeats
from fluxq.errors import WrongRequest
from fluxq.settings import Folder, parse_resolution, sizes_of


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        (768, ((768, 768),)),
        ("768", ((768, 768),)),
        ("768x1024", ((768, 1024),)),
        ([768, 1024], ((768, 1024),)),
        ("512,768x1024", ((512, 512), (768, 1024))),
        ([512, 768, 1024], ((512, 512), (768, 768), (1024, 1024))),
        ([[512, 512], [768, 1024]], ((512, 512), (768, 1024))),
        (["512", "768 × 1024"], ((512, 512), (768, 1024))),
        ([[512], [768]], ((512, 512), (768, 768))),
        ("512, 512", ((512, 512),)),
    ],
)
def test_resolutions_as_people_write_them(written, sizes):
    resolution = parse_resolution(written)
    assert sizes_of(resolution) == sizes and sizes_of(parse_resolution(resolution)) == sizes
    assert isinstance(resolution, int) == (len(sizes) == 1 and sizes[0][0] == sizes[0][1])


@pytest.mark.parametrize(
    "written", ["", "x", "512x", "1.5", 8, True, [], [[1, 2, 3]], {"a": 1}, [512, "a"], -512, None]
)
def test_other_resolutions_are_refused(written):
    with pytest.raises(ValueError, match="a number of pixels"):
        parse_resolution(written)


def photos(root: Path, count: int, size=(128, 128), color="red") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, color).save(root / f"{i}.png")
    return root


def test_an_image_is_trained_at_each_of_several_sizes(tmp_path):
    photos(tmp_path, 1), Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    found = scan([Folder(tmp_path, resolution=((64, 64), (128, 128)), upscale=False)], 32)
    names = {e.name.partition("/")[2]: e.bucket for e in found.examples}
    assert names == {"0.png@64x64": (64, 64), "0.png@128x128": (128, 128), "small.png@64x64": (64, 64)}
    with pytest.raises(
        WrongRequest, match=r"no image of .* is as large as 256 x 256 pixels \(the largest has the area"
    ):
        scan([Folder(tmp_path, resolution=((64, 64), (256, 256)))], 32)
    assert [e.bucket for e in scan([Folder(tmp_path, resolution=256)], 32).examples] == [(256, 256)] * 2


def test_one_folder_named_twice_has_the_same_captions(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    found = scan([Folder(folder), Folder(folder, resolution=64)], 128)
    assert [(e.name, e.bucket) for e in found.examples] == [("photos/0.png", (128, 128)), ("photos#2/0.png", (64, 64))]
    with pytest.raises(
        WrongRequest, match=r"photos is named twice, with different captions for 0.png \('' and 'a dog'\)"
    ):
        scan([Folder(folder), Folder(folder, class_tokens="a dog")], 128)


def test_weights_become_small_repeats(tmp_path):
    many, few = photos(tmp_path / "many", 6), photos(tmp_path / "few", 2, color="blue")
    examples = scan([Folder(many, weight=1), Folder(few, weight=1)], 64).examples
    assert [e.repeats for e in balanced(examples, [many, few])] == [1] * 6 + [3] * 2
    assert whole_repeats({Path("a"): 1.0, Path("b"): 1.5}) == {Path("a"): 2, Path("b"): 3}
    assert whole_repeats({Path("a"): 1.0, Path("b"): 1.04}) == {Path("a"): 1, Path("b"): 1}
    with pytest.raises(WrongRequest, match=r"few has weight and repeats; set one of them, or leave weight out"):
        check_folder(Folder(few, weight=1, repeats=2), Folder(few))


def test_a_folder_that_is_named_twice_has_two_weights(tmp_path):
    twice, other = photos(tmp_path / "a", 1), photos(tmp_path / "b", 1, color="blue")
    folders = [Folder(twice, weight=1, resolution=64), Folder(twice, weight=4, resolution=128), Folder(other, weight=1)]
    assert [e.repeats for e in balanced(scan(folders, 64).examples, [twice, other])] == [1, 4, 1]


def test_two_links_to_one_image_count_once_whatever_their_captions(tmp_path):
    folder = photos(tmp_path / "a", 1)
    (folder / "1.png").symlink_to(folder / "0.png")
    (folder / "1.txt").write_text("another caption")
    found = scan([Folder(folder)], 64)
    assert [e.path.name for e in found.examples] == ["0.png"] and "more than once" in found.notes[0]


def test_regularization_images_are_repeated_to_as_many_as_others(tmp_path):
    own, prior = photos(tmp_path / "own", 6), photos(tmp_path / "prior", 2, color="blue")
    held_out = photos(tmp_path / "held", 9, color="green")
    folders = [Folder(own), Folder(prior, regularization=True, prior_weight=0.5), Folder(held_out)]
    examples = balanced(scan(folders, 64).examples, [own, prior])
    assert {(e.path.parent, e.repeats, e.weight) for e in examples} == {
        (own, 1, 1.0),
        (prior, 3, 0.5),
        (held_out, 1, 1.0),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep_tokens": 1},
            "has keep_tokens and neither shuffle_tags nor tag_dropout; set one of these, or leave keep",
        ),
        ({"prior_weight": 0.5}, "has prior_weight and no regularization; set it, or leave prior_weight out"),
        ({"mask_normalize": True}, "has mask_normalize and no masks"),
        ({"caption_dropout": 1.0}, "has caption_dropout = 1 and captions, none of which would be seen"),
        (
            {"caption_dropout_epochs": 1},
            "has caption_dropout_epochs = 1 and captions, .* seen; set 2, or leave caption",
        ),
    ],
)
def test_settings_that_have_no_effect_together_are_named_in_pairs(tmp_path, settings, message):
    with pytest.raises(WrongRequest, match=message):
        check_folder(Folder(tmp_path, **settings), Folder(tmp_path, **settings))


def test_thousands_of_images_are_balanced_at_once(tmp_path):
    one = scan([Folder(photos(tmp_path / "own", 1), weight=1)], 64).examples[0]
    own, times = [replace(one, name=str(i)) for i in range(5000)], time.process_time()
    assert [e.repeats for e in balanced(own, {one.folder.path})] == [1] * 5000
    assert time.process_time() - times < 2
