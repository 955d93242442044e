"""Real files of every kind of image become upright 8-bit RGB on white, or give one clear error."""

import io
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from fluxq.data import images
from fluxq.data.images import image_files, image_size, listing, open_image, prepare, read_header
from fluxq.errors import WrongRequest

REMEDY = "remove it or replace it, or pass --skip-bad"


def arrow() -> np.ndarray:
    """An image (H 4, W 6) without any symmetry."""
    return np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def pixels(path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB" and image.size == image_size(path)
    return np.asarray(image)


def png(array: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG of (H, W) or (H, W, C); Pillow cannot write deep color itself."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_image_files_are_found_by_suffix_in_any_case_and_sorted(tmp_path):
    for name in ["b.PNG", "a.jpg", "c.JpEg", "d.webp", "e.bmp", "a.txt", "f.mp4", ".hidden.png", "B.png"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inside.png").touch()
    assert [path.name for path in image_files(tmp_path)] == ["B.png", "a.jpg", "b.PNG", "c.JpEg", "d.webp", "e.bmp"]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_lossless_rgb_is_read_exactly(tmp_path, suffix):
    Image.fromarray(arrow()).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(pixels(tmp_path / f"a{suffix}"), arrow())


def test_file_is_read_by_its_content_not_its_name(tmp_path):
    Image.fromarray(arrow()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), arrow())


# Where the stored rows and columns lie in the upright image, from the EXIF standard: (row 0 is, column 0 is).
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path, orientation, suffix):
    upright = np.kron(arrow()[:4:3, ::3], np.ones((16, 16, 1), np.uint8))  # blocks, so that JPEG keeps them apart
    stored = STORED[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    )
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif, **options)
    assert image_size(tmp_path / f"a{suffix}") == (32, 32)
    assert np.abs(pixels(tmp_path / f"a{suffix}").astype(int) - upright).max() <= (3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_from_the_header_is_rotated_like_the_pixels(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(arrow()).save(tmp_path / "a.png", exif=exif)
    assert image_size(tmp_path / "a.png") == ((6, 4) if orientation < 5 else (4, 6))
    assert open_image(tmp_path / "a.png").size == image_size(tmp_path / "a.png")


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b""])
def test_damaged_metadata_does_not_lose_the_image(tmp_path, exif):
    Image.fromarray(arrow()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), arrow())


def test_size_is_read_without_decoding(tmp_path, monkeypatch):
    Image.fromarray(arrow()).save(tmp_path / "a.png")

    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert image_size(tmp_path / "a.png") == (6, 4)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_alpha_is_flattened_on_white(tmp_path, suffix):
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(
        tmp_path / f"a{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {})
    )
    assert pixels(tmp_path / f"a{suffix}").tolist() == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]


def test_gray_with_alpha_is_flattened_on_white(tmp_path):
    Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), mode="LA").save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[100] * 3, [255] * 3]]


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "plain.png")
    assert pixels(tmp_path / "plain.png").tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    image.save(tmp_path / "one.png", transparency=1)
    assert pixels(tmp_path / "one.png").tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    image.save(tmp_path / "each.png", transparency=bytes([255, 0, 51]))
    assert pixels(tmp_path / "each.png").tolist() == [[[10, 20, 30], [255, 255, 255], [218, 220, 222]]]


