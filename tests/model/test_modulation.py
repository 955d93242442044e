"""Rows computed ahead equal those of the step, and not one bit of them depends on earlier requests."""

from __future__ import annotations

import pytest
import torch
from helpers import place_sensitive, randomize, relative_error, tiny_config

from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.lora import lora_layers
from fluxq.model.modulation import Conditioning, Lookahead, is_known_ahead

COUNTS = (3, 3, 1, 2)  # examples per micro-step, repeated: the last batch of a bucket can be short


def conditioning(index: int, guided: bool = True) -> Conditioning:
    generator, count = torch.Generator().manual_seed(index), COUNTS[index % len(COUNTS)]
    guidance = 1 + torch.rand(count, generator=generator) if guided else None
    return torch.rand(count, generator=generator), torch.randn(count, 24, generator=generator), guidance


def model(targets="attention+mlp", dtype=torch.bfloat16, **changes) -> Flux:
    torch.manual_seed(0)
    flux = randomize(Flux(tiny_config(**changes))).to(dtype)
    add_lora(flux, 3, 2, targets)
    for layer in lora_layers(flux).values():
        torch.nn.init.normal_(layer.get_parameter("lora_up"), std=0.1)
    return flux


def step(flux: Flux, index: int, rows) -> list[torch.Tensor]:
    """Output and gradients."""
    given, c, generator = (
        conditioning(index, flux.config.guidance_embed),
        flux.config,
        torch.Generator().manual_seed(-index),
    )
    img, txt = (torch.randn(len(given[0]), *s, generator=generator) for s in ((15, c.in_channels), (7, 40)))
    out = flux(img, image_ids(3, 5), txt, text_ids(7), *given, rows)
    dy = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(flux.parameters()), dy)]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("index", [0, 2, 22, 23, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_rows_ahead_equal_modulation_within_the_step(dtype, tolerance, index, guidance):
    flux = model(dtype=dtype, guidance_embed=guidance)
    ahead = Lookahead(flux, lambda i: conditioning(i, guidance), 3)
    expected = list(flux.modulation_rows(*conditioning(index, guidance)))
    rows = ahead.rows(index)
    assert [r.shape for r in rows] == [r.shape for r in expected] and not any(r.requires_grad for r in rows)
    for a, b in zip(rows, expected, strict=True):
        assert relative_error(a, b) <= tolerance
    for a, b in zip(step(flux, index, rows), step(flux, index, None), strict=True):
        assert relative_error(a, b) <= 4 * tolerance  # five layers in a row


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("steps", [None, 50])
def test_no_bit_depends_on_earlier_requests(steps, sensitive, monkeypatch):
    """A tile is 21 micro-steps of 3 examples; with 50 steps the last tile is padded. sensitive: as on a GPU, products
    round differently by a row's place and by their whole shape.
    """
    if sensitive:
        monkeypatch.setattr(Flux, "modulation_rows", place_sensitive)
    flux = model()

    def lookahead():
        return Lookahead(flux, conditioning, 3, steps)

    once = lookahead()
    straight = [once.rows(index) for index in range(50)]
    for index in (0, 13, 20, 21, 30, 49):
        first, back = lookahead(), lookahead()
        back.rows(49 - index)
        for other in (first, back):
            assert all(torch.equal(a, b) for a, b in zip(other.rows(index), straight[index], strict=True)), index


def test_each_micro_step_is_requested_once_and_none_beyond_the_last():
    requested = []
    ahead = Lookahead(model(), lambda i: requested.append(i) or conditioning(i), 3, 30)
    for index in range(30):
        ahead.rows(index)
    assert requested == list(range(30))


@pytest.mark.parametrize(
    ("targets", "known"),
    [
        ("attention", True),
        ("attention+mlp", True),
        ([r"(img|txt)_in"], True),
        ([r"final_layer\.linear"], True),
        ("all", False),
        ([r"single_blocks\.1\.modulation\.lin"], False),
        ([r"double_blocks\.0\.txt_mod\.lin"], False),
        ([r"vector_in\.in_layer"], False),
        ([r"final_layer\.adaLN_modulation\.1"], False),
    ],
)
def test_trained_modulation_runs_in_the_step_and_gets_its_gradient(targets, known):
    """Without gradients (sampling) all modulation is computed ahead."""
    flux = model(targets)
    assert is_known_ahead(flux.config, targets) == known
    ahead = Lookahead(flux, conditioning, 3)
    assert (ahead.rows(0) is not None) == known
    assert all(g.abs().max() > 0 for g in step(flux, 0, ahead.rows(0)))
    with torch.no_grad():
        for a, b in zip(ahead.rows(1), flux.modulation_rows(*conditioning(1)), strict=True):
            assert relative_error(a, b) <= 2**-7


def test_a_tile_of_one_micro_step_may_exceed_few_rows():
    flux = model()
    given = torch.rand(70), torch.randn(70, 24), torch.ones(70)
    rows = Lookahead(flux, lambda index: given, 70, 2).rows(1)
    assert all(torch.equal(a, b) for a, b in zip(rows, flux.modulation_rows(*given), strict=True))
