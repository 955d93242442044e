"""The bucket rule: its properties, and values computed by hand from the rule of sd-scripts."""

import random

import pytest

from fluxq.data.buckets import bucket_table, choose_bucket
from fluxq.errors import WrongRequest


def test_small_table_follows_the_rule():
    # 256 * 256 = 65,536: 128 -> 512, but max_side is 384; 192 -> 341 -> 320; 256; 320 -> 204 -> 192; 384 -> 170 -> 128
    expected = [(128, 384), (192, 320), (256, 256), (320, 192), (384, 128)]
    assert list(bucket_table(256, 128, 384, 64)) == expected


def test_square_is_in_the_table_even_if_no_side_gives_it():
    assert (480, 480) in bucket_table(500, 256, 1024, 96)  # sides are 192, 288, 384, 480, ...; 500 is cut to 480
    assert (256, 256) in bucket_table((512, 128), 64, 512, 64)  # 512 * 128 = 256 * 256


@pytest.mark.parametrize(
    ("size", "arguments", "bucket", "resized"),
    [
        # 1920 / 1080 = 1.778. 1024 x 1024 in steps of 64, up to 1536: 1344 x 768 has 1.750, 1408 x 704 has 2.0
        ((1920, 1080), (1024, 256, 1536, 64, True), (1344, 768), (1365, 768)),
        ((1080, 1920), (1024, 256, 1536, 64, True), (768, 1344), (768, 1365)),
        # 4 / 3: 576 x 448 has 1.2857, 640 x 384 has 1.667; the image is wider than its bucket, so the heights match
        ((4000, 3000), (512, 256, 1024, 64, True), (576, 448), (597, 448)),
        ((3000, 4000), (512, 256, 1024, 64, True), (448, 576), (448, 597)),
        # small images are enlarged to cover
        ((10, 10), (512, 256, 1024, 64, True), (512, 512), (512, 512)),
        ((1, 1), (512, 256, 1024, 16, True), (512, 512), (512, 512)),
        # 20 : 1 takes the longest bucket, and is cut down to it
        ((2000, 100), (512, 256, 1024, 64, True), (1024, 256), (5120, 256)),
        ((100, 2000), (512, 256, 1024, 64, True), (256, 1024), (256, 5120)),
        # a size in the table is kept as it is
        ((640, 384), (512, 256, 1024, 64, True), (640, 384), (640, 384)),
    ],
)
def test_upscale_chooses_the_nearest_aspect_ratio_and_covers_it(size, arguments, bucket, resized):
    assert choose_bucket(*size, *arguments) == (bucket, resized)


def test_a_tie_goes_to_the_narrowest_bucket():
    assert bucket_table(256, 128, 512, 128) == ((128, 384), (128, 512), (256, 256), (384, 128), (512, 128))
    assert choose_bucket(200, 100, 256, 128, 512, 128, True)[0] == (256, 256)  # 2 is as far from 1 as from 3


@pytest.mark.parametrize(
    ("size", "arguments", "bucket", "resized"),
    [
        # not larger than the area: never resized, each side cut down to the step
        ((500, 300), (512, 64), (448, 256), (500, 300)),
        ((512, 512), (512, 64), (512, 512), (512, 512)),
        ((1000, 200), (512, 64), (960, 192), (1000, 200)),
        # 1024 x 1024 at 16 : 9 is 1365.3 x 768. By width: 1344, 756 -> 704, ratio 1.909; by height: 768,
        # 1365.3 -> 1344, ratio 1.75, which is nearer to 1.778; the width follows unrounded: 1365
        ((1920, 1080), (1024, 64), (1344, 768), (1365, 768)),
        ((1080, 1920), (1024, 64), (768, 1344), (768, 1365)),
        # 512 x 512 at 4 : 3 is 591.2 x 443.4. By width: 576, 432 -> 384, 1.5; by height: 384, 512, 1.333
        ((2000, 1500), (512, 64), (512, 384), (512, 384)),
        # 512 x 512 at 3 : 2 is 627.1 x 418.0. By width: 576, 384, 1.5; by height: 384, 576, 1.5: a tie
        ((3000, 2000), (512, 64), (576, 384), (576, 384)),
        # 512 x 512 at 7 : 5 is 605.8 x 432.7. By width: 576, 411.4 -> 384, 1.5; by height: 384, 537.6 -> 512, 1.333,
        # which is nearer to 1.4
        ((1400, 1000), (512, 64), (512, 384), (538, 384)),
        # 512 x 512 at 5 : 4 is 572.4 x 457.9. By width: 512, 409.6 -> 384, 1.333; by height: 448, 560 -> 512, 1.143:
        # the width is nearer to 1.25
        ((1000, 800), (512, 64), (512, 384), (512, 410)),
    ],
)
def test_without_upscale_images_only_shrink(size, arguments, bucket, resized):
    resolution, step = arguments
    assert choose_bucket(*size, resolution, 256, 1024, step, False) == (bucket, resized)