@pytest.mark.parametrize(("mode", "value", "key"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_transparent_color_key_is_white(tmp_path, mode, value, key):
    Image.new(mode, (1, 1), value).save(tmp_path / "a.png", transparency=key)
    assert pixels(tmp_path / "a.png").tolist() == [[[255] * 3]]


DEEP = np.array([[0, 128, 257, 32768, 65278, 65535]], np.uint16)
SHALLOW = [0, 0, 1, 128, 254, 255]


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    (tmp_path / "a.png").write_bytes(png(DEEP, 0))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == SHALLOW


@pytest.mark.parametrize(
    ("color_type", "array"),
    [
        (2, np.stack([DEEP, DEEP[:, ::-1], DEEP], -1)),
        (6, np.stack([DEEP, DEEP[:, ::-1], DEEP, np.full_like(DEEP, 65535)], -1)),
        (4, np.stack([DEEP, np.full_like(DEEP, 65535)], -1)),
    ],
    ids=["RGB", "RGBA", "gray with alpha"],
)
def test_16_bit_color_is_scaled_not_clipped(tmp_path, color_type, array):
    (tmp_path / "a.png").write_bytes(png(array, color_type))
    found = pixels(tmp_path / "a.png")[0].astype(int)
    assert np.abs(found[:, 0] - SHALLOW).max() <= 1  # Pillow keeps the high byte
    if color_type != 4:
        assert np.abs(found[:, 1] - SHALLOW[::-1]).max() <= 1


def test_32_bit_and_float_images_are_scaled_not_clipped(tmp_path):
    for name, array, expected in [
        ("whole", np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        ("wider", np.array([[0, 100_000, 200_000]], np.int32), [0, 128, 255]),
        ("unit", np.array([[0.0, 0.5, 1.0, np.nan, np.inf, -1.0]], np.float32), [0, 128, 255, 0, 255, 0]),
        ("bright", np.array([[0.0, 2.0, 4.0]], np.float32), [0, 128, 255]),
    ]:
        path = tmp_path / f"{name}.png"
        Image.fromarray(array).save(path, format="TIFF")
        assert pixels(path)[0, :, 0].tolist() == expected, name


def test_gray_and_bilevel_become_rgb(tmp_path):
    Image.fromarray(np.array([[0, 77, 255]], np.uint8)).save(tmp_path / "grey.bmp")
    assert pixels(tmp_path / "grey.bmp").tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png").tolist() == [[[0] * 3, [255] * 3]]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() <= 4


def damaged_files() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    files = {"empty.png": b"", "text.webp": b"not an image at all", "header.png": header_only_png(64, 64)}
    for kind, share in [("jpeg", 0.7), ("png", 0.7), ("webp", 0.7), ("bmp", 0.7), ("jpeg", 0.02), ("png", 0.002)]:
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        files[f"{share}.{kind}"] = buffer.getvalue()[: int(len(buffer.getvalue()) * share)]
    return files


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_file_gives_one_error_with_its_name_and_the_remedy(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged_files()[name])
    with pytest.raises(WrongRequest) as raised:
        open_image(path)
    message = str(raised.value)
    assert message.startswith(f"{path} cannot be read (") and message.endswith(f"); {REMEDY}") and "\n" not in message


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(WrongRequest, match=r"none.png cannot be read \(No such file or directory\)"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("read", [image_size, open_image])
@pytest.mark.parametrize("side", [13_400, 60_000])  # above fluxq's limit, and above Pillow's own
def test_too_large_image_is_refused_from_its_header(tmp_path, read, side):
    (tmp_path / "bomb.png").write_bytes(header_only_png(side, side))
    with pytest.raises(WrongRequest, match=r"bomb.png is too large \(more than 178,956,970 pixels\); remove it"):
        read(tmp_path / "bomb.png")


def test_large_image_below_the_limit_gives_no_warning(tmp_path):
    (tmp_path / "a.png").write_bytes(header_only_png(13_000, 13_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "a.png") == (13_000, 13_000)
    with pytest.raises(WrongRequest, match="too large"):
        image_size(tmp_path / "a.png", max_pixels=1_000_000)


def test_prepare_leaves_an_image_of_the_right_size_unchanged():
    x = prepare(Image.fromarray(arrow()), (6, 4), (6, 4))
    assert x.shape == (3, 4, 6) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(arrow()).permute(2, 0, 1).float() / 127.5 - 1)


def test_prepare_spans_minus_one_to_one():
    black, white = Image.new("RGB", (5, 5)), Image.new("RGB", (5, 5), "white")
    for size in [(5, 5), (3, 3), (16, 16)]:
        assert (prepare(black, size, size) == -1).all() and (prepare(white, size, size) == 1).all()


@pytest.mark.parametrize("size", [(16, 16), (7, 5), (32, 31), (1, 1), (13, 32)])
def test_shrinking_averages_areas(size):
    image = np.random.default_rng(0).integers(0, 256, (33, 37, 3)).astype(np.uint8)
    found = prepare(Image.fromarray(image), size, size)
    rows, columns = coverage(33, size[1]), coverage(37, size[0])
    expected = np.einsum("ij,jkc,lk->cil", rows, image.astype(np.float64), columns) / 127.5 - 1
    assert np.abs(found.numpy() - expected).max() < 1e-5


def coverage(total: int, count: int) -> np.ndarray:
    """(count, total): which share of each output pixel each input pixel covers, by sampling its width finely."""
    samples = (np.arange(total * count) + 0.5) / count  # every input pixel in `count` equal pieces
    weights = np.zeros((count, total))
    np.add.at(weights, (np.arange(total * count) // total, samples.astype(int)), 1 / total)
    return weights


@pytest.mark.parametrize("size", [(12, 8), (6, 5), (7, 3)])  # larger, larger in one side, smaller in the other
def test_enlarging_either_side_uses_lanczos(size):
    image = Image.fromarray(arrow())
    expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS)).transpose(2, 0, 1) / np.float32(127.5) - 1
    assert np.allclose(prepare(image, size, size), expected, atol=1e-6)


def test_crop_is_the_center():
    image = Image.fromarray(arrow())
    whole = prepare(image, (6, 4), (6, 4))
    assert torch.equal(prepare(image, (6, 4), (4, 2)), whole[:, 1:3, 1:5])
    assert torch.equal(prepare(image, (6, 4), (3, 3)), whole[:, 0:3, 1:4])


def test_prepare_refuses_a_size_that_does_not_cover():
    with pytest.raises(ValueError, match=r"\(6, 4\) does not cover .*\(16, 4\)"):
        prepare(Image.fromarray(arrow()), (6, 4), (16, 4))


def profile_of(x: float) -> bytes:
    """An RGB profile with sRGB's curve whose red primary is less or more saturated than sRGB's: a changed `rXYZ`."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i
        for i in range(int.from_bytes(profile[128:132], "big"))
    }
    start = int.from_bytes(profile[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 8], "big") + 8
    profile[start : start + 4] = round(x * 65536).to_bytes(4, "big")
    name = int.from_bytes(profile[tags[b"desc"] + 4 : tags[b"desc"] + 8], "big")
    profile[name:] = profile[name:].replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
    return bytes(profile)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_colors_come_from_the_profile_of_the_image(tmp_path, suffix):
    image = Image.new("RGB", (16, 16), (200, 60, 50))
    options = {"quality": 100} if suffix in (".jpg", ".webp") else {}
    image.save(tmp_path / f"plain{suffix}", **options)
    image.save(tmp_path / f"wide{suffix}", icc_profile=(wide := profile_of(0.6)), **options)
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(wide)), ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    assert not read_header(tmp_path / f"plain{suffix}").recolored and read_header(tmp_path / f"wide{suffix}").recolored
    plain, found = (np.asarray(open_image(tmp_path / f"{name}{suffix}"), int)[8, 8] for name in ("plain", "wide"))
    assert np.abs(found - np.asarray(expected, int)[8, 8]).max() <= 3 < np.abs(found - plain).max()


def test_profiles_that_are_damaged_or_of_other_channels_are_ignored(tmp_path):
    image = Image.new("RGB", (4, 4), (200, 60, 50))
    for name, profile in [("damaged", b"x" * 200), ("gray", profile_of(0.6).replace(b"RGB XYZ ", b"GRAYXYZ ", 1))]:
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert open_image(tmp_path / f"{name}.png").getpixel((0, 0)) == (200, 60, 50), name


def test_transparency_keeps_its_profile(tmp_path):
    Image.new("RGBA", (4, 4), (200, 60, 50, 0)).save(tmp_path / "clear.png", icc_profile=profile_of(0.6))
    Image.new("RGBA", (4, 4), (200, 60, 50, 255)).save(tmp_path / "opaque.png", icc_profile=profile_of(0.6))
    Image.new("RGB", (4, 4), (200, 60, 50)).save(tmp_path / "rgb.png", icc_profile=profile_of(0.6))
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "opaque.png").getpixel((0, 0)) == open_image(tmp_path / "rgb.png").getpixel((0, 0))


def test_png_with_megabytes_of_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", pnginfo=text)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".tiff", ".avif", ".jfif", ".jp2", ".gif", ".ppm", ".tga", ".qoi"])
def test_other_formats_of_pillow_are_read(tmp_path, suffix):
    options = {"format": "JPEG"} if suffix == ".jfif" else {}
    Image.new("RGB", (32, 16), (200, 60, 50)).save(tmp_path / f"a{suffix}", **options)
    assert image_files(tmp_path) == [tmp_path / f"a{suffix}"] and image_size(tmp_path / f"a{suffix}") == (32, 16)
    assert np.abs(np.subtract(open_image(tmp_path / f"a{suffix}").getpixel((8, 8)), (200, 60, 50))).max() <= 4


def test_formats_of_optional_packages_are_read_once_they_are_installed(tmp_path, monkeypatch):
    (tmp_path / "a.heic").touch()
    images._plugin.cache_clear()
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    assert image_files(tmp_path) == [] and listing(tmp_path).unread == {".heic": 1}
    images._plugin.cache_clear()
    called: list[str] = []
    monkeypatch.setattr(images, "find_spec", lambda name: name)
    monkeypatch.setattr(
        images, "import_module", lambda name: SimpleNamespace(register_heif_opener=lambda: called.append(name))
    )
    assert image_files(tmp_path) == [tmp_path / "a.heic"] and called == ["pillow_heif"]
    images._plugin.cache_clear()
