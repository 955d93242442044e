"""Copies, blur and plain images, seen in photographs and drawings."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

from fluxq.data.findings import Findings
from fluxq.data.looks import ALIKE, AREAS, Look, copies, look_at
from fluxq.errors import WrongRequest
from fluxq.nano import drawing


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea"):
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image.save(folder / f"{name}.png")
        image.filter(ImageFilter.GaussianBlur(4)).save(folder / f"{name}_blurred.png")
    small = image.resize((200, 133))
    small.save(folder / "small.jpg", quality=60)
    (folder / "twin.jpg").write_bytes((folder / "small.jpg").read_bytes())
    Image.new("RGB", (300, 200)).save(folder / "black.png")
    Image.new("RGB", (300, 200), (90, 90, 91)).save(folder / "gray.png")
    return {path: look_at(path) for path in sorted(folder.iterdir())}


def test_blurred_and_plain_images_are_told_from_sharp_ones(photos):
    found = Findings()
    found.look_at_images(photos)
    names = {finding.what: finding.names for finding in found.all()}
    assert names["images that are blurred"] == ("astronaut_blurred.png", "chelsea_blurred.png", "coffee_blurred.png")
    assert names["images that are black or of one color"] == ("black.png", "gray.png")
    assert names["byte-for-byte identical files"] == ("small.jpg and twin.jpg",)
    assert "chelsea.png and small.jpg" in names["images that look the same, perhaps copies"]


def test_copies_are_found_whatever_their_size_and_file_type(photos):
    sharp = {path: look for path, look in photos.items() if "blurred" not in path.name}
    assert [(a.name, b.name, equal) for a, b, equal in copies(sharp)] == [
        ("chelsea.png", "small.jpg", False), ("small.jpg", "twin.jpg", True)
    ]  # fmt: skip


def test_drawings_of_one_subject_are_no_copies(tmp_path):
    looks = {}
    for i, (image, _) in enumerate(drawing.concept(seed=1, count=8)):
        image.save(tmp_path / f"{i}.png")
        looks[tmp_path / f"{i}.png"] = look_at(tmp_path / f"{i}.png")
    assert list(copies(looks)) == [] and not any(look.is_blurred or look.is_plain for look in looks.values())


def test_copies_are_those_that_every_pair_compared_would_give():
    random, looks, areas = np.random.default_rng(0), {}, np.zeros(AREAS, int)
    for i in range(60):
        areas = random.integers(60, 190, AREAS) if i % 3 == 0 else areas + random.integers(-3 - i % 2, 4 + i % 2, AREAS)
        looks[Path(f"{i}")] = Look(areas.astype(np.uint8).tobytes().hex(), 50.0, 40.0)
    pixels = np.array([list(bytes.fromhex(look.areas)) for look in looks.values()], float)
    alike = {i for i in range(60) if any(np.abs(pixels[i] - pixels[j]).mean() < ALIKE for j in range(i))}
    assert 0 < len(alike) < 40
    with patch("filecmp.cmp", return_value=False):
        assert {int(path.name) for _, path, _ in copies(looks)} == alike


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (700, 2)])
def test_any_shape_can_be_looked_at(tmp_path, size):
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / "a.png")
    look = look_at(tmp_path / "a.png")
    assert look.is_plain and list(copies({tmp_path / "a.png": look, tmp_path / "b.png": look})) == []


def test_a_damaged_image_is_refused_as_it_is_when_it_is_opened(tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with pytest.raises(WrongRequest, match="a.jpg cannot be read"):
        look_at(tmp_path / "a.jpg")
