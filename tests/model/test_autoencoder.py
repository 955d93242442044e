"""The autoencoder against diffusers' AutoencoderKL, with random tensors."""

from __future__ import annotations

import pytest
import torch
from helpers import Lazy, randomize, relative_error

from fluxq.formats.checkpoint.keys import autoencoder_to_diffusers
from fluxq.model import AutoEncoder, AutoEncoderConfig

diffusers = Lazy("diffusers")

SMALL = AutoEncoderConfig(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, groups=4)


def twin(autoencoder: AutoEncoder):
    c = autoencoder.config
    levels = len(c.ch_mult)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(c.ch * m for m in c.ch_mult),
        layers_per_block=c.num_res_blocks,
        latent_channels=c.z_channels,
        norm_num_groups=c.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    theirs.load_state_dict(autoencoder_to_diffusers(autoencoder.state_dict()))
    return theirs.requires_grad_(False)


@pytest.fixture
def pair():
    ours = randomize(AutoEncoder(SMALL))
    return ours, twin(ours)


@pytest.mark.slow
def test_moments_and_their_gradient_equal_diffusers(pair):
    ours, theirs = pair
    x = torch.randn(2, 3, 48, 32, requires_grad=True)
    moments, expected = ours.encoder(x), theirs.encode(x).latent_dist.parameters
    assert relative_error(moments, expected) <= 1e-5
    dy = torch.randn_like(moments)
    ours_dx, theirs_dx = (torch.autograd.grad(out, x, dy)[0] for out in (moments, expected))
    assert relative_error(ours_dx, theirs_dx) <= 1e-5


@pytest.mark.slow
def test_images_and_their_gradient_equal_diffusers(pair):
    ours, theirs = pair
    latents = torch.randn(2, 16, 5, 3, requires_grad=True)
    image = ours.decode(latents)
    expected = theirs.decode(latents / SMALL.scale_factor + SMALL.shift_factor).sample
    assert image.shape == (2, 3, 40, 24)
    assert relative_error(image, expected) <= 1e-5
    dy = torch.randn_like(image)
    ours_dx, theirs_dx = (torch.autograd.grad(out, latents, dy)[0] for out in (image, expected))
    assert relative_error(ours_dx, theirs_dx) <= 1e-5


@pytest.mark.slow
def test_encode_returns_the_mean_or_a_sample_around_it(pair):
    ours, _ = pair
    x = torch.randn(1, 3, 32, 32)
    mean, log_variance = ours.encoder(x).chunk(2, dim=1)
    torch.testing.assert_close(ours.encode(x), 0.3611 * (mean - 0.1159))
    draws = torch.stack([ours.encode(x, torch.Generator().manual_seed(s)) for s in range(400)])
    torch.testing.assert_close(
        draws.mean(0), ours.encode(x), atol=5 * 0.3611 * log_variance.mul(0.5).exp().max().item() / 20, rtol=0
    )
    spread = 0.3611 * torch.exp(0.5 * log_variance)
    assert relative_error(draws.std(0), spread) < 0.1


def test_full_size_keys_and_weights():
    with torch.device("meta"):
        autoencoder = AutoEncoder(AutoEncoderConfig())
    assert len(autoencoder.state_dict()) == 244
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_819_683