def test_without_upscale_the_side_limits_are_ignored():
    assert choose_bucket(4000, 40, 512, 256, 1024, 16, False) == ((4000, 32), (4000, 40))


@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("step", [16, 32, 48, 64])
def test_any_image_covers_a_bucket_of_whole_steps_and_bounded_area(step, upscale):
    draw = random.Random(step)
    for _ in range(500):
        resolution = draw.choice([256, 500, 512, 768, (512, 768), 1024])
        width, height = (int(2 ** draw.uniform(6.1, 12)) for _ in range(2))
        if draw.random() < 0.1:
            width = min(20 * height, 8000)
        area = resolution**2 if isinstance(resolution, int) else resolution[0] * resolution[1]
        if not upscale and min(width, height) * min(1.0, (area / (width * height)) ** 0.5) < step:
            continue  # too narrow: refused, as another test shows
        bucket, resized = choose_bucket(width, height, resolution, 192, 1024, step, upscale)
        assert bucket[0] % step == bucket[1] % step == 0 and min(bucket) >= step
        assert resized[0] >= bucket[0] and resized[1] >= bucket[1]
        if upscale:
            assert bucket[0] * bucket[1] <= area
            assert 192 // step * step <= min(bucket) and max(bucket) <= 1024 + step
        else:
            # sd-scripts rounds a side before it cuts it, so half a pixel may come on top
            assert bucket[0] * bucket[1] <= area + max(bucket)
            assert resized[0] <= width and resized[1] <= height


def test_every_bucket_maps_to_itself():
    for size in bucket_table(512, 256, 1024, 16):
        assert choose_bucket(*size, 512, 256, 1024, 16, True) == (size, size)


def test_side_limits_are_widened_to_multiples_of_the_step():
    assert bucket_table(512, 250, 1000, 64) == bucket_table(512, 192, 1024, 64)


@pytest.mark.parametrize("step", [0, -16, 8, 24, 100])
def test_step_not_a_multiple_of_16_is_refused(step):
    for upscale in (True, False):
        with pytest.raises(WrongRequest, match=f"step of {step} .*multiple of 16"):
            choose_bucket(512, 512, 512, 256, 1024, step, upscale)


@pytest.mark.parametrize(("low", "high"), [(600, 1024), (256, 400), (0, 1024)])
def test_sides_that_do_not_fit_the_resolution_are_refused(low, high):
    with pytest.raises(WrongRequest, match=rf"sides from {low} to {high} .*512 x 512"):
        choose_bucket(512, 512, 512, low, high, 16, True)


@pytest.mark.parametrize("upscale", [True, False])
def test_resolution_below_one_step_is_refused(upscale):
    with pytest.raises(WrongRequest, match="resolution of 32 is smaller than one bucket step of 64"):
        choose_bucket(512, 512, 32, 16, 1024, 64, upscale)


@pytest.mark.parametrize("size", [(15, 500), (500, 15), (8, 8), (40000, 20)])
def test_image_too_small_without_upscale_is_refused_with_both_sizes(size):
    with pytest.raises(WrongRequest, match=f"{size[0]} x {size[1]} pixels .*step of 16"):
        choose_bucket(*size, 512, 256, 1024, 16, False)


def test_empty_image_is_refused():
    with pytest.raises(WrongRequest, match="0 x 5"):
        choose_bucket(0, 5, 512, 256, 1024, 16, True)
