"""What is random about captions and images, drawn by address: the same for every run, within what was asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxq.data.buckets import choose_bucket
from fluxq.data.images import View, prepare
from fluxq.data.variants import caption_variants, image_views
from fluxq.settings import Folder, ImageSettings


def folder(**settings) -> Folder:
    return Folder(Path("photos"), **settings).filled(ImageSettings())


def test_nothing_random_is_one_caption_with_prefix_suffix_and_trigger():
    plain = folder(trigger="zqx", caption_prefix="photo of", caption_suffix="35 mm film")
    assert caption_variants(["a dog"], plain) == ("zqx, photo of a dog 35 mm film",)
    assert caption_variants([], folder(trigger="zqx")) == ("zqx",)
    assert caption_variants([], folder(class_tokens="a man")) == ("a man",)
    assert caption_variants(["a", "b", "a"], folder(trigger="zqx")) == ("zqx, a", "zqx, b"), "several captions"


def test_shuffled_tags_keep_the_first_and_lose_none():
    found = caption_variants(["zqx, red, green, blue, black"], folder(trigger="zqx", shuffle_tags=True, keep_tokens=2))
    assert len(set(found)) == 6, "all orders of three tags, though eight were wanted"
    assert all(
        text.startswith("zqx, red, ") and set(text.split(", ")) == {"zqx", "red", "green", "blue", "black"}
        for text in found
    )
    assert found == caption_variants(
        ["zqx, red, green, blue, black"], folder(trigger="zqx", shuffle_tags=True, keep_tokens=2)
    )
    assert len(caption_variants(["a, b, c, d, e"], folder(shuffle_tags=True, variants=3))) == 3
    assert caption_variants(["a; b; c"], folder(shuffle_tags=True, caption_separator=";"))[0].count("; ") == 2


def test_a_mark_separates_what_is_kept_in_front_and_behind():
    marked = folder(shuffle_tags=True, keep_tokens_separator="|||")
    found = caption_variants(["A, B ||| 1, 2, 3 ||| Z"], marked)
    assert (
        {text[:6] for text in found} == {"A, B, "} and {text[-3:] for text in found} == {", Z"} and len(set(found)) == 6
    )
    assert caption_variants(["A ||| 1"], folder(keep_tokens_separator="|||")) == ("A, 1",), "nothing is shuffled"


def test_dropped_tags_are_neither_kept_ones_nor_the_trigger():
    dropping = folder(trigger="zqx", tag_dropout=0.5, keep_tokens=1, variants=64)
    found = caption_variants(["first, a, b, zqx, c, d"], dropping)
    assert all(text.startswith("first") and "zqx" in text.split(", ") for text in found)
    kept = sum(len(text.split(", ")) - 2 for text in found) / len(found)
    assert 1 < kept < 3, "about two of the four others"
    order = [text.split(", ") for text in found]
    assert all(tags == [tag for tag in ["first", "a", "b", "zqx", "c", "d"] if tag in tags] for tags in order)


def test_a_tag_is_dropped_as_often_as_asked_though_few_variants_differ():
    texts = [f"{i}, a, b, c" for i in range(50)]
    found = [caption_variants([text], folder(tag_dropout=0.1, keep_tokens=1)) for text in texts]
    assert max(len(set(some)) for some in found) <= 8
    shares = [sum("a" in text for text in some) / len(some) for some in found]
    assert sum(shares) / len(shares) == pytest.approx(0.9, abs=0.02), "equal variants count as often as they are drawn"
    assert caption_variants(["one tag"], folder(shuffle_tags=True)) == ("one tag",)


def test_a_trigger_that_is_put_in_front_is_the_first_of_those_kept():
    found = caption_variants(["a, b, c"], folder(trigger="zqx", shuffle_tags=True, keep_tokens=1))
    assert {text[:5] for text in found} == {"zqx, "} and {text[5] for text in found} == {"a", "b", "c"}
    found = caption_variants(
        ["a; b; c"], folder(trigger="zqx", shuffle_tags=True, keep_tokens=2, caption_separator=";")
    )
    assert {text[:7] for text in found} == {"zqx, a;"} and len(set(found)) == 2


def test_each_of_many_captions_is_seen():
    lines = [f"{i}, red, green, blue" for i in range(12)]
    found = caption_variants(lines, folder(shuffle_tags=True, keep_tokens=1))
    assert {text.split(",")[0] for text in found} == {str(i) for i in range(12)}


def test_wildcards_are_drawn_also_inside_others():
    found = caption_variants(["a {red|{dark|light} blue} car"], folder(wildcards=True))
    assert set(found) == {"a red car", "a dark blue car", "a light blue car"}
    assert caption_variants(["a {red|blue} car"], folder()) == ("a {red|blue} car",)
    assert caption_variants(["a {trigger} car {x}"], folder(wildcards=True, trigger="zqx")) == ("a zqx car {x}",)


def test_views_of_an_image_are_plain_first_and_bounded():
    resized, bucket = (80, 64), (64, 64)
    assert image_views("a.png", resized, bucket, folder()) == (View(),)
    assert image_views("a.png", resized, bucket, folder(flip=True)) == (View(), View(mirrored=True))
    cropped = image_views("a.png", resized, bucket, folder(random_crop=True, variants=5))
    assert len(cropped) == 5 and cropped[0] == View()
    assert all(view.offset and 0 <= view.offset[0] <= 16 and view.offset[1] == 0 for view in cropped[1:])
    assert image_views("a.png", bucket, bucket, folder(random_crop=True)) == (View(),), "nothing to move"
    colored = image_views("a.png", bucket, bucket, folder(color_augment=True, flip=True))
    assert len(colored) == 8 and {view.mirrored for view in colored} == {True, False}
    assert all(view.colors and all(0.9 <= factor <= 1.1 for factor in view.colors) for view in colored[1:])
    assert cropped != image_views("b.png", resized, bucket, folder(random_crop=True, variants=5))


def test_a_view_is_what_reaches_the_encoder():
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    image, bucket = Image.fromarray(noise), (64, 64)
    plain = prepare(image, image.size, bucket)
    torch.testing.assert_close(prepare(image, image.size, bucket, View(mirrored=True)), plain.flip(2))
    whole = torch.from_numpy(noise.transpose(2, 0, 1).copy()) / 127.5 - 1
    torch.testing.assert_close(prepare(image, image.size, bucket, View(offset=(5, 0))), whole[:, :, 5:69])
    torch.testing.assert_close(
        prepare(image, image.size, bucket, View(mirrored=True, offset=(5, 0))), whole[:, :, 5:69].flip(2)
    )
    brighter = prepare(image, image.size, bucket, View(colors=(1.1, 1.0, 1.0)))
    assert brighter.mean() > plain.mean() and (brighter - plain).abs().max() < 0.25
    assert len({View().key(), View(mirrored=True).key(), View(offset=(5, 0)).key()}) == 3 and View().key() == ()


@pytest.mark.parametrize("size", [(1024, 683), (500, 777)])
def test_offsets_stay_inside_the_image(size):
    bucket, resized = choose_bucket(*size, 64, 32, 128, 16, True)
    image = Image.new("RGB", size, "red")
    for view in image_views("a.png", resized, bucket, folder(random_crop=True)):
        assert prepare(image, resized, bucket, view).shape == (3, bucket[1], bucket[0])
