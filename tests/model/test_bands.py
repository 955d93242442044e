"""The autoencoder in bands of rows against itself on whole maps, and the memory that bands save."""

from __future__ import annotations

import pytest
import torch
from helpers import randomize, relative_error
from live_bytes import LiveBytes

from fluxq.model import AutoEncoder, AutoEncoderConfig
from fluxq.model.autoencoder import within_memory

SMALL = AutoEncoderConfig(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, groups=4)
SHALLOW = AutoEncoderConfig(ch=8, ch_mult=(1, 3), num_res_blocks=1, z_channels=5, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SHALLOW])
@pytest.mark.parametrize(("height", "width"), [(40, 24), (8, 8), (35, 21), (24, 56)])
def test_bands_equal_the_whole_at_any_size(config, height, width):
    autoencoder = randomize(AutoEncoder(config))
    images = torch.randn(2, 3, height, width) + 0.5
    with torch.no_grad():
        moments = autoencoder.moments(images)
        latents = torch.randn(2, config.z_channels, *moments.shape[2:])
        decoded = autoencoder.decode(latents)
    for band in (1, 3, 16, 1000):
        banded = autoencoder.in_bands(band)
        assert relative_error(banded.moments(images), moments) <= 1e-5
        assert relative_error(banded.decode(latents), decoded) <= 1e-5


def test_bands_leave_no_seam():
    """Not just on average: no single pixel is off by more than rounding, at band borders or elsewhere."""
    autoencoder = randomize(AutoEncoder(SMALL))
    latents = torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        whole = autoencoder.decode(latents)
    error = (autoencoder.in_bands(16).decode(latents) - whole).abs().max() / whole.abs().max()
    assert error <= 1e-5


def test_bands_in_bf16_err_no_more_than_twice_the_whole():
    autoencoder = randomize(AutoEncoder(SMALL))
    images, latents = torch.randn(1, 3, 64, 48), torch.randn(1, 16, 8, 6)
    with torch.no_grad():
        moments, decoded = autoencoder.moments(images), autoencoder.decode(latents)
        autoencoder.bfloat16()
        errors = [relative_error(autoencoder.moments(images.bfloat16()), moments)]
        errors.append(relative_error(autoencoder.decode(latents.bfloat16()), decoded))
    banded = autoencoder.in_bands(5)
    assert relative_error(banded.moments(images.bfloat16()), moments) <= 2 * errors[0]
    assert relative_error(banded.decode(latents.bfloat16()), decoded) <= 2 * errors[1]


def test_encode_in_bands_and_then_on_whole_maps_again():
    autoencoder = randomize(AutoEncoder(SMALL))
    images = torch.randn(1, 3, 32, 48)
    whole = autoencoder.encode(images, torch.Generator().manual_seed(5))
    banded = autoencoder.in_bands(8).encode(images, torch.Generator().manual_seed(5))
    assert relative_error(banded, whole) <= 1e-5 and not banded.requires_grad
    assert torch.equal(autoencoder.in_bands(None).encode(images, torch.Generator().manual_seed(5)), whole)


class Small:
    """A GPU with memory for bands of at most `most` rows."""

    def __init__(self, autoencoder, most):
        self.autoencoder, self.most, self.tried = autoencoder, most, []

    def run(self):
        band = self.autoencoder.band
        self.tried.append(band)
        if band is None or band > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return band


@pytest.mark.parametrize(
    ("start", "most", "tried"),
    [(None, 40, [None, None, 32]), (None, 8, [None, None, 32, 8]), (64, 10, [64, 64, 32, 8])],
)
def test_out_of_memory_retries_as_before_then_in_narrower_bands_and_notifies(start, most, tried):
    notes, autoencoder = [], AutoEncoder(SHALLOW).in_bands(start)
    gpu = Small(autoencoder, most)
    assert within_memory(autoencoder, gpu.run, notes.append) == tried[-1] == autoencoder.band
    assert gpu.tried == tried and len(notes) == len(tried) - 2 and f"on {tried[-1]} rows at a time" in notes[-1]
    assert within_memory(autoencoder, gpu.run, notes.append) == tried[-1]
    assert gpu.tried == [*tried, tried[-1]] and len(notes) == len(tried) - 2  # the narrower bands are kept


def test_out_of_memory_in_the_narrowest_bands_is_raised():
    autoencoder = AutoEncoder(SHALLOW)
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(autoencoder, Small(autoencoder, 7).run, print)


@pytest.mark.slow
def test_bands_take_less_than_two_fifths_of_the_memory():
    """At 768 x 64, in bands of 32 rows. A unit is a map of `ch` channels at full size (25 MB in FLUX.1, fp32).

    At 768 x 256 whole maps took 5 units to encode and 6 to decode; bands took 1.7 and 2.2.
    """
    autoencoder = randomize(AutoEncoder(SMALL))
    images, latents = torch.randn(1, 3, 768, 64), torch.randn(1, 16, 96, 8)
    unit = 768 * 64 * SMALL.ch * 4
    for run, most in ((lambda: autoencoder.moments(images), 2.0), (lambda: autoencoder.decode(latents), 2.4)):
        peaks = []
        for band in (None, 32):
            autoencoder.in_bands(band)
            with torch.no_grad(), LiveBytes() as bytes:
                run()
            peaks.append(bytes.peak)
        assert peaks[1] <= most * unit and peaks[1] <= 0.4 * peaks[0]
