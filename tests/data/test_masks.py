"""Masks: found beside their images, in a folder or in the transparency, and read as what each latent counts."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxq.data import scan
from fluxq.data.examples import check_folder
from fluxq.data.images import View
from fluxq.data.masks import read_mask
from fluxq.errors import WrongRequest
from fluxq.settings import Folder, ImageSettings


def photos(root: Path, *names: str, size=(64, 64)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, "red").save(root / name)
    return root


def half(path: Path, size=(64, 64)) -> Path:
    """A mask whose left half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


def scanned(folder: Folder, **more):
    return scan([folder], 64, 32, 128, **more)


def named(found) -> dict:
    return {finding.what: finding.names for finding in found.found.all()}


def test_masks_beside_their_images(tmp_path):
    photos(tmp_path, "a.png", "b.jpg", "c.png")
    half(tmp_path / "a-masklabel.png"), half(tmp_path / "B_mask.png")
    assert [e.mask for e in scanned(Folder(tmp_path)).examples] == [None] * 3
    found = scanned(Folder(tmp_path, masks="beside"))
    assert {e.path.name: e.mask and e.mask.name for e in found.examples} == {
        "a.png": "a-masklabel.png", "b.jpg": "B_mask.png", "c.png": None
    }  # fmt: skip
    assert named(found)["images without a mask, trained whole"] == ("c.png",)


def test_of_two_masks_the_one_that_does_not_count_is_said(tmp_path):
    photos(tmp_path / "photos", "a.png", "b.png")
    half(tmp_path / "photos" / "a-mask.png"), half(tmp_path / "photos" / "a_mask.png")
    half(tmp_path / "masks" / "a.png"), half(tmp_path / "masks" / "a_mask.png"), half(tmp_path / "masks" / "b.png")
    for masks, unused in (("beside", "a-mask.png"), (str(tmp_path / "masks"), "a.png")):
        found = scanned(Folder(tmp_path / "photos", masks=masks))
        assert found.examples[0].mask.name == "a_mask.png"
        assert named(found)["masks of images that have another mask, which is the one that counts"] == (unused,)


def test_masks_in_a_folder_of_their_own(tmp_path):
    photos(tmp_path / "photos", "a.jpg", "b.jpg")
    (
        half(tmp_path / "masks" / "a.png", (32, 32)),
        half(tmp_path / "masks" / "B-mask.png"),
        half(tmp_path / "masks" / "c.png"),
    )
    found = scanned(Folder(tmp_path / "photos", masks=str(tmp_path / "masks")))
    assert [e.mask.name for e in found.examples] == ["a.png", "B-mask.png"]
    assert named(found)["masks without an image"] == ("c.png",)
    assert named(found)["masks of another size than their image, scaled to it"] == ("a.jpg",)


def test_the_transparency_of_images(tmp_path):
    photos(tmp_path, "b.png")
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (32, 0, 64, 64))
    image.save(tmp_path / "a.png")
    first, second = scanned(Folder(tmp_path, masks="alpha")).examples
    assert (first.mask, second.mask) == (first.path, None)
    mask = read_mask(first.path, True, (64, 64), (64, 64), View())
    torch.testing.assert_close(mask, torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], 1))


def test_a_mask_follows_the_view_of_its_image(tmp_path):
    path, shape = half(tmp_path / "a.png", (80, 64)), ((80, 64), (64, 64))
    left = [read_mask(path, False, *shape, view)[0].tolist() for view in (View(), View(mirrored=True))]
    assert left == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert read_mask(path, False, *shape, View(offset=(0, 0), colors=(1.1, 1, 1)))[0].tolist() == [1] * 5 + [0] * 3
    soft = read_mask(half(tmp_path / "b.png", (8, 8)), False, (8, 8), (8, 8), View())
    torch.testing.assert_close(soft, torch.full((1, 1), 0.5))


def test_what_is_transparent_in_a_mask_counts_as_black(tmp_path):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    mask.save(tmp_path / "m.png")
    read = read_mask(tmp_path / "m.png", False, (64, 64), (64, 64), View())
    torch.testing.assert_close(read, torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], 1))


def test_masks_that_are_of_no_use(tmp_path):
    photos(tmp_path, "a.png")
    half(tmp_path / "a-masklabel.png", (64, 32))
    with pytest.raises(
        WrongRequest, match=r"a-masklabel.png has 64 x 32 pixels and its image 64 x 64, which is another"
    ):
        scanned(Folder(tmp_path, masks="beside"))
    photos(tmp_path / "bare", "a.png")
    with pytest.raises(WrongRequest, match=r"no image of .*bare has a mask \(beside\); add some, or leave out --masks"):
        scanned(Folder(tmp_path / "bare", masks="beside"))
    with pytest.raises(WrongRequest, match=r"masks = nowhere is neither beside nor alpha nor a folder"):
        scanned(Folder(tmp_path, masks="nowhere"))
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    with pytest.raises(WrongRequest, match=r"the mask .*black.png is black wherever its image is trained"):
        read_mask(tmp_path / "black.png", False, (64, 64), (64, 64), View())
    with pytest.raises(WrongRequest, match="has mask_outside and no masks; set masks, or leave mask_outside out"):
        check_folder(Folder(tmp_path, mask_outside=0.1), Folder(tmp_path))
    check_folder(Folder(tmp_path), Folder(tmp_path, mask_outside=0.1))  # of [data], for another folder


def test_masks_of_all_folders_are_in_one_of_them(tmp_path):
    masked, bare = photos(tmp_path / "masked", "a.png"), photos(tmp_path / "bare", "b.png")
    half(masked / "a-masklabel.png")
    found = scan([Folder(masked, masks="beside"), Folder(bare, masks="beside")], 64, 32, 128)
    assert [e.mask is not None for e in found.examples] == [True, False]
    assert named(found)["images without a mask, trained whole"] == ("bare/b.png",)


def test_what_a_folder_leaves_unset_is_as_all_folders_have_it():
    folder = Folder(Path("a"), flip=False).filled(ImageSettings(flip=True, variants=3))
    assert (folder.flip, folder.variants, folder.mask_outside, folder.masks) == (False, 3, 0.0, None)
