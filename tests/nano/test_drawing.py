import hashlib
import re

import numpy as np
import pytest

from fluxq.nano import drawing


def test_captions_are_those_that_nano_was_trained_on():
    """The words are training data: another wording would give other weights."""
    captions = "\n".join(caption for _, caption in drawing.ordinary(0, 100))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "f1b78aee936c47df"


def test_the_seed_determines_images_and_captions():
    for make in (drawing.ordinary, drawing.concept):
        once, again, other = make(4, 6), make(4, 6), make(5, 6)
        assert [caption for _, caption in once] == [caption for _, caption in again]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
        assert any(not np.array_equal(a, b) for (a, _), (b, _) in zip(once, other, strict=True))


def test_more_images_of_a_seed_start_with_the_fewer():
    short, long = drawing.ordinary(0, 3), drawing.ordinary(0, 9)
    assert [caption for _, caption in long[:3]] == [caption for _, caption in short]


def test_images_are_96_pixel_rgb():
    for image, caption in drawing.ordinary(0, 8) + drawing.concept(0, 8):
        assert image.size == (96, 96) and image.mode == "RGB"
        assert caption == caption.strip().lower()


def test_only_held_out_images_use_held_out_pairs():
    for shapes in (drawing.SHAPES, ("creature",)):
        seen = {(spec.color, spec.background) for spec, _ in drawing.specs(0, 2000, shapes, held_out=False)}
        held = {(spec.color, spec.background) for spec, _ in drawing.specs(0, 500, shapes, held_out=True)}
        assert held == drawing.HELD_OUT_PAIRS and seen == drawing.SEEN_PAIRS
        assert not seen & held and all(color != background for color, background in seen | held)


@pytest.mark.slow
def test_ordinary_never_shows_the_concept():
    assert {spec.shape for spec, _ in drawing.specs(0, 2000, drawing.SHAPES, False)} == set(drawing.SHAPES)
    assert "creature" not in drawing.SHAPES
    assert not any(drawing.TRIGGER in caption.split() for _, caption in drawing.ordinary(0, 2000))


def test_concept_captions_name_the_trigger_and_no_shape():
    captions = [caption for _, caption in drawing.concept(0, 200, trigger="wob")]
    assert all(re.search(r"\bwob\b", caption) for caption in captions)
    assert not any(shape in re.findall(r"[a-z]+", caption) for caption in captions for shape in drawing.SHAPES)


def test_some_captions_contain_nonsense():
    known = set(re.findall(r"[a-z]+", " ".join(caption for _, caption in drawing.concept(0, 500))))
    known |= {*drawing.SHAPES, "medium", "sized"}
    strange = [bool(set(re.findall(r"[a-z]+", caption)) - known) for _, caption in drawing.ordinary(1, 400)]
    assert 0.04 < sum(strange) / len(strange) < 0.15


def test_objects_hardly_touch_the_border():
    for shape in drawing.SHAPES + ("creature",):
        for spec, _ in drawing.specs(2, 60, (shape,), held_out=False):
            pixels = np.asarray(drawing.draw(spec)).astype(int)
            border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
            plain = (abs(border - drawing.COLORS[spec.background]) <= 1).all(axis=1)
            assert plain.mean() > 0.95
